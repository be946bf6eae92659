"""The hardware that work runs on: the torch device, and the machine's description for reports."""

from __future__ import annotations

import platform
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch

from stages.errors import UserError
from stages.records.quantities import counted
from stages.system.threads import physical_cores

_CPUINFO = Path("/proc/cpuinfo")
_CPUINFO_NAME = re.compile(r"^model name\s*:\s*(.+)$", re.MULTILINE)
"""Only on Linux; platform.processor() is empty there."""


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
