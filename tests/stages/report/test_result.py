"""The box that a finished quantization ends with."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from export.card.record import EvaluationSummary, Speed, TextScores
from stages.quantization.weights.summary import ExpertTokens
from stages.report.result import Result, ResultBox

TEXT = TextScores(
    text="code", tokens=4088, divergence=0.1309, base_perplexity=29.067, perplexity=32.558, same_top1=0.801,
    accuracy_level="4",
)  # fmt: skip
SPEED = Speed(machine="m", runtime="r", threads=2, base_prompt=300.0, prompt=400.0, base_decode=27.04, decode=88.9)
RESULT = Result(
    folder=Path("models/int4"),
    bytes_before=653_600_000,
    bytes_after=117_800_000,
    evaluation=EvaluationSummary(runtime="r", texts=(TEXT, replace(TEXT, text="notices")), speed=SPEED),
    report=Path("models/int4.weights/report/report.html"),
    next=(
        ("chat", "stages.chat models/int4"),
        ("evaluate", "stages.evaluate models/base models/int4"),
        ("inspect", "stages.inspect models/int4"),
    ),
)


def shown(result: Result, program: str) -> list[str]:
    page = io.StringIO()
    Console(file=page, width=80).print(ResultBox(result, program), crop=False)
    return page.getvalue().splitlines()


def test_a_box_says_what_was_made_and_what_to_do_with_it() -> None:
    lines = shown(RESULT, "genai-quant quantize")
    assert len(lines) <= 12
    assert max(map(len, lines)) == 80
    printed = "\n".join(line.strip("│ ") for line in lines)
    assert "653.6 MB -> 117.8 MB (5.55x smaller)" in printed
    assert "on code    KL 0.131, perplexity 29.07 -> 32.56, same top-1 80.1%" in printed
    assert "texts      code: Python source; notices: licence texts" in printed
    assert "27.0 -> 88.9 tokens/s (3.3x)" in printed
    assert "genai-quant evaluate models/base models/int4\n" in printed
    assert "python -m stages.inspect models/int4" in "\n".join(shown(RESULT, "python -m stages.quantize"))


def test_the_box_says_how_many_tokens_experts_saw_and_names_those_without_any() -> None:
    tokens = ExpertTokens(least=0, median=171.5, most=2304, unseen=("layers.0/moe 1-2", "layers.3/moe 7", "x 1"))
    printed = "\n".join(shown(replace(RESULT, experts=tokens), "genai-quant quantize"))
    assert "experts    tokens: least 0, median 172, most 2,304 (each: report)" in printed
    assert "none for   layers.0/moe 1-2; layers.3/moe 7 and of 1 more layer" in printed
    every = replace(RESULT, experts=replace(tokens, unseen=()))
    assert "none for" not in "\n".join(shown(every, "genai-quant quantize"))


def test_what_was_not_measured_is_not_there() -> None:
    bare = replace(RESULT, evaluation=None)
    printed = "\n".join(shown(bare, "genai-quant quantize"))
    assert "not compared with the base" in printed
    assert printed.startswith("╭")
    assert "tokens/s" not in printed


def test_a_command_that_is_too_long_stays_whole() -> None:
    command = f"stages.inspect {'models/' * 12}int4"
    lines = shown(replace(RESULT, next=(("inspect", command),)), "genai-quant quantize")
    assert f"inspect    {command.replace('stages.', 'genai-quant ')}" in [line.rstrip() for line in lines]
    assert not any("│" in line for line in lines)
