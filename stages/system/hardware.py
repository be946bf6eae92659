"""The hardware that work runs on: the torch device, threads, and the machine's description for reports."""

from __future__ import annotations

import os
import platform
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch

from stages.errors import UserError
from stages.records.quantities import counted

_CPUINFO = Path("/proc/cpuinfo")
_CPUINFO_NAME = re.compile(r"^model name\s*:\s*(.+)$", re.MULTILINE)
"""Only on Linux; platform.processor() is empty there."""
_THREADS = re.compile(r"\s*0*([1-9][0-9]{0,8})\s*(,.*)?")
"""A value of OMP_NUM_THREADS: a number, or a list of them, one for each level of nested loops."""


def choose_device(wanted: str) -> torch.device:
    """Return the torch device that ``--device`` means; ``auto`` takes CUDA, then MPS, then the CPU.

    Raises:
        UserError: the device isn't there.
    """
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {wanted} can't be used here; choose auto, cpu, or a device torch sees.") from error
    return device


def physical_cores() -> int:
    """Return how many threads ONNX Runtime takes by default: one for each physical core."""
    return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1


def granted_threads() -> int | None:
    """Return the number of threads that OMP_NUM_THREADS grants: of a list, as OpenMP allows, its first number.

    At most as many as the machine runs at once; None where the variable is unset or empty.

    Raises:
        UserError: it holds anything else.
    """
    value = os.environ.get("OMP_NUM_THREADS", "").strip()
    found = _THREADS.fullmatch(value)
    if value and found is None:
        raise UserError(f"OMP_NUM_THREADS is '{value}', which is not a number of threads; set it to one, or unset it.")
    return None if found is None else min(int(found[1]), psutil.cpu_count() or 1)


def one_thread_each(workers: int) -> ThreadPoolExecutor:
    """Return a pool of ``workers`` threads, each of which computes with torch on its own thread only."""
    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))


def processor() -> str:
    """Return the processor's name as the operating system gives it, or else the kind of machine."""
    try:
        found = _CPUINFO_NAME.search(_CPUINFO.read_text("ascii", errors="replace"))
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def describe_machine() -> str:
    """Return the processor, cores, memory and operating system in one line."""
    memory = psutil.virtual_memory().total / 1e9
    return f"{processor()}, {counted(physical_cores(), 'core')}, {memory:.0f} GB, {platform.system()}"
