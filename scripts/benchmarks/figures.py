"""Define the figures of a benchmark, which are written to JSON as they are, and describe the machine they are of."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

import psutil
import torch

from stages.system.hardware import processor

_PACKAGES = ("torch", "onnxruntime-gpu", "onnxruntime", "numpy", "nvidia-modelopt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What it ran on."""

    processor: str
    cores: int
    threads: int
    """Threads of torch's operations, and of ONNX Runtime's."""
    gpu: str | None
    versions: dict[str, str]


def this_machine() -> Machine:
    """Return processor, threads, GPU and the versions that decide about speed."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandFigure:
    """A whole command in a process of its own."""

    name: str
    command: str
    seconds: float | None
    peak_bytes: int | None
    """Most host memory that it held, mapped pages of weights counted."""
    failure: str | None = None
    copy_seconds: float | None = None
    """A copy of the files that it reads and writes, flushed; None: not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureFigure:
    """Tokens a second of calibration's passes and of plain inference; medians of interleaved rounds."""

    tokens: int
    """Tokens of one round."""
    plain: float
    """The untouched graph, logits computed."""
    tapped: float
    """The tapped graph without statistics."""
    observed: float
    """The tapped graph and all statistics: what stage one does."""
    provider: str

    @property
    def ratio(self) -> float:
        """Say how much longer calibration takes than plain inference."""
        return self.plain / self.observed


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchFigure:
    """The search of one activation group."""

    group: str
    in_features: int
    out_features: int
    algorithm: str
    seconds: float
    device_peak_bytes: int | None
    """Most device memory that torch held; None on the CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFigure:
    """Seconds of GPTQ's parts for one weight, and of the product of weight and Gram matrix, W G."""

    in_features: int
    out_features: int
    product: float
    factoring: float
    """Of the inverse Gram matrix."""
    gptq: float
    """All columns, without factoring."""
    descent: float
    """One pass of coordinate descent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteFigure:
    """Export, and a copy of as many bytes."""

    bytes: int
    export_seconds: float
    """Without verification."""
    copy_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """Everything that one run measured."""

    machine: Machine
    base: str
    commands: tuple[CommandFigure, ...]
    calibration_tokens: int = 0
    """That the calibration ran, held-out ones too."""
    capture: CaptureFigure | None = None
    search: tuple[SearchFigure, ...] = ()
    kernels: tuple[KernelFigure, ...] = ()
    writing: WriteFigure | None = None

    def seconds_of(self, *names: str) -> float | None:
        """Return the seconds of these commands together; None where one is missing or failed."""
        known = [command.seconds for command in self.commands if command.name in names and command.seconds is not None]
        return sum(known) if len(known) == len(names) else None
