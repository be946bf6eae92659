"""What the benchmark runs on."""

from __future__ import annotations

import importlib.metadata

import psutil
import torch

from scripts.benchmarks.figures import Machine
from stages.system.hardware import processor

_PACKAGES = ("torch", "onnxruntime-gpu", "onnxruntime", "numpy", "nvidia-modelopt")


def this_machine() -> Machine:
    """Processor, threads, GPU and the versions that decide about speed."""
    return Machine(
        processor=processor(),
        cores=psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        versions={name: version for name in _PACKAGES if (version := _version(name)) is not None},
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
