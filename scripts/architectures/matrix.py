"""Keep what became of each architecture in each build, and make the table of the support page from it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from stages.errors import UserError, in_one_line

Step = Literal["build", "open", "calibrate", "quantize", "evaluate", "generate"]
BUILDS = ("cpu", "cuda", "dml", "webgpu", "NvTensorRtRtx")
_AGAIN = "run scripts.architectures"
_HEADINGS = (
    "architecture",
    "models",
    "apart from a plain Llama",
    *(f"`{build}`" for build in BUILDS),
    "weighted",
    "KL",
)
_LONGEST_REASON = 240
_STEPS = {
    "build": "onnxruntime-genai's builder stops",
    "open": "ONNX Runtime can't open what onnxruntime-genai's builder writes",
    "calibrate": "calibration stops",
    "quantize": "quantization stops",
    "evaluate": "ONNX Runtime stops",
    "generate": "onnxruntime-genai doesn't generate with the quantized model",
}
_NOT_THE_BASE = "; nor does onnxruntime-genai generate with the float model"
_NEITHER = "onnxruntime-genai generates with neither the float model nor the quantized one on the CPU"


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
    experts: int = 0
    """Matrices of experts that became QMoE."""
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

    @property
    def finished(self) -> bool:
        """Return whether the quantized model does all that the base does on this machine's provider."""
        return self.stopped_at is None or (self.stopped_at == "generate" and not self.base_generates)


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
        raise UserError(f"{file} can't be read ({in_one_line(error)}); {_AGAIN}.") from error
    return tuple({(cell.architecture, cell.build): cell for cell in found}.values())


def markdown(cells: Sequence[Cell], described: Mapping[str, tuple[str, str]]) -> str:
    """Return the table with one row for each architecture, and below it why some cells hold no number.

    Args:
        cells: results of all builds.
        described: the models that have an architecture, and what sets it apart.
    """
    notes: dict[str, int] = {}
    rows = [
        (f"`{name}`", *about, *_cells_of([cell for cell in cells if cell.architecture == name], notes))
        for name, about in described.items()
    ]
    lines = [f"| {' | '.join(line)} |" for line in (_HEADINGS, ["---"] * len(_HEADINGS), *rows)]
    return "\n".join([*lines, "", *(f"{number}. {note}" for note, number in notes.items())])


def _cells_of(found: Sequence[Cell], notes: dict[str, int]) -> Iterator[str]:
    """Yield what stands behind an architecture's description; add to ``notes`` what must be said below the table."""
    by_build = {cell.build: cell for cell in found}
    yield from (_text(by_build[build], notes) if build in by_build else "-" for build in BUILDS)
    finished = [cell for cell in found if cell.finished]
    if not finished:
        yield from ("-", "-")
        return
    yield "yes" if not any(cell.unweighted for cell in finished) else "no"
    first = finished[0].divergence
    yield "-" if first is None else f"{first:.3f}"


def _text(cell: Cell, notes: dict[str, int]) -> str:
    mark = "".join(f" [{notes.setdefault(note, len(notes) + 1)}]" for note in _notes(cell))
    if not cell.finished:
        return f"stops{mark}"
    experts = f" + {cell.experts} in QMoE" if cell.experts else ""
    return f"{'not run' if cell.fused is None else cell.fused} of {cell.sites}{experts}{mark}"


def _notes(cell: Cell) -> Iterator[str]:
    """Yield what a person should know beyond the number of sites."""
    if cell.stopped_at is not None:
        # What calibration refuses, such as sound, is nothing that generation from tokens could tell about.
        base = "" if cell.base_generates or cell.stopped_at in ("build", "open", "calibrate") else _NOT_THE_BASE
        step = _NEITHER if cell.finished else f"{_STEPS[cell.stopped_at]}{base}"
        yield f"{step}: {_shortened(_without_layers(cell.reason))}"
    for why, _ in cell.kept:
        yield f"Kept as it is: {why}."
    if cell.elsewhere:
        yield "Experts stay as they are, inside MoE nodes."


def _without_layers(reason: str) -> str:
    """Return ``reason`` without what differs between layers, so that one note serves several builds."""
    return re.sub(r"layers\.\d+", "layers.N", reason)


def _shortened(reason: str) -> str:
    """Return as many whole sentences of ``reason`` as have room, or words where the first has none."""
    if len(reason) <= _LONGEST_REASON:
        return f"{reason.rstrip('.')}."
    room = reason[:_LONGEST_REASON]
    sentences, _, rest = room.rpartition(". ")
    return f"{sentences}." if sentences else f"{rest.rpartition(' ')[0]} ..."
