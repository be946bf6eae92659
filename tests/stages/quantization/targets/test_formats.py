import pytest

from stages.commands.parsing import parse_target
from stages.quantization.targets.choose import open_formats
from stages.quantization.targets.formats import ModelFacts, RequestedFormats
from stages.records.formats import PerBlock, PerChannel

TRAITS = ModelFacts(dtypes=frozenset({"float16"}), in_features=frozenset({2048, 5632}))


@pytest.mark.parametrize(
    ("target", "blocks", "eight_bit"),
    [
        (None, (128, 64, 32), PerBlock(block_size=128)),
        ("cpu", (128, 64, 32), PerBlock(block_size=128)),
        ("cpu@1.22", (128, 64, 32), None),
        ("cuda", (128, 64, 32), PerBlock(block_size=32)),
        ("dml", (128, 64, 32), None),
        ("trt-rtx", (128, 64), PerChannel()),
        ("webgpu", (32,), PerBlock(block_size=32)),
        ("webgpu@1.22", (32,), None),
        ("qnn", (32,), None),
    ],
)
def test_a_budget_chooses_among_what_the_runtime_runs_fast(
    target: str | None, blocks: tuple[int, ...], eight_bit: PerBlock | PerChannel | None
) -> None:
    found = open_formats(None if target is None else parse_target(target), RequestedFormats(), TRAITS)
    assert tuple(each.block_size for each in found.four_bit) == blocks
    assert found.eight_bit == eight_bit


def test_trt_rtx_offers_only_blocks_that_divide_every_row() -> None:
    facts = ModelFacts(dtypes=frozenset({"float16"}), in_features=frozenset({576, 1536}))
    found = open_formats(parse_target("trt-rtx"), RequestedFormats(), facts)
    assert [each.block_size for each in found.four_bit] == [64]


@pytest.mark.parametrize("target", [None, "cuda"])
def test_what_was_asked_for_wins(target: str | None) -> None:
    requested = RequestedFormats(block_size=16, eight_bit=PerChannel())
    found = open_formats(None if target is None else parse_target(target), requested, TRAITS)
    assert found.four_bit == (PerBlock(block_size=16),)
    assert found.eight_bit == PerChannel()
