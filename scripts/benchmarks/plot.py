"""Growth as a picture: an SVG of its own with a panel for each axis, readable on light and dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from scripts.benchmarks.figures import GrowthFigure
from stages.report.render import STYLE_SHEET
from stages.report.svg import SMALL, Axis, Mark, axis_over, chart


def growth_plot(figures: Sequence[GrowthFigure]) -> str:
    """Return the SVG document: seconds of both stages over each size."""
    points = [point for figure in figures for point in figure.points]
    seconds = [value for point in points for value in (point.calibrate_seconds, point.search_seconds)]
    y = axis_over("seconds", seconds, log=True)
    width, height = SMALL
    panels = "".join(
        _panel(figure, y).replace("<svg ", f'<svg x="{width * index}" width="{width}" height="{height}" ', 1)
        for index, figure in enumerate(figures)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width * len(figures)} {height}">'
        f"<style>{STYLE_SHEET.read_text(encoding='utf-8')}</style>{panels}</svg>\n"
    )


def _panel(figure: GrowthFigure, y: Axis) -> str:
    marks, lines = [], []
    for stage, css in (("calibrate", "c1"), ("search", "c2")):
        values = [point.calibrate_seconds if stage == "calibrate" else point.search_seconds for point in figure.points]
        places = [(point.size, value) for point, value in zip(figure.points, values, strict=True)]
        lines.append((f"curve {css}", places))
        marks += [Mark(x=size, y=value, hint=f"{stage}, {size}: {value:.2f} s", css=css) for size, value in places]
        marks[-len(values)] = replace(marks[-len(values)], label=stage)
    return chart(axis_over(figure.axis, [mark.x for mark in marks], log=True), y, marks, lines, small=True)
