"""KL divergence along the window of text."""

from __future__ import annotations

from stages.evaluation.findings import Evaluation
from stages.page.svg import Axis, Hint, Shape, drawing, log_axis
from stages.page.view import Figure, LegendEntry, table

_WIDTH, _HEIGHT = 860, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 14, 14, 40
_MARK = 3.2
_MODELS: tuple[tuple[str, Shape], ...] = (
    ("c1", "disc"),
    ("c2", "diamond"),
    ("c3", "square"),
    ("c4", "ring"),
    ("c5", "disc"),
    ("c6", "diamond"),
)
"""Colour and shape of each model; more models begin again."""


def position_figure(evaluation: Evaluation, name: str) -> Figure | None:
    """Mean and 99th percentile by position for every model but the base; None where they weren't measured."""
    rows = [row for row in evaluation.rows[1:] if row.positions and row.accuracy.mean_divergence > 0]
    if not rows:
        return None
    values = [value for row in rows for part in row.positions for value in (part.mean_divergence, part.divergence_99)]
    y = log_axis(values, _HEIGHT - _BOTTOM, _TOP)
    last = max(part.last for row in rows for part in row.positions)
    x = Axis(low=0, high=last + 1, start=_LEFT, end=_WIDTH - _RIGHT)
    picture = drawing(
        f"{name}-0", "KL by token position", f"{len(rows)} models, positions 1 to {last}.", _WIDTH, _HEIGHT
    )
    for value in y.ticks():
        picture.line(_LEFT, y(value), _WIDTH - _RIGHT, y(value), "grid")
        picture.text(_LEFT - 8, y(value) + 4, f"{value:g}", "tick", "end")
    picture.line(_LEFT, _HEIGHT - _BOTTOM, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM, "axis")
    for value in x.ticks():
        picture.text(x(value), _HEIGHT - _BOTTOM + 16, f"{value:g}", "tick", "middle")
    picture.text(_WIDTH - _RIGHT, _HEIGHT - 6, "position of the token in its window", "tick", "end")
    marks = [_MODELS[index % len(_MODELS)] for index in range(len(rows))]
    for row, (css, shape) in zip(rows, marks, strict=True):
        for series, dash in (("99th percentile", " dashed"), ("mean", "")):
            points = []
            for part in row.positions:
                value = part.mean_divergence if series == "mean" else part.divergence_99
                at = (x((part.first + part.last) / 2), y(max(value, y.low)))
                points.append(at)
                where = f"{row.name}, positions {part.first}-{part.last}"
                hint = Hint(text=f"{where}: {series} {value:.4g}", name=where, series=series, value=value)
                picture.mark(*at, _MARK if series == "mean" else _MARK * 0.6, shape, css, hint)
            picture.path(points, f"curve {css}{dash}")
    legend = [
        LegendEntry(text=f"{row.name}: mean (line), 99th percentile (dashed)", shape=shape, css=css)
        for row, (css, shape) in zip(rows, marks, strict=True)
    ]
    return Figure(
        name=name,
        heading="KL divergence by token position",
        text=f"KL(base || model) in nats for tokens at the same place of their window, over "
        f"{evaluation.comparison.windows} windows of {evaluation.comparison.seq_len} tokens; logarithmic.",
        drawings=(picture.markup(),),
        legend=tuple(legend),
        table=table(
            ("model", "positions", "tokens", "mean KL", "99th percentile"),
            [
                (
                    row.name,
                    f"{part.first}-{part.last}",
                    str(part.tokens),
                    f"{part.mean_divergence:.5f}",
                    f"{part.divergence_99:.4f}",
                )
                for row in rows
                for part in row.positions
            ],
            texts=2,
        ),
    )
