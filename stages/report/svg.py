"""Draw SVG charts: marks and lines over two axes, and stacked bars. Colours are classes of page.css."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree

from stages.report.values import percent

Shape = Literal["disc", "ring", "diamond", "square"]
Number = int | float
"""A pixel, or a value that is drawn."""
Line = tuple[str, Sequence[tuple[Number, Number]]]
"""CSS classes of a line, and the values of the points that it goes through."""

_DISC = "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z"
OUTLINES: dict[Shape, str] = {
    "disc": _DISC,
    "ring": _DISC,
    "diamond": "M0,-5.5L5.5,0L0,5.5L-5.5,0Z",
    "square": "M-4,-4H4V4H-4Z",
}
"""Path data of each shape around (0, 0)."""

SMALL, _LARGE = (360, 230), (520, 310)
"""Width and height of a small chart and of a large one: letters stay legible where either is scaled to 430 pixels."""
_TITLE, _RIGHT, _TOP, _BOTTOM = 26, 14, 26, 40
"""Margins; the labels of the vertical axis come on top of the left one."""
_BARS, _ROW = 400, 30
"""Length of the longest bar, and height of a bar with its gap."""
_LETTER, _LINE = 6.6, 15.0
"""Width of a letter and height of a line of text."""
_FEW_TICKS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A scale from ``low`` to ``high``, both above 0 where it is logarithmic.

    Args:
        title: the quantity, with its unit.
        whole: whether only whole numbers are ticks.
        shares: whether its values are shares, ticked as per cent.
    """

    title: str
    low: Number
    high: Number
    log: bool = False
    whole: bool = False
    shares: bool = False

    def share(self, value: Number) -> float:
        """Return the place of ``value``: 0 at the low end, 1 at the high one. A logarithmic axis puts zero at 0."""
        if not self.log:
            return (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)

    def ticks(self) -> list[tuple[Number, str]]:
        """Return a few round numbers between the ends, with their labels."""
        values = (_log_ticks if self.log else _linear_ticks)(self.low, self.high)
        if self.whole:
            values = [value for value in values if value == int(value)]
        return [(value, percent(value) if self.shares else f"{value:,.6g}") for value in values]


def axis_over(title: str, values: Sequence[Number], *, log: bool = False, shares: bool = False) -> Axis:
    """Return an axis with room for ``values`` and a margin at both ends; a logarithmic one leaves out zeros.

    Args:
        title: the quantity, with its unit.
        values: what it must hold.
        log: whether it is logarithmic.
        shares: whether its values are shares, ticked as per cent.
    """
    if log:
        values = [value for value in values if value > 0] or [1.0]
        return Axis(title=title, low=min(values) / 1.3, high=max(values) * 1.3, log=True, shares=shares)
    low, high = min(values), max(values)
    margin = 0.05 * ((high - low) or abs(high) or 20.0)
    return Axis(title=title, low=low - margin, high=high + margin, shares=shares)


def _linear_ticks(low: Number, high: Number) -> list[Number]:
    rough = (high - low) / _FEW_TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(step * unit for step in (1, 2, 5, 10) if step * unit >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def _log_ticks(low: Number, high: Number) -> list[Number]:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 3, 5, 7), tuple(range(1, 10))):
        found = [float(f"{digit}e{exponent}") for exponent in exponents for digit in digits]
        inside: list[Number] = [value for value in found if low <= value <= high]
        if len(inside) >= 3:
            return inside
    return _linear_ticks(low, high)  # over so short an axis nearly even


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A point of a chart; ``hint`` is shown while the pointer is on it, ``label`` always."""

    x: Number
    y: Number
    hint: str
    shape: Shape = "disc"
    css: str = "c1"
    label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of a stacked bar; ``text`` is written on it where it fits."""

    start: Number
    end: Number
    hint: str
    css: str
    text: str = ""


