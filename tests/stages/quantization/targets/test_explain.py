"""The table of a choice: what was asked for is called so, and the rest has the runtime's reason."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from stages.commands.parsing import Runtime, parse_target
from stages.quantization.targets.choose import choose_formats
from stages.quantization.targets.explain import choice_table
from stages.quantization.targets.formats import RequestedFormats
from stages.records.formats import PerBlock, PerChannel, WeightForm
from tests.stages.quantization.targets.requests import RUNTIMES, choose, facts


def _lines(runtime: Runtime, requested: RequestedFormats) -> dict[str, tuple[str, str]]:
    """Option -> what was chosen, and why."""
    choice = choose(runtime, requested=requested, model=facts(widths=(64,)))
    return {line.option: (line.chosen, line.why) for line in choice.explanations}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_what_was_asked_for_is_called_so(runtime: Runtime) -> None:
    asked = RequestedFormats(
        form=WeightForm.DQ,
        block_size=64,
        eight_bit=PerBlock(block_size=16),
        named_eight_bit=True,
        zero_point=True,
        gather_axis=1,
        gather_form="gather_block_quantized",
        gather_block_size=16,
        accuracy_level=1,
    )
    lines = _lines(runtime, asked)
    for option, chosen in {
        "--weight_operator": "dq",
        "--block_size": "64",
        "--use_zero_point": "yes",
        "--int8_block_size": "16",
        "--gather_form": "gather_block_quantized",
        "--gather_block_size": "16",
    }.items():
        assert lines[option] == (chosen, "as asked")
    assert lines.get("--accuracy_level", ("1", "as asked")) == ("1", "as asked")
    assert "--scale_range" not in lines  # of codes with a zero point
    unasked = _lines(runtime, RequestedFormats())
    assert "as asked" not in {why for _, why in unasked.values()}


def test_int8_has_a_line_where_a_site_becomes_int8() -> None:
    assert "--int8_block_size" not in _lines("cpu", RequestedFormats())
    assert _lines("trt-rtx", RequestedFormats(mixed=True))["--int8_block_size"][0] == "channel"
    without = _lines("dml", RequestedFormats(mixed=True))
    assert "--int8_block_size" not in without
    assert without["--enable_mixed_quant"][0] == "floating point"
    named = _lines("cpu", RequestedFormats(named_eight_bit=True, eight_bit=PerChannel()))
    assert named["--int8_block_size"] == ("channel", "as asked")
    assert named["session.qdq_matmulnbits_block_size"][0] == "128"


def test_an_embedding_has_its_lines_only_where_there_is_one() -> None:
    assert _lines("cpu", RequestedFormats())["embedding"][0] == "as it is"
    assert not any("embedding" in line.option or "gather" in line.option for line in choose("cpu").explanations)


def test_a_release_that_was_never_seen_is_said() -> None:
    known, newer = (
        choose_formats(parse_target(name), RequestedFormats(), facts()).explanations
        for name in ("cpu@1.31", "cpu@1.99")
    )
    assert "--target" not in {line.option for line in known}
    assert next(line for line in newer if line.option == "--target").why


def test_the_table_shows_brackets_as_they_are() -> None:
    target = parse_target("cpu")
    choice = choose_formats(target, RequestedFormats(), facts())
    console = Console(file=StringIO(), width=300)
    console.print(choice_table(target, choice))
    file = console.file
    assert isinstance(file, StringIO)
    text = file.getvalue()
    assert "rows [K, N]" in text
    assert all(line.option in text and line.why in text for line in choice.explanations)
