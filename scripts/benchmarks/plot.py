"""Growth as a picture: an SVG of log-log lines, one panel an axis, readable on light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from scripts.benchmarks.figures import GrowthFigure

_WIDTH, _HEIGHT, _LEFT, _TOP, _SIDE = 900, 320, 60, 40, 220
_COLOURS = {"calibrate": "#0072b2", "search": "#d55e00"}
"""Distinct for colour-blind readers too (Okabe and Ito)."""
_INK = "#767676"
"""As readable on white as on black."""


def growth_plot(figures: Sequence[GrowthFigure]) -> str:
    """The SVG document."""
    seconds = [
        value
        for figure in figures
        for point in figure.points
        for value in (point.calibrate_seconds, point.search_seconds)
    ]
    scale = _Scale(min(seconds), max(seconds), _TOP + _SIDE, _TOP)
    panels = "".join(_panel(figure, _LEFT + index * (_SIDE + 60), scale) for index, figure in enumerate(figures))
    legend = "".join(
        f'<text x="{_LEFT + index * 120}" y="18" fill="{colour}">&#9679; {name}</text>'
        for index, (name, colour) in enumerate(_COLOURS.items())
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'font-family="sans-serif" font-size="12"><title>Seconds of both stages as sizes grow</title>'
        f"{legend}{panels}</svg>\n"
    )


class _Scale:
    """A logarithmic scale from numbers to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self._low, self._start = math.log(low), start
        self._per = (end - start) / max(math.log(high) - self._low, 1e-9)

    def __call__(self, value: float) -> float:
        return self._start + (math.log(value) - self._low) * self._per


def _panel(figure: GrowthFigure, left: float, seconds: _Scale) -> str:
    sizes = [point.size for point in figure.points]
    across = _Scale(min(sizes), max(sizes), left + 10, left + _SIDE - 10)
    bottom = _TOP + _SIDE
    middle = left + _SIDE / 2
    frame = (
        f'<rect x="{left}" y="{_TOP}" width="{_SIDE}" height="{_SIDE}" fill="none" stroke="{_INK}"/>'
        f'<text x="{middle}" y="{bottom + 36}" text-anchor="middle" fill="{_INK}">{escape(figure.axis)}</text>'
    )
    ticks = "".join(
        f'<text x="{across(size):.1f}" y="{bottom + 16}" text-anchor="middle" fill="{_INK}">{size}</text>'
        for size in sizes
    )
    lines = ""
    for name, colour in _COLOURS.items():
        values = [point.calibrate_seconds if name == "calibrate" else point.search_seconds for point in figure.points]
        places = [(across(size), seconds(value)) for size, value in zip(sizes, values, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        lines += f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
        for (x, y), value in zip(places, values, strict=True):
            lines += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"><title>{value:.2f} s</title></circle>'
            lines += f'<text x="{x:.1f}" y="{y - 7:.1f}" text-anchor="middle" fill="{colour}">{value:.1f}</text>'
    return frame + ticks + lines
