"""Keep what became of each architecture in each build, and make the table of the support page from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from stages.errors import UserError

Step = Literal["build", "calibrate", "quantize", "evaluate", "generate"]
BUILDS = ("cpu", "cuda", "dml", "webgpu", "NvTensorRtRtx")
_AGAIN = "run scripts.architectures"
_HEADER = ("architecture", "models", "peculiar", *(f"`{build}`" for build in BUILDS), "KL", "tokens weighted")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What became of one architecture's tiny model in one build."""

    architecture: str
    build: str
    """The builder's execution provider."""
    stopped_at: Step | None = None
    """The step that failed; None where all was done."""
    reason: str = ""
    """Why it failed."""
    base_generates: bool = True
    """Whether onnxruntime-genai generates with the float model."""
    sites: int = 0
    """Quantized MatMuls."""
    fused: int | None = None
    """How many of them ONNX Runtime runs as MatMulNBits; None where that couldn't be tried."""
    kept: tuple[tuple[str, int], ...] = ()
    """Why MatMuls stay as they are, and how many."""
    elsewhere: float = 0.0
    """Part of the base's weights that stays in experts' nodes, 0 to 1."""
    unweighted: str = ""
    """Why tokens weren't weighted by the end loss; empty where they were."""
    divergence: float | None = None
    """Mean KL(base || model) over tokens of text that it wasn't calibrated on, nats; None where it wasn't measured."""


_CELLS = TypeAdapter(Cell)


def append_cell(cell: Cell, file: Path) -> None:
    """Add ``cell`` to the lines of ``file``."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(_CELLS.dump_json(cell).decode() + "\n")


def read_cells(file: Path) -> tuple[Cell, ...]:
    """Return the last cell of each architecture and build in the lines of ``file``.

    Raises:
        UserError: it can't be read or holds something else.
    """
    try:
        found = [_CELLS.validate_json(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValidationError) as error:
        raise UserError(f"{file} can't be read ({error}); {_AGAIN}.") from error
    return tuple({(cell.architecture, cell.build): cell for cell in found}.values())
