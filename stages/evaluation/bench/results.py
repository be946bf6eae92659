"""Compare measured models: which ones no other beats in bytes and loss, and the tables and commands that say so."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rich import box
from rich.console import Console, Group
from rich.table import Table

from stages.commands.output import Section, unwrapped
from stages.errors import UserError
from stages.evaluation.accuracy import Accuracy
from stages.evaluation.bench.runs import EvaluationText, Record, Run, RunFolder, Search, explain_write_errors
from stages.evaluation.records import ModelRow
from stages.system.json_file import write_whole
from stages.system.measured_process import Cost

TABLE = "table.md"
_FILE_WIDTH = 1000
"""Columns of the table in a file, where nothing may be wrapped."""
_ACCURACY = ("perplexity", "KL (nats)", "same top-1")
_UNKNOWN = "-"
_SAME_SIZE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredModel:
    """What is known of one model, on one text."""

    name: str
    command: str
    unbeaten: bool
    """Whether no other one beats it in bytes and loss."""
    note: str
    failure: str | None
    bytes: int | None
    cost: Cost | None
    search: Search | None
    accuracy: Accuracy | None

    @property
    def loss(self) -> float | None:
        """Return what is weighed against bytes: KL, or the held-out layer loss of models without a text."""
        if self.accuracy is not None:
            return self.accuracy.mean_divergence
        return None if self.search is None else self.search.held_out_loss

    @property
    def remark(self) -> str:
        """Return why the model failed, or its note."""
        return self.failure or self.note


@dataclass(frozen=True, slots=True, kw_only=True)
class TextResults:
    """All models on one text."""

    text: str | None
    """None where the models were scored on no text."""
    base: ModelRow | None
    models: tuple[MeasuredModel, ...]


def text_results(
    run_folder: RunFolder,
    runs: Sequence[Run],
    records: Mapping[str, Record],
    texts: Sequence[EvaluationText],
    notes: Mapping[str, str],
) -> tuple[TextResults, ...]:
    """Return the results on each text; where there is no text, one with held-out layer losses only.

    Args:
        run_folder: where the base's own scores lie.
        runs: the ways to make the models.
        records: what was measured, by run name; a run without a record has no result.
        texts: what the models were scored on.
        notes: remarks, by run name.
    """
    commands = {run.name: run.shown_command for run in runs}
    return tuple(
        TextResults(
            text=None if text is None else text.text,
            base=None if text is None else run_folder.base_row(text),
            models=measured_models(commands, records, None if text is None else text.key, notes),
        )
        for text in texts or (None,)
    )


def measured_models(
    commands: Mapping[str, str], records: Mapping[str, Record], key: str | None, notes: Mapping[str, str]
) -> tuple[MeasuredModel, ...]:
    """Return the models that have a record.

    Args:
        commands: what makes each model, by name.
        records: what was measured, by name.
        key: the text's; None for no text.
        notes: remarks, by name.
    """
    models = [
        MeasuredModel(
            name=name,
            command=command,
            unbeaten=False,
            note=notes.get(name, ""),
            failure=record.failure,
            bytes=record.bytes,
            cost=record.cost,
            search=record.search,
            accuracy=None if key is None else record.accuracy.get(key),
        )
        for name, command in commands.items()
        if (record := records.get(name)) is not None
    ]
    front = pareto_front([_point(model) for model in models])
    return tuple(replace(model, unbeaten=unbeaten) for model, unbeaten in zip(models, front, strict=True))


def _point(model: MeasuredModel) -> tuple[int, float] | None:
    size, loss = model.bytes, model.loss
    return None if size is None or loss is None or model.failure is not None else (size, loss)


def pareto_front(points: Sequence[tuple[int, float] | None]) -> list[bool]:
    """Return which (bytes, loss) no other one beats: one with less loss in as many bytes, or as little loss in fewer.

    Up to a thousandth more is as many: graphs of the same weights differ by a few names. None is never on the front.
    """
    known = [point for point in points if point is not None]
    return [point is not None and not any(_beats(other, point) for other in known) for point in points]


def _beats(one: tuple[int, float], other: tuple[int, float]) -> bool:
    (size, loss), (other_size, other_loss) = one, other
    return size <= other_size * (1 + _SAME_SIZE) if loss < other_loss else loss == other_loss and size < other_size


def publish(run_folder: RunFolder, results: Sequence[TextResults]) -> Section:
    """Return a table for each text and every model's command, and write the same into the folder as table.md."""
    lines = [f"{model.name}: {model.command}" for model in results[0].models]
    tables = [results_table(each) for each in results]
    with explain_write_errors(run_folder.folder):
        write_whole(run_folder.folder / TABLE, ("\n".join([*map(_as_markdown, results), *lines]) + "\n").encode())
    return Section(name="results", table=Group(*tables, unwrapped("\n".join(lines))), record=results)


