"""Plot the whole model: its bytes by kind, and the format of every weight."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from stages.model.sizes import CATEGORIES, SizePart
from stages.records.sites import short_name
from stages.report.document import KeptSite, QuantizedSite
from stages.report.svg import Axis, Part, bars
from stages.report.view import Figure, LegendEntry, megabytes, percent, table

_KEPT = "not quantized"


def size_figure(parts: Sequence[SizePart]) -> Figure | None:
    """Return the bars of the base's and the quantized model's bytes by kind; None where they aren't known."""
    if not parts:
        return None
    colours = {part.name: f"part c{1 + CATEGORIES.index(part.name)}" for part in parts}
    before, after = sum(part.before for part in parts), sum(part.after for part in parts)
    rows = []
    for model, sizes in (("base", [part.before for part in parts]), ("quantized", [part.after for part in parts])):
        ends = [size / 1e6 for size in accumulate(sizes, initial=0)]
        stretches = [
            Part(
                start=start,
                end=end,
                hint=f"{model}, {part.name}: {megabytes(size)} MB",
                css=colours[part.name],
                text=megabytes(size),
            )
            for part, size, (start, end) in zip(parts, sizes, pairwise(ends), strict=True)
        ]
        rows.append((f"{model}, {megabytes(sum(sizes))} MB", stretches))
    lines = [
        (part.name, megabytes(part.before), megabytes(part.after), percent(part.after / after if after else 0))
        for part in parts
    ]
    return Figure(
        name="sizes",
        heading="Size",
        text="Bytes of the .onnx file and its external data, in MB (millions of bytes).",
        drawings=(bars("Size of both models", Axis(title="MB", low=0, high=max(before, after) / 1e6), rows),),
        legend=tuple(LegendEntry(text=name, shape="square", css=css) for name, css in colours.items()),
        table=table(
            ("part", "base, MB", "quantized, MB", "share"),
            [*lines, ("all", megabytes(before), megabytes(after), "")],
        ),
    )


def bits_figure(sites: Sequence[QuantizedSite], kept: Sequence[KeptSite]) -> Figure | None:
    """Return the map of formats, a row a kind of site and a column a layer; None where all formats are the same."""
    formats = sorted({site.report.format for site in sites})
    if len(formats) < 2:
        return None
    cells = [(site.report.site, site.layer, site.kind, site.report.format) for site in sites]
    cells += [(site.site, site.layer, site.kind, _KEPT) for site in kept]
    colours = {form: f"part c{1 + index % 9}" for index, form in enumerate(formats)}
    if kept:
        colours[_KEPT] = "part c0"
    x = Axis(title="layer", low=-0.5, high=max(layer or 0 for _, layer, _, _ in cells) + 0.5, whole=True)
    rows: dict[str, list[Part]] = {}
    # What lies outside the layers comes last and fills its row.
    for site, layer, kind, form in sorted(cells, key=lambda cell: cell[1] is None):
        start, end = (x.low, x.high) if layer is None else (layer - 0.5, layer + 0.5)
        text = "" if form == _KEPT else form[0]
        part = Part(start=start, end=end, hint=f"{short_name(site)}: {form}", css=colours[form], text=text)
        rows.setdefault(kind, []).append(part)
    return Figure(
        name="bits",
        heading="Bits map",
        text="4b32 is INT4 with a scale for every 32 inputs, 8ch INT8 with one for each output channel; the digit is "
        "the number of bits.",
        drawings=(bars("Format of every weight by layer", x, list(rows.items())),),
        legend=tuple(LegendEntry(text=form, shape="square", css=css) for form, css in colours.items()),
        table=table(("site", "format"), [(short_name(site), form) for site, _, _, form in cells], texts=2),
    )
