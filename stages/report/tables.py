"""Make the tables of a report, for the page and the terminal: accuracy, worst tokens, answers, speed, tasks, checks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stages.commands.tables import Column, DataTable
from stages.evaluation.accuracy import Guess, WorstToken
from stages.evaluation.records import Evaluation, Generation, ModelRow, SpeedTest, TaskScore
from stages.records.results import VerifyReport
from stages.records.sites import short_name
from stages.report.document import Quantization
from stages.report.view import UNKNOWN, TableGroup, TableView, megabytes, number, percent, table, visible
from stages.runtime.upcast import UPCAST_REASON


def accuracy_tables(evaluation: Evaluation, name: str) -> TableGroup:
    """Return perplexity, KL, top-1 agreement and size of every model on one text."""
    comparison, base = evaluation.comparison, evaluation.rows[0]
    widened = [row.name for row in evaluation.rows if row.widened]
    note = f" {', '.join(widened)} ran {UPCAST_REASON}." if widened else ""
    headings = ("model", "perplexity", "KL, mean", "KL, 99th percentile", "same top-1", "MB", "of the base")
    return TableGroup(
        name=name,
        heading=f"Accuracy on {comparison.text}",
        text=f"{base.accuracy.tokens} predicted tokens in {comparison.windows} windows of {comparison.seq_len}; KL is "
        f"KL({base.name} || model) in nats; {evaluation.levels}; ONNX Runtime, "
        f"{', '.join(comparison.providers)}.{note}",
        tables=(table(headings, [_accuracy_row(row, base) for row in evaluation.rows]),),
    )


def _accuracy_row(row: ModelRow, base: ModelRow) -> tuple[str, ...]:
    accuracy = row.accuracy
    return (
        row.name,
        f"{accuracy.perplexity:.3f}",
        f"{accuracy.mean_divergence:.5f}",
        number(accuracy.divergence_99, ".4f"),
        percent(accuracy.top1_agreement),
        megabytes(row.bytes),
        percent(row.bytes / base.bytes),
    )


def worst_tables(evaluation: Evaluation, name: str) -> TableGroup | None:
    """Return the predictions farthest from the base's, a table for each model; None where there are none."""
    tables = [_worst_table(row) for row in evaluation.rows if row.worst]
    if not tables:
        return None
    return TableGroup(
        name=name,
        heading="Worst tokens",
        text="The predictions farthest from the base's. Each token is followed by its probability in the base and in "
        "the model; ⏎ is a line break.",
        tables=tuple(tables),
    )


def _worst_table(row: ModelRow) -> TableView:
    headings = (f"text before it ({row.name})", "next token", "base's top tokens", "model's top tokens", "KL")
    return table(headings, [_worst_row(token) for token in row.worst], texts=4, wraps=0)


def _worst_row(token: WorstToken) -> tuple[str, ...]:
    return (
        "…" + visible(token.context),
        _describe(token.following),
        "\n".join(map(_describe, token.base_first)),
        "\n".join(map(_describe, token.model_first)),
        f"{token.divergence:.3f}",
    )


def _describe(guess: Guess) -> str:
    """Return a token and its probabilities: “ the” 61.0 → 3.0 %."""
    return f"“{visible(guess.token)}” {100 * guess.base:.1f} → {100 * guess.model:.1f} %"


def answer_tables(generations: Sequence[Generation]) -> TableGroup | None:
    """Return each prompt with every model's answer; None where there are none."""
    if not generations:
        return None
    return TableGroup(
        name="answers",
        heading="Answers side by side",
        text="Greedy, by onnxruntime-genai, at the accuracy level that each model's files set. Same start: how many of "
        "an answer's first tokens are the base's too.",
        tables=tuple(_answer_table(generation) for generation in generations),
    )


def _answer_table(generation: Generation) -> TableView:
    how = "in the chat template" if generation.templated else "as it stands"
    rows = [
        (answer.model, answer.text.strip(), f"{answer.same_tokens} of {answer.tokens}") for answer in generation.answers
    ]
    return table(("model", f"{generation.prompt} ({how})", "same start"), rows, texts=2, wraps=1)


def speed_tables(speed: SpeedTest | None) -> TableGroup | None:
    """Return tokens per second and memory; None where they weren't measured."""
    if speed is None:
        return None
    return TableGroup(
        name="speed",
        heading="Speed and memory",
        text=f"{speed.runtime}, {speed.threads} {'thread' if speed.threads == 1 else 'threads'}, on {speed.machine}; "
        f"{speed.prompt_tokens} prompt tokens, {speed.new_tokens} new ones; median of {speed.rounds} "
        f"{'round' if speed.rounds == 1 else 'rounds'} (slowest to fastest), models alternately, each round in a "
        "process of its own. Memory is the peak of the whole process, Python included.",
        tables=(_speed_table(speed),),
    )


