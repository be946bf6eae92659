from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from stages.commands.parsing import parse_size
from stages.commands.quantize_options import QuantizeConfig
from stages.errors import OptionError
from stages.quantization.plan.budget.candidates import (
    BitsBudget,
    BudgetRange,
    SiteCandidates,
    SizeBudget,
    best_allocation,
    check_budget,
    chosen_plan,
    site_candidates,
)
from stages.quantization.plan.embeddings import open_tables, with_tables
from stages.quantization.plan.output_size import OutputSize, table_bytes
from stages.quantization.plan.rules import all_sites
from stages.quantization.targets.choose import choose_formats
from stages.quantization.targets.formats import ModelFacts, OpenFormats, RequestedFormats
from stages.records.formats import EmbeddingPlan, EmbeddingTable, PerBlock, WeightForm
from stages.records.sites import ActivationGroup
from tests.stages.quantization.search.problems import site

Q, DOWN, HEAD = "/model/layers.0/attn/q_proj/MatMul", "/model/layers.0/mlp/down_proj/MatMul", "/lm_head/MatMul"
GROUPS = tuple(
    ActivationGroup(activation=f"x of {name}", in_features=256, sites=(site(name, width, 256),), absorber=None)
    for name, width in ((Q, 64), (DOWN, 64), (HEAD, 512))
)
CONFIG = QuantizeConfig(onnx_path=Path("base"), output_path=Path("out"), target_bpw=5.0)
FACTS = ModelFacts(dtypes=frozenset({"float32"}), in_features=frozenset({256}))
CHOICE = choose_formats(None, RequestedFormats(), FACTS)
FORMATS = OpenFormats(
    four_bit=(PerBlock(block_size=128), PerBlock(block_size=32)),
    zero_points=(False,),
    eight_bit=PerBlock(block_size=128),
)
ALL = {"4b128", "4b32", "8b128"}


def _candidates(formats: OpenFormats = FORMATS, **options: object) -> dict[str, SiteCandidates]:
    config = replace(CONFIG, **options)
    found = site_candidates(GROUPS, config, replace(CHOICE, lm_head=config.lm_head), formats)
    return {each.site.name: each for each in found}


def _losses(**by_site: float) -> dict[str, dict[str, float]]:
    """INT4 of 32 loses half as much as of 128, INT8 nearly nothing; as many units as the site is given."""
    weights = {Q: by_site.get("q", 1.0), DOWN: by_site.get("down", 1.0), HEAD: by_site.get("head", 1.0)}
    return {name: {"4b128": weight, "4b32": weight / 2, "8b128": weight / 100} for name, weight in weights.items()}


def _labels(
    candidates: dict[str, SiteCandidates], budget: object, losses: dict[str, dict[str, float]]
) -> dict[str, str]:
    chosen = best_allocation(tuple(candidates.values()), budget, losses).chosen
    return {name: candidate.key for name, candidate in chosen.items()}


def test_everything_is_open_and_only_lm_head_may_stay() -> None:
    candidates = _candidates()
    assert set(candidates[Q].formats) == set(candidates[DOWN].formats) == ALL
    assert set(candidates[HEAD].formats) == {*ALL, "keep"}


@pytest.mark.parametrize(
    ("options", "name", "formats", "because"),
    [
        ({"exclude": "q_proj"}, Q, {"keep"}, "--exclude q_proj"),
        ({"exclude": "lm_head"}, HEAD, {"keep"}, "--exclude lm_head"),
        ({"layers_8bit": "down_proj"}, DOWN, {"8b128"}, "--layers_8bit"),
        ({"lm_head": "4"}, HEAD, {"4b128", "4b32"}, "--lm_head 4"),
        ({"lm_head": "8"}, HEAD, {"8b128"}, "--lm_head 8"),
        ({"lm_head": "none"}, HEAD, {"keep"}, "--lm_head none"),
    ],
)
def test_what_was_asked_for_by_name_is_no_question_of_the_budget(
    options: dict[str, object], name: str, formats: set[str], because: str
) -> None:
    candidates = _candidates(**options)[name]
    assert set(candidates.formats) == formats
    assert candidates.fixed_because == because


def test_a_runtime_without_int8_offers_none_except_where_it_was_named() -> None:
    candidates = _candidates(replace(FORMATS, eight_bit=None), layers_8bit="down_proj")
    assert set(candidates[Q].formats) == {"4b128", "4b32"}
    assert set(candidates[DOWN].formats) == {"8ch"}


