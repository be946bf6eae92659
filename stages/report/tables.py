"""Make the tables of a report, for the page and the terminal: accuracy, worst tokens, answers, speed, tasks, checks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stages.commands.tables import Column, DataTable
from stages.evaluation.accuracy import Guess, WorstToken
from stages.evaluation.records import Evaluation, Generation, ModelRow, OutputEvaluation, Rate, SpeedTest, TaskScore
from stages.model.directory import DECODER
from stages.quantization.weights.summary import ranges
from stages.records.quantities import counted
from stages.records.results import VerifyReport
from stages.records.sites import short_name
from stages.report.document import KeptSite, Quantization
from stages.report.values import (
    UNKNOWN,
    Grade,
    grade_divergence,
    grade_perplexity,
    grade_speed,
    grade_top1,
    megabytes,
    number,
    percent,
    text_name,
    visible,
)
from stages.report.view import Cell, Figure, Graded, TableView, table
from stages.runtime.cpu.norms import NORMS_REASON
from stages.runtime.cpu.upcast import UPCAST_REASON


def accuracy_tables(evaluations: Sequence[Evaluation]) -> Figure:
    """Return perplexity, KL, top-1 agreement and size of every model on every text."""
    several = len(evaluations) > 1
    headings = ("model", "KL (nats)", "same top-1", "perplexity", "KL, 99th percentile", "MB", "of the base")
    rows = [
        (*([text_name(evaluation.comparison.text)] if several else []), *_accuracy_row(row, evaluation.rows[0]))
        for evaluation in evaluations
        for row in evaluation.rows
    ]
    return Figure(
        name="kl",
        heading="Accuracy" if several else f"Accuracy on {evaluations[0].comparison.text}",
        text="\n".join(_how_scored(evaluation, named=several) for evaluation in evaluations),
        tables=(table(["text", *headings] if several else headings, rows, texts=1 + several),),
    )


def _how_scored(evaluation: Evaluation, *, named: bool) -> str:
    comparison, base = evaluation.comparison, evaluation.rows[0]
    widened = [row.name for row in evaluation.rows if row.widened]
    written_out = [row.name for row in evaluation.rows if row.norms_written_out]
    ran = ((widened, UPCAST_REASON), (written_out, NORMS_REASON))
    note = "".join(f" {', '.join(names)} ran {reason}." for names, reason in ran if names)
    return (
        f"{f'{comparison.text}: ' if named else ''}{base.accuracy.tokens} predicted tokens in "
        f"{counted(comparison.windows, 'window')} "
        f"of {comparison.seq_len}; KL is KL({base.name} || model) in nats; "
        f"{evaluation.levels}; ONNX Runtime, {', '.join(comparison.providers)}.{note}"
    )


def _accuracy_row(row: ModelRow, base: ModelRow) -> tuple[Cell, ...]:
    accuracy, is_base = row.accuracy, row is base
    scores = (f"{accuracy.mean_divergence:.5f}", percent(accuracy.top1_agreement), f"{accuracy.perplexity:.3f}")
    grades = (grade_divergence(accuracy), grade_top1(accuracy), grade_perplexity(accuracy, base.accuracy))
    return (
        row.name,
        *(scores if is_base else map(Graded, scores, grades)),
        number(accuracy.divergence_99, ".4f"),
        megabytes(row.bytes),
        percent(row.bytes / base.bytes),
    )


def output_tables(evaluation: OutputEvaluation, name: str) -> Figure:
    """Return cosine similarity and relative error of every output of every model beside its base's."""
    headings = ("model", "output", "cosine", "worst cosine", "relative error", "vectors", "MB", "of the base")
    base = evaluation.rows[0]
    rows: list[tuple[Cell, ...]] = [
        (
            row.name,
            score.output,
            f"{score.cosine:.6f}",
            f"{score.worst_cosine:.4f}",
            percent(score.relative_error),
            str(score.vectors),
            megabytes(row.bytes),
            percent(row.bytes / base.bytes),
        )
        for row in evaluation.rows[1:]
        for score in row.scores
    ]
    levels = "; ".join(f"{row.name}: {row.accuracy_level}" for row in evaluation.rows[1:])
    return Figure(
        name=name,
        heading="Outputs" if evaluation.component == DECODER else f"Outputs of {evaluation.component}",
        text=f"{counted(evaluation.samples, 'sample')} of {evaluation.source} that no calibration saw, beside "
        f"{base.name}. Cosine similarity of vectors along the last axis, mean and worst; relative error over all "
        f"numbers. Accuracy level: {levels}.",
        tables=(table(headings, rows, texts=2),),
    )


