"""Describe a page: sections of figures and tables whose cells are text, ready for HTML or the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stages.report.svg import OUTLINES, Shape
from stages.report.values import Grade


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of a table."""

    heading: str
    is_number: bool = True
    wraps: bool = False
    """Whether it holds sentences, which wrap."""


@dataclass(frozen=True, slots=True)
class Graded:
    """A cell that says whether its number is good: on the page with a word and a colour."""

    text: str
    grade: Grade

    def __str__(self) -> str:
        return self.text


Cell = str | Graded


@dataclass(frozen=True, slots=True, kw_only=True)
class TableView:
    """A table of text."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def is_wide(self) -> bool:
        """Return whether it takes the whole width."""
        return any(column.wraps for column in self.columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class LegendEntry:
    """The meaning of a mark's shape and colour."""

    text: str
    shape: Shape
    css: str

    @property
    def outline(self) -> str:
        """Return the shape as path data."""
        return OUTLINES[self.shape]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """Drawings and tables under one heading."""

    name: str
    """Unique on the page."""
    heading: str
    text: str
    """What is shown, and how to read it."""
    drawings: tuple[str, ...] = ()
    """SVG elements."""
    legend: tuple[LegendEntry, ...] = ()
    tables: tuple[TableView, ...] = ()
    folded: TableView | None = None
    """Shown on request: every number of the drawings."""
    folded_name: str = "Numbers"
    small: bool = False
    """Whether the drawings are small ones, side by side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A number shown at the top of the page."""

    value: str
    label: str
    note: str = ""
    grade: Grade | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page with a heading of its own."""

    name: str
    heading: str
    parts: tuple[Figure, ...] = ()


def table(
    headings: Sequence[str], rows: Sequence[Sequence[Cell]], *, texts: int = 1, wraps: int | None = None
) -> TableView:
    """Return a table whose first columns hold text and whose others hold numbers.

    Args:
        headings: one a column.
        rows: cells.
        texts: how many columns hold text.
        wraps: index of the column that holds sentences; None where there is none.
    """
    columns = tuple(
        Column(heading=heading, is_number=index >= texts, wraps=index == wraps)
        for index, heading in enumerate(headings)
    )
    return TableView(columns=columns, rows=tuple(tuple(row) for row in rows))
