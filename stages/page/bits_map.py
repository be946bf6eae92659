"""A map of the model: a row for each kind of site, a column for each layer, coloured by the format of the weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from stages.page.document import KeptSite, QuantizedSite
from stages.page.svg import Drawing, Hint, drawing
from stages.page.view import Figure, LegendEntry, table
from stages.site_names import short_name

KEPT = "as it was"
_LABEL_WIDTH, _MARGIN, _ROW, _HEAD = 150, 8, 26, 22
_WIDEST, _NARROWEST, _ALL_CELLS = 26.0, 7.0, 640.0
_READABLE = 14.0
"""Width of a cell that holds a digit."""
_CLASSES = {4: ("b4a", "b4b", "b4c"), 8: ("b8a", "b8b", "b8c")}
"""Colours of the formats of as many bits, the commonest first."""
_KEPT_CLASS = "b16"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cell:
    name: str
    layer: int | None
    kind: str
    format: str


def bits_figure(sites: Sequence[QuantizedSite], kept: Sequence[KeptSite]) -> Figure | None:
    """Every site's format; None where there is no site."""
    cells = [
        *(_Cell(name=one.report.site, layer=one.layer, kind=one.kind, format=one.report.format) for one in sites),
        *(_Cell(name=one.site, layer=one.layer, kind=one.kind, format=KEPT) for one in kept),
    ]
    if not cells:
        return None
    classes = _classes(cells)
    return Figure(
        name="bits",
        heading="Bits map",
        text="One cell a weight: 4b32 is INT4 with a scale for every 32 inputs, 8ch INT8 with one for each output "
        "channel; the digit is the number of bits, a dot what stays as it was.",
        drawings=(_map(cells, classes).markup(),),
        legend=tuple(LegendEntry(text=form, shape="square", css=css) for form, css in classes.items()),
        table=table(
            ("site", "format", "why it stays"),
            [
                *((short_name(one.report.site), one.report.format, "") for one in sites),
                *((short_name(one.site), KEPT, one.reason) for one in kept),
            ],
            texts=3,
            wraps=2,
        ),
    )


def _classes(cells: Sequence[_Cell]) -> dict[str, str]:
    """Colour of each format, INT4 first; more formats of as many bits than there are colours share the last one."""
    counted = [form for form, _ in Counter(cell.format for cell in cells).most_common()]
    classes: dict[str, str] = {}
    for bits, names in _CLASSES.items():
        for index, form in enumerate(form for form in counted if form.startswith(str(bits))):
            classes[form] = names[min(index, len(names) - 1)]
    return classes | ({KEPT: _KEPT_CLASS} if KEPT in counted else {})


def _map(cells: Sequence[_Cell], classes: dict[str, str]) -> Drawing:
    rows = list(dict.fromkeys(cell.kind for cell in cells if cell.layer is not None))
    rows += list(dict.fromkeys(cell.kind for cell in cells if cell.layer is None))
    layers = 1 + max((cell.layer for cell in cells if cell.layer is not None), default=0)
    width = min(_WIDEST, max(_NARROWEST, _ALL_CELLS / layers))
    picture = drawing(
        "bits-0",
        "Bits map",
        f"{len(rows)} kinds of weights in {layers} layers.",
        _LABEL_WIDTH + layers * width + _MARGIN,
        _HEAD + len(rows) * _ROW + _MARGIN,
    )
    for layer in range(layers):
        if layer % max(1, round(40 / width)) == 0:
            picture.text(_LABEL_WIDTH + (layer + 0.5) * width, _HEAD - 8, str(layer), "tick", "middle")
    picture.text(_LABEL_WIDTH - 8, _HEAD - 8, "layer", "tick", "end")
    for index, row in enumerate(rows):
        picture.text(_LABEL_WIDTH - 8, _HEAD + (index + 0.5) * _ROW + 4, row, "label", "end")
    for cell in cells:
        x, y = _LABEL_WIDTH + (cell.layer or 0) * width, _HEAD + rows.index(cell.kind) * _ROW
        name, css = short_name(cell.name), classes[cell.format]
        hint = Hint(text=f"{name}: {cell.format}", name=name, series="format", value=cell.format)
        picture.bar(x + 1, y + 1, width - 2, _ROW - 2, f"cell {css}", hint)
        if width >= _READABLE:
            digit = "·" if cell.format == KEPT else cell.format[0]
            picture.text(x + width / 2, y + _ROW / 2 + 4, digit, f"digit on-{css}", "middle")
    return picture
