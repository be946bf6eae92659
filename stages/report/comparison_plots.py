"""Plot comparisons of models: size against loss in a sweep, and KL divergence by token position."""

from __future__ import annotations

from stages.evaluation.records import Evaluation
from stages.report.document import SweepPoint, SweepTable
from stages.report.svg import OUTLINES, Axis, Mark, axis_over, chart
from stages.report.view import Figure, LegendEntry, TableView, megabytes, number, percent, table


def sweep_figure(sweep: SweepTable, name: str) -> Figure | None:
    """Return the plot of size against loss for the points that have both; None where none has."""
    known = [(point, point.bytes / 1e6, point.loss) for point in sweep.points if point.bytes and point.loss]
    if not known:
        return None
    loss = "held-out layer loss" if sweep.text is None else "KL (nats)"
    front = ("curve c2", sorted((size, value) for point, size, value in known if point.on_front))
    marks = [
        Mark(
            x=size,
            y=value,
            hint=f"{point.name}: {megabytes(point.bytes)} MB, {value:.5g}",
            shape="diamond" if point.on_front else "ring",
            css="c2" if point.on_front else "c0",
            label=point.name if point.on_front else "",
        )
        for point, size, value in known
    ]
    x = axis_over("MB", [size for _, size, _ in known])
    y = axis_over(loss, [value for _, _, value in known], log=True)
    return Figure(
        name=name,
        heading="Size against loss",
        text="Smaller models are further left, better ones further down. The line joins the models that no other one "
        f"beats in size and {loss} at once; the loss has a logarithmic scale.",
        drawings=(chart(x, y, marks, [front]),),
        legend=(
            LegendEntry(text="nowhere beaten", shape="diamond", css="c2"),
            LegendEntry(text="beaten", shape="ring", css="c0"),
        ),
        table=_sweep_table(sweep),
    )


def position_figure(evaluation: Evaluation, name: str) -> Figure | None:
    """Return the plot of mean and 99th percentile by position for every model but the base; None without numbers."""
    rows = [row for row in evaluation.rows[1:] if row.positions and row.accuracy.mean_divergence > 0]
    if not rows:
        return None
    marks, lines, legend = [], [], []
    for index, row in enumerate(rows):
        css, shape = f"c{1 + index % 9}", list(OUTLINES)[index % len(OUTLINES)]
        legend.append(LegendEntry(text=f"{row.name}: mean (line), 99th percentile (dashed)", shape=shape, css=css))
        for series, dashes in (("mean", ""), ("99th percentile", " dashed")):
            points = []
            for part in row.positions:
                value = part.mean_divergence if series == "mean" else part.divergence_99
                points.append(((part.first + part.last) / 2, value))
                hint = f"{row.name}, positions {part.first}-{part.last}, {series}: {value:.4g}"
                marks.append(Mark(x=points[-1][0], y=value, hint=hint, shape=shape, css=css))
            lines.append((f"curve {css}{dashes}", points))
    last = max(part.last for row in rows for part in row.positions)
    x = Axis(title="position of the token in its window", low=0, high=last + 1, whole=True)
    comparison = evaluation.comparison
    return Figure(
        name=name,
        heading="KL divergence by token position",
        text="KL(base || model) in nats for tokens at the same position in their windows, over "
        f"{comparison.windows} windows of {comparison.seq_len} tokens; logarithmic.",
        drawings=(chart(x, axis_over("KL (nats)", [mark.y for mark in marks], log=True), marks, lines),),
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


def _sweep_table(sweep: SweepTable) -> TableView:
    scored = sweep.text is not None
    headings = ["", "model", "note", "search, s", "total, s", "peak MB", "bits a weight", "MB", "held-out loss"]
    headings += ["perplexity", "KL", "KL, 99th percentile", "same top-1"] if scored else []
    return table(headings, [_cells(point, scored=scored) for point in sweep.points], texts=3, wraps=2)


def _cells(point: SweepPoint, *, scored: bool) -> list[str]:
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
    if scored:
        cells += [
            number(None if accuracy is None else accuracy.perplexity, ".3f"),
            number(None if accuracy is None else accuracy.mean_divergence, ".5f"),
            number(None if accuracy is None else accuracy.divergence_99, ".4f"),
            percent(None if accuracy is None else accuracy.top1_agreement),
        ]
    return cells
