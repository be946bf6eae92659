"""A sweep's results as a part of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stages.evaluation.bench import Bench, Record, Run, Yardstick
from stages.evaluation.results import Result, on_front
from stages.evaluation.workplace import results_of
from stages.machine import describe_machine
from stages.page.document import Document, SweepPoint, SweepTable


def sweep_document(
    bench: Bench,
    runs: Sequence[Run],
    records: Mapping[str, Record],
    yardsticks: Sequence[Yardstick],
    notes: Mapping[str, str],
) -> Document:
    """One table a text; one of held-out layer losses where there is no text. ``notes`` are remarks by run name."""
    commands = {run.name: run.shown_command for run in runs}
    tables = []
    for yardstick in yardsticks or (None,):
        results = results_of(runs, records, yardstick, notes)
        points = [
            _point(result, commands[result.name], on_front=best)
            for result, best in zip(results, on_front(results), strict=True)
        ]
        tables.append(
            SweepTable(
                text=None if yardstick is None else yardstick.text,
                base=None if yardstick is None else bench.base_row(yardstick),
                points=tuple(points),
            )
        )
    return Document(title=bench.folder.name, machine=describe_machine(), sweep=tuple(tables))


def _point(result: Result, command: str, *, on_front: bool) -> SweepPoint:
    cost, search = result.record.cost, result.record.search
    return SweepPoint(
        name=result.name,
        command=command,
        bytes=result.record.bytes,
        bits_per_weight=None if search is None else search.bits_per_weight,
        search_seconds=None if search is None else search.seconds,
        total_seconds=None if cost is None else cost.seconds,
        peak_bytes=None if cost is None else cost.peak_bytes,
        held_out_loss=None if search is None else search.held_out_loss,
        accuracy=result.accuracy,
        loss=result.loss,
        on_front=on_front,
        note=result.record.failure or result.note,
    )
