"""Plot the whole model: its bytes by kind, and the format of every weight of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from stages.model.sizes import CATEGORIES, SizePart
from stages.records.sites import short_name
from stages.report.document import KeptSite, QuantizedSite
from stages.report.svg import Axis, Part, bars
from stages.report.values import format_in_words, megabytes, percent
from stages.report.view import Figure, LegendEntry, table

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
        text="Bytes of the .onnx file and its external data, in MB (millions of bytes). INT4 codes take half a byte a "
        "weight; scales and zero points come on top.",
        drawings=(bars("Size of both models", Axis(title="MB", low=0, high=max(before, after) / 1e6), rows),),
        legend=tuple(LegendEntry(text=name, shape="square", css=css) for name, css in colours.items()),
        folded=table(
            ("part", "base, MB", "quantized, MB", "share of the quantized"),
            [*lines, ("all", megabytes(before), megabytes(after), "")],
        ),
    )


def bits_figure(sites: Sequence[QuantizedSite], kept: Sequence[KeptSite]) -> Figure | None:
    """Return the map of formats in the layers, a row a kind of site; None where all of them are the same."""
    cells = [(site.report.site, site.layer, site.kind, site.report.format) for site in sites if site.layer is not None]
    cells += [(site.site, site.layer, site.kind, _KEPT) for site in kept if site.layer is not None]
    formats = sorted({form for *_, form in cells}, key=lambda form: (form == _KEPT, form))
    if len(formats) < 2:
        return None
    colours = {form: "part c0" if form == _KEPT else f"part c{1 + index % 9}" for index, form in enumerate(formats)}
    x = Axis(title="layer", low=-0.5, high=max(layer for _, layer, *_ in cells) + 0.5, whole=True)
    rows: dict[str, list[Part]] = {}
    for site, layer, kind, form in cells:
        text = "" if form == _KEPT else form[0]
        hint = f"{short_name(site)}: {form}"
        part = Part(start=layer - 0.5, end=layer + 0.5, hint=hint, css=colours[form], text=text)
        rows.setdefault(kind, []).append(part)
    words = {site.report.format: site.stored or format_in_words(site.report.format) for site in sites}
    return Figure(
        name="bits",
        heading="Bits map",
        text="The format of every MatMul's weight, layer by layer; the digit is the number of bits.",
        drawings=(bars("Format of every weight by layer", x, list(rows.items())),),
        legend=tuple(
            LegendEntry(text=f"{form}: {words[form]}" if form in words else form, shape="square", css=css)
            for form, css in colours.items()
        ),
    )
