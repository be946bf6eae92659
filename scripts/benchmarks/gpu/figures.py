"""Define the figures of the GPU check, which are written to JSON as they are."""

from __future__ import annotations

from dataclasses import dataclass

from scripts.benchmarks.figures import Machine, SearchFigure
from stages.evaluation.records import SpeedTest


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the base graph ran, and where its tapped activations lay."""

    provider: str
    outputs: str
    """cuda where nothing was copied to the host."""
    missing: tuple[tuple[str, str], ...]
    """(execution provider, why it can't be used)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionFigure:
    """How many sites of a tiny model ran as MatMulNBits on the provider, for one choice of formats."""

    precision: str
    """Of the base."""
    options: str
    """Beside ``--target cuda``; none: the target's own choice."""
    formats: str
    sites: int
    fused: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFigure:
    """One step that was run."""

    name: str
    seconds: float
    device_peak_bytes: int | None
    """Most memory of the device that was taken during it, by torch and ONNX Runtime together; None on the CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeFigure:
    """Seconds of a whole model, computed from parts that were run."""

    name: str
    seconds: float
    aim: float | None
    how: str
    """What it was computed from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuCheck:
    """Everything that one run found."""

    machine: Machine
    size: str
    placement: Placement | None = None
    fusion: tuple[FusionFigure, ...] = ()
    layers: tuple[SearchFigure, ...] = ()
    """The search of one group of each shape."""
    steps: tuple[StepFigure, ...] = ()
    wholes: tuple[WholeFigure, ...] = ()
    same_bits: bool | None = None
    """Whether two searches on the device gave the same codes and scales."""
    speed: SpeedTest | None = None
    """Decoding of the whole model's base and of its INT4 model."""
    not_done: tuple[tuple[str, str], ...] = ()
    """(step, why)."""
