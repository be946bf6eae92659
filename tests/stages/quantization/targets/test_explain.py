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
    choice = choose(runtime, requested=requested, model=facts(widths=(64,), head=True))
    return {line.option: (line.chosen, line.why) for line in choice.explanations}


ASKED = {
    "--weight_operator": ({"form": WeightForm.DQ}, "dq"),
    "--block_size": ({"block_size": 64}, "64"),
    "--use_zero_point": ({"zero_point": False}, "no"),
    "--lm_head": ({"lm_head": "none"}, "none"),
    "--embedding": ({"embedding": "none"}, "none"),
    "--int8_block_size": ({"eight_bit": PerBlock(block_size=16), "named_eight_bit": True}, "16"),
}


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("option", ASKED)
def test_what_was_asked_for_is_called_so_and_nothing_else(option: str, runtime: Runtime) -> None:
    asked, chosen = ASKED[option]
    lines = _lines(runtime, RequestedFormats(**asked))
    assert lines[option] == (chosen, "as asked")
    assert [line for line, (_, why) in lines.items() if why == "as asked"] == [option]


@pytest.mark.parametrize(
    ("option", "asked", "chosen", "because_of"),
    [
        ("--use_zero_point", {"zero_point": True}, "yes", []),
        ("--scale_range", {"scale_range": "compat7", "zero_point": False}, "compat7", ["--use_zero_point"]),
        ("--gather_form", {"gather_form": "dq", "embedding": "4"}, "dq", ["--embedding"]),
        ("--gather_block_size", {"gather_block_size": 16, "embedding": "4"}, "16", ["--embedding"]),
    ],
)
def test_what_needs_another_option_is_called_as_asked_with_it(
    option: str, asked: dict[str, object], chosen: str, because_of: list[str]
) -> None:
    for runtime in RUNTIMES:
        lines = _lines(runtime, RequestedFormats(**asked))
        assert lines[option] == (chosen, "as asked")
        assert sorted(line for line, (_, why) in lines.items() if why == "as asked") == sorted([option, *because_of])


def test_an_accuracy_level_has_a_line_where_it_means_something() -> None:
    asked = RequestedFormats(accuracy_level=1)
    assert [_lines(runtime, asked).get("--accuracy_level") for runtime in ("cpu", "webgpu", "cuda")] == [
        ("1", "as asked"), ("1", "as asked"), None,
    ]  # fmt: skip


def test_int8_has_a_line_where_a_site_becomes_int8() -> None:
    assert "--int8_block_size" not in _lines("cpu", RequestedFormats(lm_head="4"))
    assert _lines("cpu", RequestedFormats())["--int8_block_size"][0] == "128"
    assert _lines("trt-rtx", RequestedFormats(mixed=True))["--int8_block_size"][0] == "channel"
    without = _lines("dml", RequestedFormats(mixed=True))
    assert "--int8_block_size" not in without
    assert without["--enable_mixed_quant"][0] == "floating point"
    named = _lines("cpu", RequestedFormats(named_eight_bit=True, eight_bit=PerChannel()))
    assert named["--int8_block_size"] == ("channel", "as asked")
    assert named["session.qdq_matmulnbits_block_size"][0] == "128"


def test_an_embedding_has_its_lines_only_where_there_is_one() -> None:
    lines = _lines("cpu", RequestedFormats())
    assert (lines["--embedding"][0], lines["--gather_block_size"][0]) == ("8", "128")
    assert _lines("cpu", RequestedFormats(embedding="4"))["--gather_block_size"][0] == "32"
    chosen, why = _lines("dml", RequestedFormats())["--embedding"]
    assert (chosen, why) == ("none", "DirectML has no GatherBlockQuantized: 0.3 MB stay in floating point")
    assert not any("embedding" in line.option or "gather" in line.option for line in choose("cpu").explanations)


def test_a_release_that_was_never_seen_is_said() -> None:
    known, newer = (
        choose_formats(parse_target(name), RequestedFormats(), facts()).explanations
        for name in ("cpu@1.31", "cpu@1.99")
    )
    assert "--target" not in {line.option for line in known}
    assert next(line for line in newer if line.option == "--target").why


def test_the_table_shows_brackets_as_they_are() -> None:
    choice = choose_formats(parse_target("cpu"), RequestedFormats(), facts())
    console = Console(file=StringIO(), width=300)
    console.print(choice_table("cpu@1.32", choice.explanations))
    file = console.file
    assert isinstance(file, StringIO)
    text = file.getvalue()
    assert "rows [K, N]" in text
    assert all(line.option in text and line.why in text for line in choice.explanations)