def raise_failures(records: Mapping[str, Record]) -> None:
    """Raise UserError naming the runs that failed, if any did."""
    failed = [name for name, record in records.items() if record.failure is not None]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(records)} failed ({', '.join(failed)}): the table says why, and NAME.log holds "
            "their output; pass --retry_failed to try them again."
        )


def results_table(results: TextResults) -> Table:
    """Return one row a model; ``*`` marks the Pareto front, and a model that failed has the reason as its note."""
    scored = any(model.accuracy is not None for model in results.models)
    noted = any(model.remark for model in results.models)
    table = Table(title=_title(results), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    table.add_column("model", overflow="fold")
    headings = ("search s", "total s", "peak MB", "bits a weight", "MB", "held-out loss")
    for heading in (*headings, *(_ACCURACY if scored else ())):
        table.add_column(heading, justify="right")
    if noted:
        table.add_column("note", overflow="fold")
    for model in results.models:
        cells = [*_measured_cells(model), *(_accuracy_cells(model) if scored else ())]
        table.add_row("*" if model.unbeaten else "", model.name, *cells, *([model.remark] if noted else []))
    return table


def _title(results: TextResults) -> str:
    if results.text is None:
        return "no text: held-out layer losses only"
    row = results.base
    if row is None:
        return results.text
    return (
        f"{results.text}: {row.accuracy.tokens} tokens; the base has {row.bytes / 1e6:.1f} MB and perplexity "
        f"{row.accuracy.perplexity:.3f}; * is nowhere beaten"
    )


def _measured_cells(model: MeasuredModel) -> tuple[str, ...]:
    cost, search = model.cost, model.search
    return (
        _number(None if search is None else search.seconds, ".1f"),
        _number(None if cost is None else cost.seconds, ".1f"),
        _number(None if cost is None or cost.peak_bytes is None else cost.peak_bytes / 1e6, ".0f"),
        _number(None if search is None else search.bits_per_weight, ".3f"),
        _number(None if model.bytes is None else model.bytes / 1e6, ".1f"),
        _number(None if search is None else search.held_out_loss, ".5f"),
    )


def _accuracy_cells(model: MeasuredModel) -> tuple[str, ...]:
    accuracy = model.accuracy
    if accuracy is None:
        return (_UNKNOWN,) * len(_ACCURACY)
    return f"{accuracy.perplexity:.3f}", f"{accuracy.mean_divergence:.5f}", f"{accuracy.top1_agreement:.2%}"


def _number(value: float | None, form: str) -> str:
    return _UNKNOWN if value is None else format(value, form)


def _as_markdown(results: TextResults) -> str:
    table = results_table(results)
    page = io.StringIO()
    title, table.title, table.box, table.padding = table.title, None, box.MARKDOWN, (0, 1)
    Console(file=page, width=_FILE_WIDTH).print(table)
    return f"{title}\n\n{page.getvalue()}"
