"""Make the box that a finished quantization ends with: what was made, how good it is, and what to do with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.text import Text

from stages.commands.output import Section, as_called
from stages.commands.quantize_options import QuantizeConfig
from stages.evaluation.records import Evaluation
from stages.model.genai_config import GENAI_CONFIG
from stages.quantization.weights.store import REPORT_FOLDER
from stages.report.document import REPORT_HTML
from stages.system.paths import from_here, shell_line

if TYPE_CHECKING:
    from export.run import QuantizedModel

_WIDTH = 80
_FRAME = 4
"""Columns of a panel's border and padding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextResult:
    """How far a model is from its base on one text."""

    text: str
    divergence: float
    """Mean KL(base || model), nats a token."""
    base_perplexity: float
    perplexity: float
    same_top1: float
    """Share of tokens, 0 to 1."""
    accuracy_level: str
    """At which the model ran."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The box's content for programs."""

    folder: Path
    bytes_before: int
    bytes_after: int
    texts: tuple[TextResult, ...]
    """Empty where nothing was compared."""
    base_tokens_per_second: float | None
    """While decoding; None where it wasn't measured."""
    tokens_per_second: float | None
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
    speed = next((one.speed for one in made.evaluations if one.speed is not None), None)
    rates = (None, None) if speed is None else tuple(model.decode.median for model in speed.models)
    base, folder = from_here(config.onnx_path), from_here(config.output_path)
    commands: list[tuple[str, tuple[object, ...]]] = [
        ("evaluate", ("evaluate", "--base", base, "--model", folder)),
        ("inspect", ("inspect", folder)),
    ]
    if (made.folder / GENAI_CONFIG).is_file():
        commands.insert(0, ("chat", ("chat", folder)))
    return Result(
        folder=folder,
        bytes_before=made.export.bytes_before,
        bytes_after=made.export.bytes_after,
        texts=tuple(map(_text_result, made.evaluations)),
        base_tokens_per_second=rates[0],
        tokens_per_second=rates[1],
        report=from_here(config.weights_folder) / REPORT_FOLDER / REPORT_HTML,
        next=tuple((what, shell_line([f"stages.{name}", *map(str, rest)])) for what, (name, *rest) in commands),
    )


def _text_result(evaluation: Evaluation) -> TextResult:
    base, model = evaluation.rows
    return TextResult(
        text=Path(evaluation.comparison.text).name,
        divergence=model.accuracy.mean_divergence,
        base_perplexity=base.accuracy.perplexity,
        perplexity=model.accuracy.perplexity,
        same_top1=model.accuracy.top1_agreement,
        accuracy_level=model.accuracy_level,
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
    yield from _accuracy(result.texts)
    if result.tokens_per_second is not None and result.base_tokens_per_second is not None:
        faster = result.tokens_per_second / result.base_tokens_per_second
        yield (
            "decoding",
            f"{result.base_tokens_per_second:.1f} -> {result.tokens_per_second:.1f} tokens/s ({faster:.1f}x)",
        )
    yield "report", str(result.report)
    for what, command in result.next:
        yield what, as_called(command, program)


def _accuracy(texts: Sequence[TextResult]) -> Iterator[tuple[str, str]]:
    if not texts:
        yield "accuracy", "not compared with the base yet (--evaluate)"
    for one in texts:
        yield (
            f"on {one.text}",
            f"KL {one.divergence:.3f}, perplexity {one.base_perplexity:.2f} -> {one.perplexity:.2f}, "
            f"same top-1 {one.same_top1:.1%}",
        )
