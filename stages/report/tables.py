"""The parts of a report that are tables and sentences: accuracy, worst tokens, answers, speed, tasks, checks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from stages.evaluation.accuracy import Guess, WorstToken
from stages.evaluation.records import Evaluation, Generation, ModelRow, SpeedTest, TaskScore
from stages.records.results import VerifyReport
from stages.records.sites import short_name
from stages.report.document import Quantization
from stages.report.view import UNKNOWN, Passage, TableView, megabytes, number, percent, table, visible
from stages.runtime.upcast import WIDENED_BECAUSE


def accuracy_passage(evaluation: Evaluation, name: str) -> Passage:
    """Perplexity, KL, top-1 and size of every model on one text."""
    comparison, base = evaluation.comparison, evaluation.rows[0]
    widened = [row.name for row in evaluation.rows if row.widened]
    note = f" {', '.join(widened)} ran {WIDENED_BECAUSE}." if widened else ""
    return Passage(
        name=name,
        heading=f"Accuracy on {comparison.text}",
        text=f"{base.accuracy.tokens} predicted tokens in {comparison.windows} windows of {comparison.seq_len}; KL is "
        f"KL({base.name} || model) in nats; accuracy level {comparison.accuracy_level}; ONNX Runtime, "
        f"{', '.join(comparison.providers)}.{note}",
        tables=(accuracy_table(evaluation),),
    )


def accuracy_table(evaluation: Evaluation) -> TableView:
    """One row a model, the base first."""
    base = evaluation.rows[0]
    headings = ("model", "perplexity", "KL, mean", "KL, 99th percentile", "same top-1", "MB", "of the base")
    return table(headings, [_accuracy_row(row, base) for row in evaluation.rows])


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


def worst_passage(evaluation: Evaluation, name: str) -> Passage | None:
    """The predictions that lost most, a table for each model; None where there are none."""
    tables = [_worst_table(row) for row in evaluation.rows if row.worst]
    if not tables:
        return None
    return Passage(
        name=name,
        heading="Worst tokens",
        text="The predictions farthest from the base's. Behind each token stands its probability in the "
        "base and in the model; ⏎ is a line break.",
        tables=tuple(tables),
    )


def _worst_table(row: ModelRow) -> TableView:
    headings = (f"text before it ({row.name})", "goes on with", "base puts first", "model puts first", "KL")
    return table(headings, [_worst_row(token) for token in row.worst], texts=4, wraps=0)


def _worst_row(token: WorstToken) -> tuple[str, ...]:
    return (
        "…" + visible(token.context),
        in_words(token.following),
        "\n".join(map(in_words, token.base_first)),
        "\n".join(map(in_words, token.model_first)),
        f"{token.divergence:.3f}",
    )


def in_words(guess: Guess) -> str:
    """A token and its probabilities: " the" 61 → 3 %."""
    return f"“{visible(guess.token)}” {100 * guess.base:.1f} → {100 * guess.model:.1f} %"


def answer_passage(generations: Sequence[Generation]) -> Passage | None:
    """Each prompt with every model's answer; None where nothing was asked."""
    if not generations:
        return None
    return Passage(
        name="answers",
        heading="Answers side by side",
        text="Greedy, through onnxruntime-genai, at the accuracy level that each model ships with. Same start: how "
        "many of its tokens, from the first on, are the base's too.",
        tables=tuple(_answer_table(generation) for generation in generations),
    )


def _answer_table(generation: Generation) -> TableView:
    how = "in the chat template" if generation.templated else "as it stands"
    rows = [
        (answer.model, answer.text.strip(), f"{answer.same_tokens} of {answer.tokens}") for answer in generation.answers
    ]
    return table(("model", f"{generation.prompt} ({how})", "same start"), rows, texts=2, wraps=1)


def speed_passage(speed: SpeedTest | None) -> Passage | None:
    """Tokens a second and memory; None where they weren't measured."""
    if speed is None:
        return None
    return Passage(
        name="speed",
        heading="Speed and memory",
        text=f"{speed.runtime}, {speed.threads} {'thread' if speed.threads == 1 else 'threads'}, on {speed.machine}; "
        f"{speed.prompt_tokens} prompt tokens, {speed.new_tokens} new ones; median of {speed.rounds} rounds "
        "(slowest to fastest), models in turns, each round in a process of its own. Memory is the most that a whole "
        "process held, Python included.",
        tables=(speed_table(speed),),
    )


def speed_table(speed: SpeedTest) -> TableView:
    """One row a model, the base first."""
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


def task_passage(scores: Sequence[TaskScore]) -> Passage | None:
    """lm-eval's tasks; None where none was run."""
    if not scores:
        return None
    return Passage(
        name="tasks",
        heading="lm-eval",
        text="Tasks of lm-eval on ONNX Runtime, at the accuracy level of the comparison; ± is the standard error that "
        "lm-eval gives.",
        tables=(task_table(scores),),
    )


def task_table(scores: Sequence[TaskScore]) -> TableView:
    """One row a metric, a column a model."""
    models = list(dict.fromkeys(score.model for score in scores))
    cells: dict[tuple[str, str, str, int], dict[str, str]] = {}
    for score in scores:
        spread = "" if score.stderr is None else f" ± {score.stderr:.4f}"
        row = cells.setdefault((score.task, score.metric, score.filter, score.samples), {})
        row[score.model] = f"{score.value:.4f}{spread}"
    rows = [
        (
            task,
            f"{metric} ({kind})" if kind else metric,
            str(samples),
            *(of_model.get(model, UNKNOWN) for model in models),
        )
        for (task, metric, kind, samples), of_model in cells.items()
    ]
    return table(("task", "metric", "samples", *models), rows, texts=2)


def verified_passage(quantization: Quantization) -> Passage | None:
    """What was checked, and what stayed as it was; None where nothing is known."""
    tables = []
    if quantization.verified is not None:
        tables.append(table(("check", "result"), _checks(quantization.verified), texts=2))
    left = [*((short_name(one.site), one.reason) for one in quantization.kept)]
    left += [("other weights", words) for words in quantization.other_weights]
    if left:
        tables.append(table(("kept as it was", "why"), left, texts=2, wraps=1))
    if not tables:
        return None
    return Passage(
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


def tables_of(evaluation: Evaluation) -> Iterator[Table]:
    """Yield the tables of a report for the screen, one after the other."""
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
                yield _on_screen(view, f"{passage.heading}. {passage.text}" if index == 0 else "")


def _on_screen(view: TableView, title: str) -> Table:
    # Text, because words of a model are no markup.
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in view.columns:
        table.add_column(Text(column.heading), justify="right" if column.is_number else "left", overflow="fold")
    for row in view.rows:
        table.add_row(*map(Text, row))
    return table
