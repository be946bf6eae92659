"""Measured models as a table: who is nowhere beaten in bytes and loss at once, and by which command each was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from stages.evaluation.accuracy import Accuracy
from stages.evaluation.bench.runs import Record, Search
from stages.evaluation.records import ModelRow
from stages.system.measured_process import Cost

_ACCURACY = ("perplexity", "KL (nats)", "same top-1")
_UNKNOWN = "-"
_SAME_SIZE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One line: a run's record and, where it was judged, its accuracy on the table's text."""

    name: str
    record: Record
    accuracy: Accuracy | None = None
    note: str = ""

    @property
    def loss(self) -> float | None:
        """What is weighed against bytes: KL, or the held-out layer loss of models that no text judged."""
        if self.accuracy is not None:
            return self.accuracy.mean_divergence
        return None if self.record.search is None else self.record.search.held_out_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredModel:
    """One line of the table, for programs."""

    name: str
    command: str
    unbeaten: bool
    """Whether no other one beats it in bytes and loss."""
    note: str
    failure: str | None
    bytes: int | None
    cost: Cost | None
    search: Search | None
    accuracy: Accuracy | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextResults:
    """One table, for programs."""

    text: str | None
    """None where no text judged the models."""
    base: ModelRow | None
    models: tuple[MeasuredModel, ...]


def measured_models(results: Sequence[Result], commands: Mapping[str, str]) -> tuple[MeasuredModel, ...]:
    """The lines of the table; ``commands`` make the models, by name."""
    return tuple(
        MeasuredModel(
            name=result.name,
            command=commands[result.name],
            unbeaten=unbeaten,
            note=result.note,
            failure=result.record.failure,
            bytes=result.record.bytes,
            cost=result.record.cost,
            search=result.record.search,
            accuracy=result.accuracy,
        )
        for result, unbeaten in zip(results, on_front(results), strict=True)
    )


def pareto_front(points: Sequence[tuple[int, float] | None]) -> list[bool]:
    """Which (bytes, loss) no other one beats: one with less loss in as many bytes, or as little loss in fewer.

    Up to a thousandth more is as many: graphs of the same weights differ by a few names. None is never on the front.
    """
    known = [point for point in points if point is not None]
    return [point is not None and not any(_beats(other, point) for other in known) for point in points]


def _beats(one: tuple[int, float], other: tuple[int, float]) -> bool:
    (size, loss), (other_size, other_loss) = one, other
    return size <= other_size * (1 + _SAME_SIZE) if loss < other_loss else loss == other_loss and size < other_size


def on_front(results: Sequence[Result]) -> list[bool]:
    """Which results no other one beats in bytes and loss."""
    return pareto_front([_point(result) for result in results])


def _point(result: Result) -> tuple[int, float] | None:
    size, loss = result.record.bytes, result.loss
    return None if size is None or loss is None or result.record.failure is not None else (size, loss)


def results_table(title: str, results: Sequence[Result]) -> Table:
    """One row a model; ``*`` marks the Pareto front. A model that failed has its sentence as note."""
    judged = any(result.accuracy is not None for result in results)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    table.add_column("model", overflow="fold")
    headings = (
        "search s",
        "total s",
        "peak MB",
        "bits a weight",
        "MB",
        "held-out loss",
        *(_ACCURACY if judged else ()),
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    notes = [result.record.failure or result.note for result in results]
    if any(notes):
        table.add_column("note", overflow="fold")
    for result, marked, note in zip(results, on_front(results), notes, strict=True):
        cells = _cells(result) if judged else _cells(result)[: -len(_ACCURACY)]
        table.add_row("*" if marked else "", result.name, *cells, *([note] if any(notes) else []))
    return table


def _cells(result: Result) -> list[str]:
    record = result.record
    cost, search, accuracy = record.cost, record.search, result.accuracy
    return [
        _number(None if search is None else search.seconds, ".1f"),
        _number(None if cost is None else cost.seconds, ".1f"),
        _number(None if cost is None or cost.peak_bytes is None else cost.peak_bytes / 1e6, ".0f"),
        _number(None if search is None else search.bits_per_weight, ".3f"),
        _number(None if record.bytes is None else record.bytes / 1e6, ".1f"),
        _number(None if search is None else search.held_out_loss, ".5f"),
        _number(None if accuracy is None else accuracy.perplexity, ".3f"),
        _number(None if accuracy is None else accuracy.mean_divergence, ".5f"),
        _number(None if accuracy is None else accuracy.top1_agreement, ".2%"),
    ]


def _number(value: float | None, form: str) -> str:
    return _UNKNOWN if value is None else format(value, form)