def chart(heading: str, x: Axis, y: Axis, marks: Sequence[Mark], lines: Sequence[Line], *, small: bool = False) -> str:
    """Return a drawing of marks and lines.

    Args:
        heading: what stands above it.
        x: the horizontal axis.
        y: the vertical axis.
        marks: points, drawn above the lines.
        lines: lines through values.
        small: whether it is one of several, side by side.
    """
    width, height = SMALL if small else _LARGE
    title = f"{heading}: {y.title} by {x.title}, {len(marks)} values"
    left = _TITLE + _LETTER * max(len(written) for _, written in y.ticks())
    plot = _Plot(_svg(title, width, height), x, y, left, width, _TOP, height)
    plot.text(0, 14, heading, "heading")
    for value, written in y.ticks():
        plot.line(plot.down(value), "grid")
        plot.text(left - 6, plot.down(value) + 4, written, "tick end")
    middle = (_TOP + height - _BOTTOM) / 2
    plot.text(12, middle, y.title, "tick middle", transform=f"rotate(-90 12 {middle:.2f})")
    plot.draw_axis()
    for css, points in lines:
        at = " ".join(f"{plot.across(a):.2f},{plot.down(b):.2f}" for a, b in points)
        plot.add("polyline", css, points=at)
    for mark in marks:
        place = f"translate({plot.across(mark.x):.2f} {plot.down(mark.y):.2f})"
        plot.add("path", f"mark {mark.shape} {mark.css}", mark.hint, d=OUTLINES[mark.shape], transform=place)
    plot.write_labels([mark for mark in sorted(marks, key=lambda mark: mark.y) if mark.label])
    return plot.markup()


def bars(title: str, x: Axis, rows: Sequence[tuple[str, Sequence[Part]]]) -> str:
    """Return a drawing of stacked bars.

    Args:
        title: what a screen reader says.
        x: the axis of all bars.
        rows: (label, parts) of each bar.
    """
    left = 12 + _LETTER * max(len(label) for label, _ in rows)
    width, height = left + _BARS + _RIGHT, len(rows) * _ROW + _BOTTOM
    plot = _Plot(_svg(title, width, height), x, x, left, width, 0, height)
    for index, (label, parts) in enumerate(rows):
        top = index * _ROW + 3
        plot.text(left - 10, top + 16, label, "end")
        for part in parts:
            start, size = plot.across(part.start), plot.across(part.end) - plot.across(part.start)
            box = {"x": f"{start:.2f}", "y": f"{top}", "width": f"{size:.2f}", "height": f"{_ROW - 6}"}
            plot.add("rect", f"part {part.css}", part.hint, **box)
            if part.text and size >= _LETTER * len(part.text) + 4:
                plot.text(start + size / 2, top + 16, part.text, "middle")
    plot.draw_axis()
    return plot.markup()


def _svg(title: str, width: Number, height: Number) -> ElementTree.Element:
    attributes = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {width:g} {height:g}"}
    return ElementTree.Element("svg", {**attributes, "role": "img", "aria-label": title})


@dataclass(frozen=True, slots=True)
class _Plot:
    """An SVG element under construction, with two axes and the margins around them."""

    root: ElementTree.Element
    x: Axis
    y: Axis
    left: Number
    width: Number
    top: Number
    height: Number

    def across(self, value: Number) -> float:
        return self.left + self.x.share(value) * (self.width - _RIGHT - self.left)

    def down(self, value: Number) -> float:
        bottom = self.height - _BOTTOM
        return bottom - self.y.share(value) * (bottom - self.top)

    def add(self, tag: str, css: str, hint: str = "", **attributes: str) -> ElementTree.Element:
        element = ElementTree.SubElement(self.root, tag, {"class": css, **attributes})
        if hint:
            ElementTree.SubElement(element, "title").text = hint
        return element

    def line(self, y: Number, css: str) -> None:
        self.add("line", css, x1=f"{self.left}", y1=f"{y:.2f}", x2=f"{self.width - _RIGHT}", y2=f"{y:.2f}")

    def text(self, x: Number, y: Number, text: str, css: str, **attributes: str) -> None:
        self.add("text", css, x=f"{x:.2f}", y=f"{y:.2f}", **attributes).text = text

    def draw_axis(self) -> None:
        """Draw the lower edge with the ticks and the title of the horizontal axis."""
        bottom = self.height - _BOTTOM
        self.line(bottom, "axis")
        for value, written in self.x.ticks():
            self.text(self.across(value), bottom + 16, written, "tick middle")
        self.text((self.left + self.width - _RIGHT) / 2, bottom + 34, self.x.title, "tick middle")

    def write_labels(self, marks: Sequence[Mark]) -> None:
        """Write labels beside their marks, moved up where they would overlap."""
        taken: list[tuple[float, float, float]] = []
        for mark in marks:
            x, y, width = self.across(mark.x), self.down(mark.y) + 4, _LETTER * len(mark.label)
            to_the_left = x + 8 + width > self.width - _RIGHT
            start = x - 8 - width if to_the_left else x + 8
            while any(abs(y - line) < _LINE and start < end and begin < start + width for begin, end, line in taken):
                y -= _LINE
            taken.append((start, start + width, y))
            self.text(x - 8 if to_the_left else x + 8, y, mark.label, "halo end" if to_the_left else "halo")

    def markup(self) -> str:
        return ElementTree.tostring(self.root, encoding="unicode", short_empty_elements=False)
