"""Drawings as SVG elements, and axes that put numbers into them. Colours are classes of the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree

Shape = Literal["disc", "ring", "diamond", "square"]
Anchor = Literal["start", "middle", "end"]
Number = int | float
"""A pixel, or what is drawn: both count in either way."""
_FEW_TICKS = 5
_STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Numbers from ``low`` to ``high`` on pixels from ``start`` to ``end``; logarithmic ones are above 0."""

    low: Number
    high: Number
    start: Number
    end: Number
    log: bool = False

    def __call__(self, value: Number) -> float:
        """Where ``value`` stands."""
        low, high, value = (map(math.log10, (self.low, self.high, value))) if self.log else (self.low, self.high, value)
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[Number]:
        """A few round numbers between the ends."""
        return _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)


def log_axis(values: Sequence[Number], start: Number, end: Number) -> Axis:
    """A logarithmic axis with room for ``values`` above 0."""
    known = [value for value in values if value > 0] or [1.0]
    return Axis(low=min(known) / 1.3, high=max(known) * 1.3, start=start, end=end, log=True)


def linear_axis(values: Sequence[Number], start: Number, end: Number, *, margin: Number = 0.05) -> Axis:
    """A linear axis with room for ``values`` and a ``margin``, a share of their range, on both sides."""
    low, high = min(values), max(values)
    room = (high - low) * margin or abs(high) * margin or 1.0
    return Axis(low=low - room, high=high + room, start=start, end=end)


def _linear_ticks(low: Number, high: Number) -> list[Number]:
    rough = (high - low) / _FEW_TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(step * unit for step in _STEPS if step * unit >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: Number, high: Number) -> list[Number]:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), tuple(range(1, 10))):
        found = [digit * 10.0**exponent for exponent in exponents for digit in digits]
        inside = [value for value in found if low <= value <= high]
        if len(inside) >= 3:
            return inside
    return inside


@dataclass(frozen=True, slots=True)
class Drawing:
    """An SVG element under construction; coordinates are those of its view box."""

    root: ElementTree.Element

    def add(
        self, tag: str, parent: ElementTree.Element | None = None, **attributes: str | int | float
    ) -> ElementTree.Element:
        """A child element; underscores in attribute names stand for hyphens, ``css`` for class."""
        named = {_attribute(name): _text(value) for name, value in attributes.items()}
        return ElementTree.SubElement(self.root if parent is None else parent, tag, named)

    def line(self, x1: Number, y1: Number, x2: Number, y2: Number, css: str) -> None:
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, css=css)

    def text(self, x: Number, y: Number, text: str, css: str, anchor: Anchor = "start") -> None:
        self.add("text", x=x, y=y, css=css, text_anchor=anchor).text = text

    def path(self, points: Sequence[tuple[Number, Number]], css: str) -> None:
        """A line through ``points``."""
        steps = " ".join(f"{_text(x)},{_text(y)}" for x, y in points)
        self.add("polyline", points=steps, css=css)

    def mark(self, x: Number, y: Number, size: Number, shape: Shape, css: str, hint: Hint) -> None:
        """A mark of about ``2 size`` across, with what it stands for."""
        element = self._shape(x, y, size, shape, css)
        element.attrib |= hint.attributes()
        ElementTree.SubElement(element, "title").text = hint.text

    def bar(self, x: Number, y: Number, width: Number, height: Number, css: str, hint: Hint) -> None:
        """A filled rectangle, with what it stands for."""
        element = self.add("rect", x=x, y=y, width=max(width, 0), height=height, css=css)
        element.attrib |= hint.attributes()
        ElementTree.SubElement(element, "title").text = hint.text

    def _shape(self, x: Number, y: Number, size: Number, shape: Shape, css: str) -> ElementTree.Element:
        match shape:
            case "disc":
                return self.add("circle", cx=x, cy=y, r=size, css=f"mark {css}")
            case "ring":
                return self.add("circle", cx=x, cy=y, r=size, css=f"mark hollow {css}")
            case "square":
                return self.add("rect", x=x - size, y=y - size, width=2 * size, height=2 * size, css=f"mark {css}")
            case "diamond":
                wide = 1.3 * size
                corners = ((x, y - wide), (x + wide, y), (x, y + wide), (x - wide, y))
                points = " ".join(f"{_text(a)},{_text(b)}" for a, b in corners)
                return self.add("polygon", points=points, css=f"mark {css}")

    def markup(self) -> str:
        """The element as text."""
        return ElementTree.tostring(self.root, encoding="unicode", short_empty_elements=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hint:
    """What a mark stands for: in words, shown under the pointer, and as the figures that it was drawn from."""

    text: str
    name: str
    series: str
    value: int | float | str

    def attributes(self) -> dict[str, str]:
        return {"data-name": self.name, "data-series": self.series, "data-value": str(self.value)}


def drawing(name: str, title: str, description: str, width: Number, height: Number) -> Drawing:
    """An empty drawing; ``name`` is unique on its page."""
    root = ElementTree.Element(
        "svg",
        {
            "viewBox": f"0 0 {_text(width)} {_text(height)}",
            "role": "img",
            "aria-labelledby": f"{name}-title {name}-desc",
        },
    )
    ElementTree.SubElement(root, "title", {"id": f"{name}-title"}).text = title
    ElementTree.SubElement(root, "desc", {"id": f"{name}-desc"}).text = description
    return Drawing(root)


def _attribute(name: str) -> str:
    return "class" if name == "css" else name.replace("_", "-")


def _text(value: str | int | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
