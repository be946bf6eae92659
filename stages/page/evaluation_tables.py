"""What an evaluation found, as tables on the screen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from stages.evaluation.findings import Evaluation
from stages.page.passages import accuracy_passage, answer_passage, speed_passage, task_passage, worst_passage
from stages.page.view import Passage, TableView


def tables_of(evaluation: Evaluation) -> Iterator[Table]:
    """The same tables as in a report, one after the other."""
    passages: Sequence[Passage | None] = (
        accuracy_passage(evaluation, ""),
        worst_passage(evaluation, ""),
        answer_passage(evaluation.generations),
        speed_passage(evaluation.speed),
        task_passage(evaluation.tasks),
    )
    for passage in passages:
        if passage is not None:
            for index, view in enumerate(passage.tables):
                yield _table(view, f"{passage.heading}. {passage.text}" if index == 0 else "")


def _table(view: TableView, title: str) -> Table:
    # Text, because words of a model are no markup.
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in view.columns:
        table.add_column(Text(column.heading), justify="right" if column.is_number else "left", overflow="fold")
    for row in view.rows:
        table.add_row(*map(Text, row))
    return table
