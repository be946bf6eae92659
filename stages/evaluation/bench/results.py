"""Compare measured models: which ones no other beats in bytes and loss, and the tables and commands that say so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, geometric_mean

from rich.console import Group
from rich.text import Text

from stages.commands.output import Section, unwrapped
from stages.commands.tables import Column, DataTable
from stages.errors import UserError
from stages.evaluation.accuracy import Accuracy
from stages.evaluation.bench.runs import EvaluationText, Record, Run, RunFolder, Search, explain_write_errors
from stages.evaluation.records import ModelRow
from stages.records.quantities import counted
from stages.system.json_file import write_whole
from stages.system.measured_process import Cost

TABLE = "table.md"
_COLUMNS = (
    Column(heading="model"),
    Column(heading="MB", is_number=True),
    Column(heading="bits a weight", is_number=True, leaves=6),
    Column(heading="KL (nats)", is_number=True),
    Column(heading="perplexity", is_number=True, leaves=8),
    Column(heading="same top-1", is_number=True, leaves=7),
    Column(heading="held-out loss", is_number=True, leaves=5),
    Column(heading="search, s", is_number=True, leaves=4),
    Column(heading="whole run, s", is_number=True, leaves=3),
    Column(heading="peak MB", is_number=True, leaves=2),
    Column(heading="note", wraps=True, leaves=1),
)
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
    return _with_front(models)


def _with_front(models: Sequence[MeasuredModel]) -> tuple[MeasuredModel, ...]:
    """Return the models, each with whether no other one beats it."""
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


def publish(run_folder: RunFolder, results: Sequence[TextResults]) -> Iterator[Section]:
    """Yield a table for each text and one of their means, then every model's command; write the same as table.md."""
    lines = [f"{model.name}: {model.command}" for model in results[0].models]
    tables = [*map(results_table, results), *([means_table(results)] if len(results) > 1 else [])]
    with explain_write_errors(run_folder.folder):
        write_whole(run_folder.folder / TABLE, ("\n".join([*map(_as_markdown, tables), *lines]) + "\n").encode())
    where = f"The commands that make these models stand in {run_folder.folder / TABLE}."
    yield Section(name="results", table=Group(*tables, Text(where)), record=results)
    commands = {model.name: model.command for model in results[0].models}
    yield Section(name="commands", table=unwrapped("\n".join(lines)), record=commands, detail=True)


def raise_failures(records: Mapping[str, Record]) -> None:
    """Raise UserError naming the runs that failed, if any did."""
    failed = [name for name, record in records.items() if record.failure is not None]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(records)} failed ({', '.join(failed)}): the table says why, and NAME.log holds "
            "their output; pass --retry_failed to try them again."
        )


def results_table(results: TextResults) -> DataTable:
    """Return one row a model; ``*`` marks the Pareto front, and a model that failed has the reason as its note."""
    return DataTable(title=_title(results), columns=_COLUMNS, rows=tuple(map(_row, results.models)))


def means_table(results: Sequence[TextResults]) -> DataTable:
    """Return one row a model with its KL on each text and its means; ``*`` marks the Pareto front of mean KL."""
    models = mean_results(results).models
    kinds = (Column(heading=f"KL, {text_name(each)}", is_number=True, leaves=1) for each in results)
    scores = ("mean KL", "perplexity", "same top-1")
    columns = (*_COLUMNS[:2], *kinds, *(Column(heading=heading, is_number=True) for heading in scores))
    rows = zip(models, text_divergences(results), strict=True)
    cells = ((*_row(model)[:2], *(_number(each, ".5f") for each in known), *_row(model)[3:6]) for model, known in rows)
    return DataTable(title=f"mean of {counted(len(results), 'text')}", columns=columns, rows=tuple(cells))


def mean_results(results: Sequence[TextResults]) -> TextResults:
    """Return all models with their means over the texts."""
    rows = zip(*(each.models for each in results), strict=True)
    models = [replace(row[0], accuracy=_mean_accuracy([model.accuracy for model in row])) for row in rows]
    bases = [each.base for each in results if each.base is not None]
    mean = _mean_accuracy([base.accuracy for base in bases]) if len(bases) == len(results) else None
    base = None if mean is None else replace(bases[0], accuracy=mean, positions=(), worst=())
    return TextResults(text=None, base=base, models=_with_front(models))


def text_divergences(results: Sequence[TextResults]) -> list[tuple[float | None, ...]]:
    """Return each model's KL on each text; None where it wasn't scored."""
    rows = zip(*(each.models for each in results), strict=True)
    return [tuple(None if model.accuracy is None else model.accuracy.mean_divergence for model in row) for row in rows]


def text_name(results: TextResults) -> str:
    """Return a text's name as headings have it: without folder and ending."""
    return Path(results.text or "").stem


def _mean_accuracy(scores: Sequence[Accuracy | None]) -> Accuracy | None:
    """Return the mean of scores on several texts, geometric for perplexity; None where one is missing."""
    known = [score for score in scores if score is not None]
    if not known or len(known) < len(scores):
        return None
    return Accuracy(
        tokens=sum(score.tokens for score in known),
        perplexity=geometric_mean(score.perplexity for score in known),
        mean_divergence=fmean(score.mean_divergence for score in known),
        top1_agreement=fmean(score.top1_agreement for score in known),
    )


def _title(results: TextResults) -> str:
    if results.text is None:
        return "no text: held-out layer losses only"
    row = results.base
    if row is None:
        return results.text
    return (
        f"{results.text}: {counted(row.accuracy.tokens, 'token')}; the base has {row.bytes / 1e6:.1f} MB and "
        f"perplexity {row.accuracy.perplexity:.3f}; nothing beats a model with * in both bytes and loss"
    )


def _row(model: MeasuredModel) -> tuple[str, ...]:
    cost, search, accuracy = model.cost, model.search, model.accuracy
    return (
        f"{model.name}{' *' if model.unbeaten else ''}",
        _number(None if model.bytes is None else model.bytes / 1e6, ".1f"),
        _number(None if search is None else search.bits_per_weight, ".3f"),
        _number(None if accuracy is None else accuracy.mean_divergence, ".5f"),
        _number(None if accuracy is None else accuracy.perplexity, ".3f"),
        _number(None if accuracy is None else accuracy.top1_agreement, ".2%"),
        _number(None if search is None else search.held_out_loss, ".5f"),
        _number(None if search is None else search.seconds, ".1f"),
        _number(None if cost is None else cost.seconds, ".1f"),
        _number(None if cost is None or cost.peak_bytes is None else cost.peak_bytes / 1e6, ".0f"),
        model.remark,
    )


def _number(value: float | None, form: str) -> str:
    return _UNKNOWN if value is None else format(value, form)


def _as_markdown(table: DataTable) -> str:
    return f"{table.title}\n\n{table.as_markdown()}"
