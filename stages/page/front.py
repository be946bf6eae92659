"""A sweep's models by bytes and loss, and the line of those that no other one beats."""

from __future__ import annotations

from collections.abc import Sequence

from stages.page.document import SweepPoint, SweepTable
from stages.page.svg import Axis, Drawing, Hint, Shape, drawing, linear_axis, log_axis
from stages.page.view import Figure, LegendEntry, TableView, megabytes, number, percent, table

_WIDTH, _HEIGHT = 860, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 20, 16, 44
_MARK, _LINE_HEIGHT = 5.0, 15.0
_MARKS: dict[bool, tuple[Shape, str]] = {True: ("diamond", "c2"), False: ("ring", "c0")}
"""Shape and colour of a point by whether it is on the front."""
_LETTER = 6.4
"""Mean width of a letter, in pixels."""


def front_figure(sweep: SweepTable, name: str) -> Figure | None:
    """Bytes and loss of every point that has both; None where none has."""
    known = [(point, point.bytes, point.loss) for point in sweep.points if point.bytes and point.loss]
    if not known:
        return None
    what = "held-out layer loss" if sweep.text is None else "KL (nats)"
    x = linear_axis([size / 1e6 for _, size, _ in known], _LEFT, _WIDTH - _RIGHT)
    y = log_axis([loss for _, _, loss in known], _HEIGHT - _BOTTOM, _TOP)
    picture = _with_axes(name, x, y, what, len(known))
    places = {point.name: (x(size / 1e6), y(loss)) for point, size, loss in known}
    front = sorted((point for point, _, _ in known if point.on_front), key=lambda point: places[point.name])
    picture.path([places[point.name] for point in front], "curve c2")
    for point, size, loss in known:
        series = "front" if point.on_front else "beaten"
        hint = Hint(text=f"{point.name}: {megabytes(size)} MB, {loss:.5g}", name=point.name, series=series, value=loss)
        shape, css = _MARKS[point.on_front]
        picture.mark(*places[point.name], _MARK, shape, css, hint)
    _label(picture, front, places)
    return Figure(
        name=name,
        heading="Pareto front",
        text=f"Smaller is to the left, better further down. The line joins the models that no other one beats in bytes "
        f"and {what} at once; the scale of the loss is logarithmic.",
        drawings=(picture.markup(),),
        legend=(
            LegendEntry(text="nowhere beaten", shape="diamond", css="c2"),
            LegendEntry(text="beaten", shape="ring", css="c0"),
        ),
        table=_table(sweep),
    )


def _with_axes(name: str, x: Axis, y: Axis, what: str, count: int) -> Drawing:
    picture = drawing(f"{name}-0", "Pareto front", f"{count} models by size and {what}.", _WIDTH, _HEIGHT)
    for value in y.ticks():
        picture.line(_LEFT, y(value), _WIDTH - _RIGHT, y(value), "grid")
        picture.text(_LEFT - 8, y(value) + 4, f"{value:g}", "tick", "end")
    for value in x.ticks():
        picture.line(x(value), _TOP, x(value), _HEIGHT - _BOTTOM, "grid")
        picture.text(x(value), _HEIGHT - _BOTTOM + 16, f"{value:g}", "tick", "middle")
    picture.line(_LEFT, _HEIGHT - _BOTTOM, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM, "axis")
    picture.text(_WIDTH - _RIGHT, _HEIGHT - 8, "MB", "tick", "end")
    picture.text(_LEFT, _HEIGHT - 8, what, "tick")
    return picture


def _label(picture: Drawing, points: Sequence[SweepPoint], places: dict[str, tuple[float, float]]) -> None:
    """Names above their marks, moved up where they would cover one another."""
    taken: list[tuple[float, float, float]] = []
    for point in points:
        x, y = places[point.name]
        width = _LETTER * len(point.name)
        to_the_left = x + 8 + width > _WIDTH - _RIGHT
        left = x - 8 - width if to_the_left else x + 8
        line = y - 8
        while any(
            abs(line - other) < _LINE_HEIGHT and left < right and begin < left + width for begin, right, other in taken
        ):
            line -= _LINE_HEIGHT
        taken.append((left, left + width, line))
        picture.text(x - 8 if to_the_left else x + 8, line, point.name, "label halo", "end" if to_the_left else "start")


def _table(sweep: SweepTable) -> TableView:
    judged = sweep.text is not None
    headings = ["", "model", "note", "search, s", "total, s", "peak MB", "bits a weight", "MB", "held-out loss"]
    headings += ["perplexity", "KL", "KL, 99th percentile", "same top-1"] if judged else []
    return table(headings, [_cells(point, judged=judged) for point in sweep.points], texts=3, wraps=2)


def _cells(point: SweepPoint, *, judged: bool) -> list[str]:
    accuracy = point.accuracy
    cells = [
        "*" if point.on_front else "",
        point.name,
        point.note,
        number(point.search_seconds, ".1f"),
        number(point.total_seconds, ".1f"),
        number(None if point.peak_bytes is None else point.peak_bytes / 1e6, ".0f"),
        number(point.bits_per_weight, ".3f"),
        megabytes(point.bytes),
        number(point.held_out_loss, ".5f"),
    ]
    if judged:
        cells += [
            number(None if accuracy is None else accuracy.perplexity, ".3f"),
            number(None if accuracy is None else accuracy.mean_divergence, ".5f"),
            number(None if accuracy is None else accuracy.divergence_99, ".4f"),
            percent(None if accuracy is None else accuracy.top1_agreement),
        ]
    return cells
