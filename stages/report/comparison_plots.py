"""Plot comparisons of models: size against loss in a sweep, and KL divergence by token position."""

from __future__ import annotations

from stages.evaluation.accuracy import Accuracy
from stages.evaluation.records import Evaluation, ModelRow
from stages.records.quantities import counted
from stages.report.document import SweepPoint, SweepTable
from stages.report.svg import OUTLINES, Axis, Mark, axis_over, chart
from stages.report.values import (
    UNKNOWN,
    grade_divergence,
    grade_perplexity,
    grade_top1,
    megabytes,
    number,
    percent,
    text_name,
)
from stages.report.view import Cell, Figure, Graded, LegendEntry, TableView, table

_NAMED = 12
"""Points at most that all carry their names."""


def sweep_figure(sweep: SweepTable, name: str) -> Figure:
    """Return the plot of size against loss, for the points that have both, and the table of all."""
    known = [(point, point.bytes / 1e6, point.loss) for point in sweep.points if point.bytes and point.loss]
    loss = "held-out layer loss" if sweep.text is None else "KL (nats)"
    front = ("curve c2", sorted((size, value) for point, size, value in known if point.on_front))
    marks = [
        Mark(
            x=size,
            y=value,
            hint=f"{point.name}: {megabytes(point.bytes)} MB, {value:.5g}",
            shape="diamond" if point.on_front else "ring",
            css="c2" if point.on_front else "c0",
            label=point.name if point.on_front or len(known) <= _NAMED else "",
        )
        for point, size, value in known
    ]
    x = axis_over("size (MB)", [size for _, size, _ in known] or [0])
    y = axis_over(loss, [value for _, _, value in known], log=True)
    what = f"{loss} on {text_name(sweep.text)}" if sweep.text else "held-out layer loss, no text"
    return Figure(
        name=name,
        heading=f"Size against {what}",
        text="Smaller models are further left, better ones further down (the scale is logarithmic). The line joins the "
        f"models that no other one beats in size and {loss} at once; * in the table. Total and peak are of the whole "
        "process; held-out loss is the mean error of the MatMuls' outputs on text that the search didn't see.",
        drawings=(chart(what, x, y, marks, [front]),) if known else (),
        legend=(
            LegendEntry(text="nowhere beaten", shape="diamond", css="c2"),
            LegendEntry(text="beaten", shape="ring", css="c0"),
        )
        if known
        else (),
        tables=(_sweep_table(sweep),),
        folded=table(("model", "command"), [(point.name, point.command) for point in sweep.points], texts=2, wraps=1),
        folded_name="Commands",
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
    comparison, text = evaluation.comparison, text_name(evaluation.comparison.text)
    y = axis_over("KL (nats)", [mark.y for mark in marks], log=True)
    return Figure(
        name=name,
        heading=f"KL divergence by token position on {text}",
        text="KL(base || model) in nats for tokens at the same position in their windows, over "
        f"{counted(comparison.windows, 'window')} of {comparison.seq_len} tokens; lower is better, and the scale is "
        "logarithmic. "
        "A line that rises means that errors add up over long texts.",
        drawings=(chart(text, x, y, marks, lines),),
        legend=tuple(legend),
        folded=table(
            ("model", "positions", "tokens", "mean KL (nats)", "99th percentile (nats)"),
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
    """Return a row for the base and each model, without the columns that are empty in all of them."""
    rows = [_columns(point, sweep.base) for point in sweep.points]
    if sweep.base is not None:
        known: dict[str, Cell] = {
            "": "",
            "model": sweep.base.name,
            "perplexity": f"{sweep.base.accuracy.perplexity:.3f}",
            "MB": megabytes(sweep.base.bytes),
            "note": "the base",
        }
        rows = [{heading: known.get(heading, UNKNOWN) for heading in rows[0]}, *rows]
    shown = [heading for heading in rows[0] if any(row[heading] not in (UNKNOWN, "") for row in rows)]
    return table(shown, [[row[heading] for heading in shown] for row in rows], texts=1 + ("" in shown))


def _columns(point: SweepPoint, base: ModelRow | None) -> dict[str, Cell]:
    """Return the cells of a row by heading."""
    return {
        "": "*" if point.on_front else "",
        "model": point.name,
        **_accuracy(point.accuracy, base),
        "MB": megabytes(point.bytes),
        "of the base": percent(point.bytes / base.bytes) if base is not None and point.bytes else UNKNOWN,
        "bits a weight": number(point.bits_per_weight, ".3f"),
        "held-out loss": percent(point.held_out_loss),
        "search, s": number(point.search_seconds, ".1f"),
        "total, s": number(point.total_seconds, ".1f"),
        "peak, MB": number(None if point.peak_bytes is None else point.peak_bytes / 1e6, ".0f"),
        "note": point.note,
    }


def _accuracy(accuracy: Accuracy | None, base: ModelRow | None) -> dict[str, Cell]:
    if accuracy is None:
        return dict.fromkeys(("KL (nats)", "KL, 99th percentile", "same top-1", "perplexity"), UNKNOWN)
    perplexity = f"{accuracy.perplexity:.3f}"
    return {
        "KL (nats)": Graded(f"{accuracy.mean_divergence:.5f}", grade_divergence(accuracy)),
        "KL, 99th percentile": number(accuracy.divergence_99, ".4f"),
        "same top-1": Graded(percent(accuracy.top1_agreement), grade_top1(accuracy)),
        "perplexity": perplexity if base is None else Graded(perplexity, grade_perplexity(accuracy, base.accuracy)),
    }