def worst_tables(evaluation: Evaluation, name: str) -> Figure | None:
    """Return the predictions farthest from the base's, a table for each model; None where there are none."""
    tables = [_worst_table(row) for row in evaluation.rows if row.worst]
    if not tables:
        return None
    return Figure(
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


def answer_tables(generations: Sequence[Generation]) -> Figure | None:
    """Return each prompt with every model's answer; None where there are none."""
    if not generations:
        return None
    return Figure(
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


def speed_tables(speed: SpeedTest | None) -> Figure | None:
    """Return tokens per second and memory; None where they weren't measured."""
    if speed is None:
        return None
    return Figure(
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
    rows: list[tuple[Cell, ...]] = [
        (
            model.model,
            model.accuracy_level,
            _rate(model.prompt),
            _rate(model.decode),
            _times(model.decode.median / base.decode.median, is_base=model is base),
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
    return table(headings, rows, texts=2)


def _rate(rate: Rate) -> str:
    extent = "" if rate.slowest == rate.fastest else f" ({rate.slowest:.1f} to {rate.fastest:.1f})"
    return f"{rate.median:.1f}{extent}"


def _times(ratio: float, *, is_base: bool) -> Cell:
    return f"{ratio:.2f}x" if is_base else Graded(f"{ratio:.2f}x", grade_speed(ratio))


def task_tables(scores: Sequence[TaskScore]) -> Figure | None:
    """Return the scores of lm-eval's tasks; None where none was run."""
    if not scores:
        return None
    return Figure(
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


def verified_tables(quantization: Quantization) -> Figure | None:
    """Return the checks of the export, and what isn't quantized; None where nothing is known."""
    tables = []
    if quantization.verified is not None:
        tables.append(table(("check", "result"), _checks(quantization.verified), texts=2))
    reasons: dict[tuple[str, str], list[KeptSite]] = {}
    for one in quantization.kept:
        reasons.setdefault((one.kind, one.reason), []).append(one)
    unquantized = [(_sites_in_words(kind, members), reason) for (kind, reason), members in reasons.items()]
    unquantized += [("other weights", text) for text in quantization.other_weights]
    if unquantized:
        tables.append(table(("not quantized", "why"), unquantized, texts=2, wraps=1))
    if not tables:
        return None
    return Figure(
        name="checks",
        heading="Checks",
        text="Whether ONNX Runtime's CPU provider computes what the stored numbers say; this is no measure of what "
        "quantization costs. A deviation is the largest difference of an output, relative to the largest output; an "
        "export fails beyond rounding.",
        tables=tuple(tables),
    )


def _sites_in_words(kind: str, members: Sequence[KeptSite]) -> str:
    layers = sorted(one.layer for one in members if one.layer is not None)
    return f"{kind} of layers {ranges(layers)}" if layers else kind


def _checks(verified: VerifyReport) -> list[tuple[Cell, ...]]:
    rows: list[tuple[Cell, ...]] = []
    if verified.fused is not None:
        grade = Grade.GOOD if verified.fused == verified.sites else Grade.POOR
        rows.append(("MatMuls that run as one MatMulNBits", Graded(f"{verified.fused} of {verified.sites}", grade)))
    if verified.worst_exact is not None:
        site = short_name(verified.worst_exact.site)
        error = Graded(f"{verified.worst_exact.exact:.1e} ({site})", Grade.GOOD)
        rows.append(("largest deviation at accuracy level 1: rounding of sums", error))
    if verified.worst_default is not None:
        site = short_name(verified.worst_default.site)
        text = f"{verified.worst_default.default:.1e} ({site})"
        rows.append(("largest deviation at the runtime's default level, which rounds activations to int8", text))
    if verified.tables:
        worst = max(verified.tables, key=lambda one: one.error)
        rows.append(
            ("largest deviation of an embedding's rows", Graded(f"{worst.error:.1e} ({worst.table})", Grade.GOOD))
        )
    rows += [(f"not fused: {short_name(one.site)}", one.reason) for one in verified.unfused]
    rows += [("not checked", reason) for reason in verified.skipped]
    return rows


def tables_of(evaluation: Evaluation) -> Iterator[DataTable]:
    """Yield an evaluation's tables for the terminal, but for the worst tokens."""
    yield from _terminal_tables(
        accuracy_tables([evaluation]),
        answer_tables(evaluation.generations),
        speed_tables(evaluation.speed),
        task_tables(evaluation.tasks),
    )


def tables_of_outputs(evaluation: OutputEvaluation) -> Iterator[DataTable]:
    """Yield the tables of a comparison of outputs for the terminal."""
    yield from _terminal_tables(output_tables(evaluation, ""))


def tables_of_worst(evaluation: Evaluation) -> Iterator[DataTable]:
    """Yield the tables of an evaluation's worst tokens for the terminal."""
    yield from _terminal_tables(worst_tables(evaluation, ""))


def _terminal_tables(*groups: Figure | None) -> Iterator[DataTable]:
    for group in groups:
        if group is not None:
            for index, view in enumerate(group.tables):
                yield _terminal_table(view, f"{group.heading}. {group.text}" if index == 0 else "")


def _terminal_table(view: TableView, title: str) -> DataTable:
    columns = tuple(
        Column(heading=column.heading, is_number=column.is_number, wraps=column.wraps) for column in view.columns
    )
    return DataTable(title=title, columns=columns, rows=tuple(tuple(str(cell) for cell in row) for row in view.rows))
