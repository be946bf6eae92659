"""What a page is made of: sections of figures, tables and short texts, ready to be written as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stages.report.svg import OUTLINES, Shape

UNKNOWN = "-"
"""What a table says of a number that isn't known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of a table."""

    heading: str
    is_number: bool = True
    wraps: bool = False
    """Whether it holds sentences, which are broken into lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableView:
    """Text in rows and columns."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def is_wide(self) -> bool:
        """Whether it takes all the width there is."""
        return any(column.wraps for column in self.columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class LegendEntry:
    """What a mark of this shape and colour stands for."""

    text: str
    shape: Shape
    css: str

    @property
    def outline(self) -> str:
        """Return the shape as path data."""
        return OUTLINES[self.shape]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One or more drawings with their numbers as a table."""

    name: str
    """Unique on the page."""
    heading: str
    text: str
    """What is drawn, and how to read it."""
    drawings: tuple[str, ...]
    """SVG elements."""
    legend: tuple[LegendEntry, ...]
    table: TableView
    small: bool = False
    """Whether the drawings stand beside each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A figure to see at once."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A heading with a table or tables and no drawing."""

    name: str
    heading: str
    text: str
    tables: tuple[TableView, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page."""

    name: str
    heading: str
    text: str = ""
    parts: tuple[Figure | Passage, ...] = ()


def table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int = 1, wraps: int | None = None
) -> TableView:
    """A table whose first ``texts`` columns hold text, that of index ``wraps`` sentences, and whose others numbers."""
    columns = tuple(
        Column(heading=heading, is_number=index >= texts, wraps=index == wraps)
        for index, heading in enumerate(headings)
    )
    return TableView(columns=columns, rows=tuple(tuple(row) for row in rows))


def number(value: float | None, form: str, unknown: str = UNKNOWN) -> str:
    """``value`` in ``form``, or a dash where it isn't known."""
    return unknown if value is None else format(value, form)


def percent(value: float | None) -> str:
    """A share as per cent with three significant digits."""
    return number(None if value is None else 100 * value, ".3g") + ("" if value is None else " %")


def megabytes(value: int | None) -> str:
    """Bytes in millions."""
    return number(None if value is None else value / 1e6, ",.1f")


def visible(text: str) -> str:
    """``text`` with line breaks and tabs as signs."""
    return text.replace("\r", "").replace("\n", "⏎").replace("\t", "⇥")