def test_int4_has_zero_points_too_where_they_are_open_and_int8_where_they_were_asked_for() -> None:
    both = replace(FORMATS, zero_points=(False, True))
    assert list(_candidates(both)[Q].formats) == ["4b128", "4b128z", "4b32", "4b32z", "8b128"]
    asked = replace(FORMATS, zero_points=(True,))
    assert list(_candidates(asked, use_zero_point=True)[Q].formats) == ["4b128z", "4b32z", "8b128z"]


def candidate_bytes(each: SiteCandidates, label: str) -> int:
    spec = each.formats[label]
    return 0 if spec is None else spec.format_bytes(each.site.out_features, each.site.in_features)


def _bits(bits_per_weight: float) -> BitsBudget:
    return BitsBudget(bits_per_weight=bits_per_weight, cost=candidate_bytes)


def test_bits_go_where_they_save_most() -> None:
    candidates = _candidates(lm_head="none")
    # Room for one of two equal sites in INT8.
    assert _labels(candidates, _bits(6.25), _losses(q=1.0, down=3.0)) == {
        Q: "4b128", DOWN: "8b128", HEAD: "keep",
    }  # fmt: skip
    assert _labels(candidates, _bits(6.25), _losses(q=3.0, down=1.0))[Q] == "8b128"


@pytest.mark.parametrize("bits", [4.25, 4.6, 5.0, 6.3, 8.25])
def test_stored_bits_a_weight_stay_within_the_budget(bits: float) -> None:
    candidates = _candidates()
    labels = _labels(candidates, _bits(bits), _losses(head=20.0))
    chosen = [(each, labels[name]) for name, each in candidates.items() if labels[name] != "keep"]
    weights = sum(each.site.in_features * each.site.out_features for each, _ in chosen)
    reached = 8 * sum(candidate_bytes(each, label) for each, label in chosen) / weights
    plan = chosen_plan(GROUPS, tuple(candidates.values()), labels, "the budget")
    size = OutputSize(base_bytes=0, form=WeightForm.DQ, embeddings=())
    assert size.bits_per_weight(plan) == reached <= bits


def test_a_head_that_stays_takes_part_in_no_bits_a_weight() -> None:
    candidates = _candidates()
    # So sensitive that even INT8 costs more than the other two could gain.
    assert _labels(candidates, _bits(4.5), _losses(head=1000.0))[HEAD] == "keep"
    # Hardly sensitive: in coarse INT4 it makes room for both others in INT8.
    assert _labels(candidates, _bits(5.1), _losses(head=0.0001, q=10.0, down=10.0)) == {
        Q: "8b128", DOWN: "8b128", HEAD: "4b128",
    }  # fmt: skip


def _size(num_bytes: int, candidates: dict[str, SiteCandidates]) -> SizeBudget:
    def cost(each: SiteCandidates, label: str) -> int:
        full = 4 * each.site.in_features * each.site.out_features
        return full if label == "keep" else candidate_bytes(each, label)

    return SizeBudget(typed=str(num_bytes), num_bytes=num_bytes, fixed_bytes=1000, cost=cost)


def test_a_size_counts_what_stays_and_everything_else() -> None:
    candidates = _candidates()
    full, packed = 4 * 256 * 512, candidate_bytes(candidates[HEAD], "8b128")
    small = sum(candidate_bytes(candidates[name], "4b128") for name in (Q, DOWN))
    with_head = _size(1000 + full + small, candidates)
    assert _labels(candidates, with_head, _losses(head=1000.0))[HEAD] == "keep"
    assert _labels(candidates, _size(1000 + full + small - 1, candidates), _losses(head=1000.0))[HEAD] == "8b128"
    assert _labels(candidates, _size(1000 + packed + small - 1, candidates), _losses(head=1000.0))[HEAD] == "4b32"


def test_a_budget_that_can_not_be_reached_says_what_can() -> None:
    candidates = tuple(_candidates().values())
    with pytest.raises(OptionError, match=r"--target_bpw 4 can't be reached.*from 4\.25 to 8\.25 bits a weight"):
        check_budget(candidates, _bits(4.0))
    reachable = check_budget(candidates, _bits(100.0))
    assert (reachable.smallest, reachable.largest) == (4.25, 8.25)
    assert reachable.summary == "from 4.25 to 8.25 bits a weight can be reached"
    with pytest.raises(OptionError, match=r"--target_size 2000 can't .*from 0\.1MB to 0\.6MB.*did you mean 2000MB\?"):
        check_budget(candidates, _size(2000, _candidates()))


