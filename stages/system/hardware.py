"""The machine that figures were measured on, in words."""

from __future__ import annotations

import os
import platform
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch

from stages.errors import UserError

_CPUINFO = Path("/proc/cpuinfo")
"""Linux alone names its processor here; platform.processor() is empty there."""


def choose_device(wanted: str) -> torch.device:
    """The torch device that ``--device`` means; ``auto`` takes CUDA, then MPS, then the CPU.

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


def describe_machine() -> str:
    """Processor, cores and memory, and the operating system."""
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    memory = psutil.virtual_memory().total / 1e9
    return f"{processor()}, {cores} cores, {memory:.0f} GB, {platform.system()}"


def default_threads() -> int:
    """Threads that ONNX Runtime takes unless told otherwise: one for each physical core."""
    return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1


def processor() -> str:
    """Its name as the operating system gives it, or else the kind of machine."""
    try:
        named = re.search(r"^model name\s*:\s*(.+)$", _CPUINFO.read_text("ascii", errors="replace"), re.MULTILINE)
    except OSError:
        named = None
    return named[1].strip() if named else platform.processor() or platform.machine()


_COUNT = re.compile(r"\s*0*([1-9][0-9]{0,8})\s*(,.*)?")


def threads() -> int | None:
    """Return the number of threads that OMP_NUM_THREADS grants: of a list, as OpenMP allows, its first number.

    None where the variable is unset, or holds what OpenMP runtimes ignore: nothing, words, a number below 1.
    """
    found = _COUNT.fullmatch(os.environ.get("OMP_NUM_THREADS", ""))
    return None if found is None else int(found[1])


def one_thread_each(workers: int) -> ThreadPoolExecutor:
    """A pool of ``workers`` threads, in each of which torch computes with that thread alone."""
    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
