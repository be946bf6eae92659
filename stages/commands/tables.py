"""Lay out tables for any width so that nothing is cut: no digit is lost and no word is broken while there is room.

Where a table is too wide, headings and sentences wrap first. Then columns leave the table, in the order that the
table states, and their values stand in a line of their own below each row, ``heading: value; heading: value``, or
below the table where all rows have the same.
Columns without a value are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.text import Text

_GAP = 2
"""Spaces between two columns."""
_INDENT = "    "
_LEAST_TEXT = 16
"""Columns below which no text is wrapped that is longer."""
_LEAST_SENTENCE = 30
_LEAST_NAME = 24
"""Columns below which no name in the first column is wrapped that is longer."""
_LONGEST_PART = 36
"""Columns up to which a column of text is as wide as its longest part that can't be broken."""
_FACT_NAME = 22
"""Columns that the name of a fact may take."""
_UNKNOWN = ("", "-")
_BREAK = re.compile(r"[/_](?=.)|[-.,:=](?=[^\d\s])")
"""Behind what a word may be broken that is longer than the line: never inside a number."""
_GLUED = re.compile(r"(?<=\d) (?=(?:%|→|MB\b|GB\b|s\b))|(?<=→) (?=\d)")
"""Spaces at which no line ends: those before a unit."""
_NO_BREAK = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of a table."""

    heading: str
    is_number: bool = False
    """Whether it stands at the right and is never wrapped."""
    wraps: bool = False
    """Whether it holds sentences, which need more room than names."""
    leaves: int | None = None
    """Where it leaves a table that is too wide, the lowest number first. None: behind those that have one, text before
    numbers, the last column first. The first column always stays."""

    def least(self, cells: Sequence[str]) -> int:
        """Return the fewest columns of the terminal that it can have."""
        words = max((cell_len(word) for word in self.heading.split()), default=0)
        widest = _widest(cells)
        if self.is_number:
            return max(words, widest)
        whole = max((cell_len(part) for cell in cells for part in _BREAK.sub(r"\g<0> ", cell).split()), default=0)
        enough = _LEAST_SENTENCE if self.wraps else _LEAST_TEXT
        return max(words, min(widest, max(enough, min(whole, _LONGEST_PART))))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    """A column that stands in the table."""

    index: int
    column: Column
    width: int

    def lines(self, text: str) -> list[str]:
        """Return ``text`` in lines of exactly this column's width."""
        return [_padded(line, self.width, right=self.column.is_number) for line in wrapped(text, self.width)]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataTable:
    """Rows of cells under headings."""

    title: str = ""
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    """An empty row draws a line."""
    notes: tuple[str, ...] = ()
    """Lines below the table: legends and counts."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Yield the lines for the console's width."""
        yield from self.lines(options.max_width)

    def lines(self, width: int) -> Iterator[Text]:
        """Yield the table's lines, none of them longer than ``width`` columns of a terminal."""
        shown, below = self._layout(width)
        alike = [index for index in below if len(self._cells[0]) > 1 and len(set(self._cells[index])) == 1]
        yield from _titled(self.title, width)
        rule = _line("─" * max(_total([each.width for each in shown]), 1))
        for line in _side_by_side(shown, [each.column.heading for each in shown]):
            yield _line(line, "bold")
        yield rule
        for row in self.rows:
            if not row:
                yield rule
                continue
            yield from map(_line, _side_by_side(shown, [row[each.index] for each in shown]))
            items = self._items(row, [index for index in below if index not in alike])
            yield from (_line(f"{_INDENT}{line}") for line in _filled(items, width - len(_INDENT)))
        if alike:
            yield from map(_line, _filled([f"In all rows {'; '.join(self._items(self.rows[0], alike))}"], width))
        for note in self.notes:
            yield from map(_line, wrapped(note, width))
        yield _line("")

    def _items(self, row: Sequence[str], columns: Sequence[int]) -> list[str]:
        return [f"{self.columns[index].heading}: {row[index]}" for index in columns if row[index] not in _UNKNOWN]

    def as_markdown(self) -> str:
        """Return the table without its title in Markdown."""
        kept = self._with_values()
        lines = [
            [self.columns[index].heading for index in kept],
            ["--:" if self.columns[index].is_number else "---" for index in kept],
            *([row[index] for index in kept] for row in self.rows if row),
        ]
        cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines]
        return "".join(f"| {' | '.join(line)} |\n" for line in cells)

    def _with_values(self) -> list[int]:
        """Return the columns that hold a value, the first one in any case."""
        cells = self._cells
        return [index for index in range(len(self.columns)) if not index or set(cells[index]) - set(_UNKNOWN)]

    @property
    def _cells(self) -> list[list[str]]:
        return [[row[index] for row in self.rows if row] for index in range(len(self.columns))]

    def _layout(self, width: int) -> tuple[list[_Shown], list[int]]:
        """Return the columns that fit into ``width`` with their widths, and those whose values go below the rows."""
        kept, cells, below = self._with_values(), self._cells, list[int]()
        least = {index: self.columns[index].least(cells[index]) for index in kept}
        least[0] = max(least[0], min(_widest(cells[0]), _LEAST_NAME))
        leaving = sorted(kept[1:], key=self._leaves)
        while leaving and _total([least[index] for index in kept]) > width:
            below.append(leaving.pop(0))
            kept.remove(below[-1])
        widths = {index: min(least[index], width) for index in kept}
        for wanted in ([_widest(column) for column in cells], [cell_len(column.heading) for column in self.columns]):
            _widen(widths, wanted, width)
        shown = [_Shown(index=index, column=self.columns[index], width=widths[index]) for index in kept]
        return shown, sorted(below)

    def _leaves(self, index: int) -> tuple[int, bool, int]:
        column = self.columns[index]
        return (len(self.columns) if column.leaves is None else column.leaves, column.is_number, -index)


