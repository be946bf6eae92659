"""The figures of a benchmark: frozen, and written to JSON as they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What it ran on."""

    processor: str
    cores: int
    threads: int
    """Threads of torch's operations, and of ONNX Runtime's."""
    gpu: str | None
    versions: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandFigure:
    """A whole command in a process of its own."""

    name: str
    command: str
    seconds: float | None
    peak_bytes: int | None
    """Most host memory that it held, mapped pages of weights counted."""
    failure: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureFigure:
    """Tokens a second of calibration's passes beside plain inference; medians of interleaved rounds."""

    tokens: int
    """Tokens of one round."""
    plain: float
    """The untouched graph, logits computed."""
    tapped: float
    """The tapped graph alone."""
    observed: float
    """The tapped graph and all statistics: what stage one does."""
    provider: str

    @property
    def ratio(self) -> float:
        """How much longer calibration takes than plain inference."""
        return self.plain / self.observed


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchFigure:
    """The search of one activation group beside plain matrix products of the same shape on the same device."""

    group: str
    in_features: int
    out_features: int
    algorithm: str
    flops: int
    """Floating-point operations of the search's matrix products."""
    seconds: float
    matmul_flops_per_second: float
    """Of [N, K] x [K, K] in float32."""
    device_peak_bytes: int | None
    """Most device memory that torch held; None on the CPU."""

    @property
    def flops_per_second(self) -> float:
        return self.flops / self.seconds

    @property
    def share_of_matmul(self) -> float:
        """1 where the search takes no longer than its products alone would."""
        return self.flops_per_second / self.matmul_flops_per_second


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteFigure:
    """Export beside a copy of as many bytes."""

    bytes: int
    export_seconds: float
    """Without verification."""
    copy_seconds: float


Axis = Literal["tokens", "layers", "inputs of a layer (K)"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthPoint:
    """Both stages at one size of a synthetic model."""

    size: int
    calibrate_seconds: float
    search_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthFigure:
    """How times grow along one axis while all else stays."""

    axis: Axis
    points: tuple[GrowthPoint, ...]

    @property
    def exponents(self) -> tuple[float, float]:
        """p of seconds ~ size^p for calibration and search, by least squares over logarithms."""
        sizes = [math.log(point.size) for point in self.points]
        return (
            _slope(sizes, [math.log(point.calibrate_seconds) for point in self.points]),
            _slope(sizes, [math.log(point.search_seconds) for point in self.points]),
        )


def _slope(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """Everything that one run measured."""

    machine: Machine
    base: str
    commands: tuple[CommandFigure, ...]
    capture: CaptureFigure | None = None
    search: tuple[SearchFigure, ...] = ()
    writing: WriteFigure | None = None
    growth: tuple[GrowthFigure, ...] = ()

    def seconds_of(self, *names: str) -> float | None:
        """Seconds of these commands together; None where one is missing or failed."""
        found = [command.seconds for command in self.commands if command.name in names]
        known = [seconds for seconds in found if seconds is not None]
        return sum(known) if len(known) == len(names) else None
