"""Make the box that a finished quantization ends with: what was made, how good it is, and what to do with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.text import Text

from export.card.record import EvaluationSummary, summarize_evaluations
from stages.commands.output import Section, as_called
from stages.commands.quantize_options import QuantizeConfig
from stages.evaluation.records import OutputEvaluation
from stages.evaluation.texts import CONTENTS
from stages.model.directory import DECODER
from stages.model.genai_config import GENAI_CONFIG
from stages.quantization.weights.store import REPORT_FOLDER
from stages.quantization.weights.summary import ExpertTokens, expert_tokens
from stages.report.document import REPORT_HTML
from stages.system.paths import from_here, shell_line

if TYPE_CHECKING:
    from export.run import QuantizedModel

_WIDTH = 80
_FRAME = 4
"""Columns of a panel's border and padding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The box's content for programs."""

    folder: Path
    bytes_before: int
    bytes_after: int
    evaluation: EvaluationSummary | None
    """None where nothing was compared."""
    outputs: tuple[OutputEvaluation, ...] = ()
    """What encoders give beside what their base gives."""
    experts: ExpertTokens | None = None
    """None where no experts were calibrated."""
    report: Path
    next: tuple[tuple[str, str], ...]
    """(what it does, command)."""


def result_section(config: QuantizeConfig, made: QuantizedModel) -> Section:
    """Return what the command ends with.

    Args:
        config: the options that made the model, with its paths as they were typed.
        made: the model.
    """
    result = _result(config, made)
    return Section(name="result", table=lambda program: ResultBox(result, program), record=result)


def _result(config: QuantizeConfig, made: QuantizedModel) -> Result:
    base, folder = from_here(config.onnx_path), from_here(config.output_path)
    commands: list[tuple[str, tuple[object, ...]]] = [("inspect", ("inspect", folder))]
    parts = config.components or (DECODER,)
    if not (made.outputs or made.evaluations):
        part = () if parts[0] == DECODER else ("--component", parts[0])
        samples = config.samples_of(parts[0], unnamed=len(parts) == 1)
        given = () if samples is None else ("--samples", samples)
        commands.insert(0, ("evaluate", ("evaluate", *part, base, folder, *given)))
    if DECODER in parts and (made.folder / GENAI_CONFIG).is_file():
        commands.insert(0, ("chat", ("chat", folder)))
    return Result(
        folder=folder,
        bytes_before=made.export.bytes_before,
        bytes_after=made.export.bytes_after,
        evaluation=summarize_evaluations(made.evaluations) if made.evaluations else None,
        outputs=made.outputs,
        experts=expert_tokens(made.search.sites),
        report=from_here(config.weights_folder) / REPORT_FOLDER / REPORT_HTML,
        next=tuple((what, shell_line([f"stages.{name}", *map(str, rest)])) for what, (name, *rest) in commands),
    )


@dataclass(frozen=True, slots=True)
class ResultBox:
    """A panel at most 80 columns wide; where a command doesn't fit, lines between rules, so that it can be copied."""

    result: Result
    program: str

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        width = min(_WIDTH, options.max_width)
        lines = [f"{name:<10} {text}".rstrip() for name, text in _lines(self.result, self.program)]
        text = Text("\n".join(lines), no_wrap=True, overflow="ignore")
        if max(map(len, lines)) <= width - _FRAME:
            yield Panel(text, width=width)
        else:
            yield Group(Rule(characters="─"), text, Rule(characters="─"))


def _lines(result: Result, program: str) -> Iterator[tuple[str, str]]:
    before, after = result.bytes_before / 1e6, result.bytes_after / 1e6
    yield "model", str(result.folder)
    yield "size", f"{before:,.1f} MB -> {after:,.1f} MB ({before / after:.2f}x smaller)"
    yield from _measured(result.evaluation, result.outputs)
    if (experts := result.experts) is not None:
        yield "experts", f"tokens: {experts.spread} (each: report)"
        if experts.unseen:
            yield "none for", experts.named(2)
    yield "report", str(result.report)
    for what, command in result.next:
        yield what, as_called(command, program)


def _measured(evaluation: EvaluationSummary | None, outputs: tuple[OutputEvaluation, ...]) -> Iterator[tuple[str, str]]:
    for compared in outputs:
        worst = max(compared.rows[-1].scores, key=lambda score: score.relative_error)
        name = "outputs" if compared.component == DECODER else compared.component
        yield name, f"{worst.output}: cosine {worst.cosine:.5f}, relative error {worst.relative_error:.1%}"
    if evaluation is None:
        if not outputs:
            yield "accuracy", "not compared with the base yet (--evaluate)"
        return
    for one in evaluation.texts:
        yield (
            f"on {one.text}",
            f"KL {one.divergence:.3f}, perplexity {one.base_perplexity:.2f} -> {one.perplexity:.2f}, "
            f"same top-1 {one.same_top1:.1%}",
        )
    if known := [f"{one.text}: {CONTENTS[one.text]}" for one in evaluation.texts if one.text in CONTENTS]:
        yield "texts", "; ".join(known)
    if (speed := evaluation.speed) is not None:
        faster = speed.decode / speed.base_decode
        yield "decoding", f"{speed.base_decode:.1f} -> {speed.decode:.1f} tokens/s ({faster:.1f}x)"