@dataclass(frozen=True, slots=True, kw_only=True)
class FactTable:
    """Facts, each with its name; the name stands once where several facts in a row share it."""

    title: str = ""
    facts: tuple[tuple[str, str], ...] = field(default=())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Yield the lines for the console's width."""
        yield from self.lines(options.max_width)

    def lines(self, width: int) -> Iterator[Text]:
        """Yield the table's lines, none of them longer than ``width`` columns of a terminal."""
        yield from _titled(self.title, width)
        names = min(_widest([name for name, _ in self.facts]), _FACT_NAME, max(width // 3, 1))
        before = ""
        for name, text in self.facts:
            left = [""] if name == before else wrapped(name, names)
            right = wrapped(text, max(width - names - _GAP, 1))
            for index in range(max(len(left), len(right))):
                line = Text(_padded(left[index] if index < len(left) else "", names), style="bold", no_wrap=True)
                line.append(f"{' ' * _GAP}{right[index] if index < len(right) else ''}", style="not bold")
                line.rstrip()
                yield line
            before = name
        yield _line("")


def wrapped(text: str, width: int) -> list[str]:
    """Return ``text`` in lines of at most ``width`` columns, broken at spaces, or in a long path behind a separator."""
    lines: list[str] = []
    for paragraph in _GLUED.sub(_NO_BREAK, text).splitlines() or [""]:
        line = ""
        for word in paragraph.split(" "):
            joined = f"{line} {word}" if line else word
            if cell_len(joined) <= width:
                line = joined
                continue
            start = f"{line} " if line else ""
            if cell_len(word) > width and _last_break(word, width - cell_len(start)):
                word = joined  # a path fills the line that it begins in
            elif line:
                lines.append(line)
            *whole, line = _broken(word, width)
            lines += whole
        lines.append(line)
    return [line.replace(_NO_BREAK, " ") for line in lines]


def _broken(word: str, width: int) -> Iterator[str]:
    """Yield ``word`` in parts that fit."""
    while cell_len(word) > width:
        end = _last_break(word, width) or _fitting(word, width)
        yield word[:end]
        word = word[end:]
    yield word


def _fitting(word: str, width: int) -> int:
    """Return how many characters fit into ``width`` columns, one at least."""
    return next(end for end in range(len(word), 0, -1) if end == 1 or cell_len(word[:end]) <= width)


def _last_break(word: str, width: int) -> int:
    """Return where to break ``word`` so that it fits: behind a slash, or another separator; 0: nowhere."""
    if width < 1:
        return 0
    ends = [found.end() for found in _BREAK.finditer(word) if found.end() <= _fitting(word, width)]
    slashes = [end for end in ends if word[end - 1] == "/" and 2 * end > ends[-1]]
    return (slashes or ends or [0])[-1]


def _filled(items: Sequence[str], width: int) -> list[str]:
    """Return the items separated by semicolons, each in one line while it fits."""
    glued = [item if cell_len(item) >= width else item.replace(" ", _NO_BREAK) for item in _in_one_line(items)]
    return wrapped("; ".join(glued), width) if items else []


def _in_one_line(items: Sequence[str]) -> Iterator[str]:
    yield from (", ".join(item.splitlines()) for item in items)


def _side_by_side(shown: Sequence[_Shown], cells: Sequence[str]) -> Iterator[str]:
    """Yield the lines of one row."""
    parts = [each.lines(cell) for each, cell in zip(shown, cells, strict=True)]
    for number in range(max(map(len, parts))):
        pieces = [
            lines[number] if number < len(lines) else " " * each.width for each, lines in zip(shown, parts, strict=True)
        ]
        yield (" " * _GAP).join(pieces).rstrip()


def _widen(widths: dict[int, int], wanted: Sequence[int], room: int) -> None:
    """Share what is left of ``room`` among columns that want more: what needs least gets it first."""
    spare = max(room - _total(list(widths.values())), 0)
    lacks = {index: max(wanted[index] - width, 0) for index, width in widths.items()}
    for position, index in enumerate(sorted(widths, key=lambda index: lacks[index])):
        granted = min(lacks[index], spare // (len(widths) - position))
        widths[index] += granted
        spare -= granted


def _titled(title: str, width: int) -> Iterator[Text]:
    if title:
        yield from (_line(line, "italic") for line in wrapped(title, width))


def _line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ignore")


def _padded(text: str, width: int, *, right: bool = False) -> str:
    blank = " " * max(width - cell_len(text), 0)
    return f"{blank}{text}" if right else f"{text}{blank}"


def _widest(cells: Sequence[str]) -> int:
    return max((cell_len(line) for cell in cells for line in cell.splitlines()), default=0)


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + _GAP * (len(widths) - 1)
