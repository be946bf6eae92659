"""What the bytes of the base model and of the quantized one are."""

from __future__ import annotations

from collections.abc import Sequence

from stages.page.svg import Axis, Hint, drawing
from stages.page.view import Figure, LegendEntry, megabytes, percent, table
from stages.size_breakdown import CATEGORIES, SizePart

_WIDTH, _HEIGHT, _LABEL_WIDTH, _BAR, _TOTAL_WIDTH = 860, 124, 84, 40, 96
_DIGIT, _MARGIN = 7.0, 12.0
"""Pixels of a digit, and of the room around a number."""
_COLOURS = dict(zip(CATEGORIES, ("s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9"), strict=True))


def size_figure(parts: Sequence[SizePart]) -> Figure | None:
    """Two bars of parts; None where nothing is known."""
    if not parts:
        return None
    totals = {"base": sum(part.before for part in parts), "quantized": sum(part.after for part in parts)}
    picture = drawing("sizes-0", "Sizes", "The base model's bytes above, the quantized model's below.", _WIDTH, _HEIGHT)
    x = Axis(low=0, high=max(totals.values()), start=_LABEL_WIDTH, end=_WIDTH - _TOTAL_WIDTH)
    for row, (model, total) in enumerate(totals.items()):
        top, reached = 8 + row * (_BAR + 16), 0
        picture.text(_LABEL_WIDTH - 10, top + _BAR / 2 + 4, model, "label", "end")
        for part in parts:
            size = part.before if model == "base" else part.after
            left, right = x(reached), x(reached + size)
            hint = Hint(text=f"{model}, {part.name}: {megabytes(size)} MB", name=part.name, series=model, value=size)
            css = _COLOURS[part.name]
            picture.bar(left, top, right - left, _BAR, f"part {css}", hint)
            label = megabytes(size)
            if right - left >= _DIGIT * len(label) + _MARGIN:
                picture.text((left + right) / 2, top + _BAR / 2 + 4, label, f"digit on-{css}", "middle")
            reached += size
        picture.text(x(reached) + 8, top + _BAR / 2 + 4, f"{megabytes(total)} MB", "label strong")
    rows = [
        (part.name, megabytes(part.before), megabytes(part.after), percent(part.after / totals["quantized"]))
        for part in parts
    ]
    rows.append(("all", megabytes(totals["base"]), megabytes(totals["quantized"]), ""))
    return Figure(
        name="sizes",
        heading="Size",
        text="Bytes of the .onnx file and its external data, in MB (millions of bytes).",
        drawings=(picture.markup(),),
        legend=tuple(LegendEntry(text=part.name, shape="square", css=_COLOURS[part.name]) for part in parts),
        table=table(("part", "base, MB", "quantized, MB", "share of it"), rows),
    )