def _speed_table(speed: SpeedTest) -> TableView:
    base = speed.models[0]
    rows = [
        (
            model.model,
            model.accuracy_level,
            f"{model.prompt.median:.1f} ({model.prompt.slowest:.1f} to {model.prompt.fastest:.1f})",
            f"{model.decode.median:.1f} ({model.decode.slowest:.1f} to {model.decode.fastest:.1f})",
            f"{model.decode.median / base.decode.median:.2f}x",
            megabytes(model.peak_bytes),
            f"{model.load_seconds:.2f}",
        )
        for model in speed.models
    ]
    headings = (
        "model",
        "accuracy level",
        "prompt, tokens/s",
        "decode, tokens/s",
        "decode, of the base",
        "peak MB",
        "load, s",
    )
    return table(headings, rows, texts=2, wraps=1)


def task_tables(scores: Sequence[TaskScore]) -> TableGroup | None:
    """Return the scores of lm-eval's tasks; None where none was run."""
    if not scores:
        return None
    return TableGroup(
        name="tasks",
        heading="lm-eval",
        text="lm-eval's tasks on ONNX Runtime, at the accuracy level of the comparison; ± is lm-eval's standard error.",
        tables=(_task_table(scores),),
    )


def _task_table(scores: Sequence[TaskScore]) -> TableView:
    models = list(dict.fromkeys(score.model for score in scores))
    cells: dict[tuple[str, str, str, int], dict[str, str]] = {}
    for score in scores:
        spread = "" if score.stderr is None else f" ± {score.stderr:.4f}"
        row = cells.setdefault((score.task, score.metric, score.filter, score.samples), {})
        row[score.model] = f"{score.value:.4f}{spread}"
    rows = [
        (
            task,
            f"{metric} ({answer_filter})" if answer_filter else metric,
            str(samples),
            *(of_model.get(model, UNKNOWN) for model in models),
        )
        for (task, metric, answer_filter, samples), of_model in cells.items()
    ]
    return table(("task", "metric", "samples", *models), rows, texts=2)


def verified_tables(quantization: Quantization) -> TableGroup | None:
    """Return the checks of the export, and what isn't quantized; None where nothing is known."""
    tables = []
    if quantization.verified is not None:
        tables.append(table(("check", "result"), _checks(quantization.verified), texts=2))
    unquantized = [*((short_name(one.site), one.reason) for one in quantization.kept)]
    unquantized += [("other weights", text) for text in quantization.other_weights]
    if unquantized:
        tables.append(table(("not quantized", "why"), unquantized, texts=2, wraps=1))
    if not tables:
        return None
    return TableGroup(
        name="checks",
        heading="Checks",
        text="The exported model against the numbers that it was made from, on ONNX Runtime's CPU provider.",
        tables=tuple(tables),
    )


def _checks(verified: VerifyReport) -> list[tuple[str, str]]:
    rows = []
    if verified.fused is not None:
        rows.append(("sites that run as one MatMulNBits", f"{verified.fused} of {verified.sites}"))
    if verified.worst_exact is not None:
        site = short_name(verified.worst_exact.site)
        rows.append(("largest error at accuracy level 1", f"{verified.worst_exact.exact:.1e} ({site})"))
    if verified.worst_default is not None:
        site = short_name(verified.worst_default.site)
        rows.append(("largest error at the runtime's default level", f"{verified.worst_default.default:.1e} ({site})"))
    rows += [(f"not fused: {short_name(one.site)}", one.reason) for one in verified.unfused]
    rows += [("not checked", reason) for reason in verified.skipped]
    return rows


def tables_of(evaluation: Evaluation) -> Iterator[DataTable]:
    """Yield an evaluation's tables for the terminal, but for the worst tokens."""
    yield from _terminal_tables(
        accuracy_tables(evaluation, ""),
        answer_tables(evaluation.generations),
        speed_tables(evaluation.speed),
        task_tables(evaluation.tasks),
    )


def tables_of_worst(evaluation: Evaluation) -> Iterator[DataTable]:
    """Yield the tables of an evaluation's worst tokens for the terminal."""
    yield from _terminal_tables(worst_tables(evaluation, ""))


def _terminal_tables(*groups: TableGroup | None) -> Iterator[DataTable]:
    for group in groups:
        if group is not None:
            for index, view in enumerate(group.tables):
                yield _terminal_table(view, f"{group.heading}. {group.text}" if index == 0 else "")


def _terminal_table(view: TableView, title: str) -> DataTable:
    columns = tuple(
        Column(heading=column.heading, is_number=column.is_number, wraps=column.wraps) for column in view.columns
    )
    return DataTable(title=title, columns=columns, rows=view.rows)