@pytest.mark.parametrize(
    ("unit", "smallest", "largest", "words"),
    [
        ("bytes", 81_240_000.0, 1_081_160_000.0, "from 81.3MB to 1081.2MB"),
        ("bytes", 15_770_000_000.0, 15_780_000_000.0, "from 15770.0MB to 15780.0MB"),
        ("bits a weight", 4.2501, 8.25, "from 4.251 to 8.25 bits a weight"),
    ],
)
def test_ends_of_a_range_can_be_typed(
    unit: Literal["bytes", "bits a weight"], smallest: float, largest: float, words: str
) -> None:
    reachable = BudgetRange(smallest=smallest, largest=largest, unit=unit)
    assert reachable.summary == f"{words} can be reached"
    first = words.split()[1]
    assert (parse_size(first, "--target_size") if unit == "bytes" else float(first)) >= smallest


def test_a_smaller_embedding_is_advised_only_where_it_helps() -> None:
    candidates, budget = _candidates(), _size(2000, _candidates())
    for wider in (True, False):
        with pytest.raises(OptionError) as raised:
            check_budget(tuple(candidates.values()), replace(budget, wider_tables=wider))
        assert ("--embedding 4 makes embeddings smaller" in str(raised.value)) is wider


def test_excluding_everything_is_refused() -> None:
    with pytest.raises(OptionError, match="nothing would be quantized"):
        check_budget(tuple(_candidates(exclude="model,lm_head").values()), _bits(5.0))


def test_the_plan_holds_the_chosen_formats_and_why_others_are_skipped() -> None:
    candidates = tuple(_candidates(exclude="q_proj").values())
    plan = chosen_plan(GROUPS, candidates, {Q: "keep", DOWN: "4b32", HEAD: "keep"}, "the budget")
    assert {name: spec.label for name, spec in plan.specs.items()} == {DOWN: "4b32"}
    assert dict(plan.skipped) == {Q: "--exclude q_proj", HEAD: "the budget"}
    assert [group.sites[0].name for group in plan.groups] == [DOWN]


def test_a_size_weighs_a_table_against_the_sites() -> None:
    """What INT4 of the table saves lets a site be INT8, where that is worth more; plenty of room keeps both."""
    embedding = EmbeddingTable(
        weight="table", gathers=("rows",), vocabulary=256, hidden=64, transposed=False, dtype="float32"
    )
    four, eight = (
        EmbeddingPlan(table=embedding, axis=1, block_size=32, form="gather_block_quantized", bits=bits)
        for bits in (4, 8)
    )
    (table,) = open_tables([eight], [four], all_sites(GROUPS))
    assert list(table.formats) == ["4b32", "8b32", "keep"]
    candidates = _candidates(lm_head="none")
    lowest = sum(candidate_bytes(candidates[name], "4b128") for name in (Q, DOWN)) + table_bytes(embedding, four)
    gained = candidate_bytes(candidates[Q], "8b128") - candidate_bytes(candidates[Q], "4b128")

    def labels(room: int, lost: float) -> dict[str, str]:
        full = 4 * 256 * 512
        budget = replace(_size(1000 + full + lowest + room, candidates), tables=(table,))
        losses = {**_losses(q=1.0, down=0.1), table.name: {"4b32": lost, "8b32": 0.001}}
        return {
            name: each.key for name, each in best_allocation(tuple(candidates.values()), budget, losses).chosen.items()
        }

    assert gained == table_bytes(embedding, eight) - table_bytes(embedding, four)
    assert (labels(gained, 0.5)[table.name], labels(gained, 0.5)[Q]) == ("4b32", "8b128")
    assert (labels(gained, 5.0)[table.name], labels(gained, 5.0)[Q]) == ("8b32", "4b128")
    assert labels(1 << 20, 0.5)[table.name] == "keep"
    assert with_tables([eight], [table], labels(gained, 0.5)) == (four,)
    assert with_tables([eight], [table], labels(1 << 20, 0.5)) == ()
    reachable = check_budget(tuple(candidates.values()), replace(_size(1 << 30, candidates), tables=(table,)))
    assert reachable.smallest == 1000 + 4 * 256 * 512 + lowest
    # What an lm_head is the weight of, or what is shared with one, isn't the table's own question.
    assert open_tables([replace(eight, shared_with=HEAD)], [four], all_sites(GROUPS)) == ()
    tied = replace(embedding, weight=f"{HEAD}.weight")
    assert open_tables([replace(eight, table=tied)], [replace(four, table=tied)], all_sites(GROUPS)) == ()
