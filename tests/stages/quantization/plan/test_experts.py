"""Experts of a node share one format: what options name of one holds for all, and blocks fit both projections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from stages.commands.quantize_options import QuantizeConfig
from stages.errors import OptionError
from stages.quantization.plan.budget.candidates import SiteCandidates, chosen_experts, expert_candidates
from stages.quantization.plan.experts import ExpertPlan, fitting, plan_experts, stored_bytes
from stages.quantization.plan.output_size import OutputSize
from stages.quantization.plan.rules import NamedSites
from stages.quantization.targets.formats import ExpertFormat, FormatChoice, OpenFormats
from stages.records.formats import PerBlock, PerChannel, QuantSpec, WeightForm
from tests.support.mixtures import EXPERTS, HIDDEN, INNER, KINDS, mixture, the_layer

CHOICE = FormatChoice(
    form=WeightForm.DQ,
    four_bit=PerBlock(block_size=32),
    eight_bit=PerBlock(block_size=128),
    symmetric=False,
    scale_range="signed",
    gather_form="gather_block_quantized",
    gather_block_size=32,
    accuracy_level=None,
    experts=ExpertFormat(bits=4, zero_points=True, router_weights=True),
)
NOTHING = NamedSites(eight_bit=frozenset(), skipped={})


OPEN = OpenFormats(
    four_bit=(PerBlock(block_size=128), PerBlock(block_size=32)),
    zero_points=(False, True),
    eight_bit=PerBlock(block_size=128),
)


def planned(
    choice: FormatChoice = CHOICE,
    named: NamedSites = NOTHING,
    kind: str = "gpt-oss",
    given: Mapping[str, QuantSpec | None] = MappingProxyType({}),
) -> ExpertPlan:
    model = mixture(KINDS[kind]).model()
    return plan_experts(model, [the_layer(model)], choice, named, given)


def label(plan: ExpertPlan) -> str:
    (found,) = {spec.label for spec in plan.specs.values()}
    return found


def test_all_experts_get_int4_in_blocks_that_divide_both_sizes() -> None:
    plan = planned()
    assert label(plan) == "4b16z"
    assert len(plan.specs) == 2 * EXPERTS
    assert plan.tables == {"gate_up.weight", "down.weight"}


@pytest.mark.parametrize(
    ("wanted", "hidden", "inner", "found"),
    [
        (PerBlock(block_size=32), 2880, 2880, PerBlock(block_size=32)),
        (PerBlock(block_size=128), 2880, 2880, PerBlock(block_size=64)),
        (PerBlock(block_size=32), 2048, 24, PerChannel()),
        (PerChannel(), 2048, 768, PerChannel()),
    ],
)
def test_blocks_shrink_until_they_fit(
    wanted: PerBlock | PerChannel, hidden: int, inner: int, found: PerBlock | PerChannel
) -> None:
    assert fitting(wanted, hidden, inner, ExpertFormat(bits=4)) == found


def test_one_expert_that_is_named_names_all_of_its_node() -> None:
    one = "y/experts.3/down_proj"
    eight = planned(named=NamedSites(eight_bit=frozenset({one}), skipped={}))
    assert label(eight) == "8b16z"
    kept = planned(named=NamedSites(eight_bit=frozenset(), skipped={one: "--exclude experts.3"}))
    assert kept.groups == ()
    assert kept.stay == dict.fromkeys(("gate_up.weight", "down.weight"), "--exclude experts.3")


def test_an_older_release_gets_no_zero_points_and_no_softmax_over_all() -> None:
    older = replace(CHOICE, experts=ExpertFormat(bits=4))
    assert label(planned(older)) == "4b16"
    assert "softmax over all" in planned(older, kind="relu over all").stay["down.weight"]


def test_experts_that_stay_have_a_reason() -> None:
    stays = planned(replace(CHOICE, experts=None, experts_stay="--experts none"))
    assert set(stays.stay.values()) == {"--experts none"}
    halves = planned_with({**KINDS["gpt-oss"], "swiglu_fusion": 2})
    assert "interleaved" in halves.stay["gate_up.weight"]


@pytest.mark.parametrize(
    ("changed", "kind", "reason"),
    [
        ({"dtypes": frozenset({"float16"})}, "gpt-oss", "takes float16 only"),
        ({"activations": frozenset({"swiglu"})}, "silu", "runs swiglu only, not silu"),
        ({"most": EXPERTS - 1}, "gpt-oss", "chooses from 4 experts at most"),
        ({"multiple": 64}, "gpt-oss", "a multiple of 64 inputs"),
        ({"blocks": (64, 32), "per_channel": False}, "gpt-oss", "blocks of 32, 64 that divide its sizes, 32 and 48"),
    ],
)
def test_what_a_runtime_does_not_take_stays_with_its_reason(changed: dict[str, object], kind: str, reason: str) -> None:
    narrower = replace(CHOICE, experts=replace(ExpertFormat(bits=4, whose="CUDA's"), **changed))  # type: ignore[arg-type]
    plan = planned(narrower, kind=kind)
    assert plan.groups == ()
    assert set(plan.stay) == {"gate_up.weight", "down.weight"}
    assert plan.stay["down.weight"].startswith("CUDA's QMoE ")
    assert reason in plan.stay["down.weight"]


@pytest.mark.parametrize(
    ("wanted", "found"), [(PerBlock(block_size=16), 32), (PerChannel(), 32), (PerBlock(block_size=256), 64)]
)
def test_where_no_scale_per_channel_is_taken_the_nearest_block_is(wanted: PerBlock | PerChannel, found: int) -> None:
    experts = ExpertFormat(bits=4, blocks=(128, 64, 32), per_channel=False)
    assert fitting(wanted, 2880, 2880, experts) == PerBlock(block_size=found)
    assert fitting(wanted, 2880, 48, experts) is None


def planned_with(attributes: dict[str, int | float | str | list[int]]) -> ExpertPlan:
    model = mixture(attributes).model()
    return plan_experts(model, [the_layer(model)], CHOICE, NOTHING)


def candidates_of(formats: OpenFormats, choice: FormatChoice = CHOICE, **options: object) -> SiteCandidates:
    config = QuantizeConfig(onnx_path=Path("base"), output_path=Path("out"), **options)
    (found,) = expert_candidates(planned(choice), config, choice, formats)
    return found


def test_a_budget_chooses_one_format_for_a_node_among_those_that_fit_it() -> None:
    found = candidates_of(OPEN)
    assert found.name == "y/experts"
    assert len(found.sites) == 2 * EXPERTS
    # Of 128 and 32 numbers remain 16, which divide 32 and 48.
    assert list(found.formats) == ["4b16", "4b16z", "8b16"]
    size = OutputSize(base_bytes=0, form=WeightForm.DQ, embeddings=(), byte_scales=True)
    assert sum(size.number_bytes(site, found.specs["4b16z"]) for site in found.sites) == EXPERTS * sum(
        stored_bytes(rows, columns, found.specs["4b16z"]) for rows, columns in ((2 * INNER, HIDDEN), (HIDDEN, INNER))
    )
    plan = chosen_experts(planned(), [found], {"y/experts": "8b16"})
    assert label(plan) == "8b16"
    assert len(plan.specs) == 2 * EXPERTS


def test_options_narrow_what_a_budget_may_choose_for_experts() -> None:
    older = replace(CHOICE, experts=ExpertFormat(bits=4))
    assert list(candidates_of(OPEN, older).formats) == ["4b16", "8b16"]
    asked = candidates_of(OPEN, experts="4")
    assert (list(asked.formats), asked.fixed_because) == (["4b16", "4b16z"], "--experts 4")
    assert list(candidates_of(replace(OPEN, eight_bit=None)).formats) == ["4b16", "4b16z"]
    measured = candidates_of(OPEN, sensitivity="measured", target_bpw=5.0)
    assert list(measured.formats) == ["4b16z"]
    assert "measured" in measured.fixed_because


def test_a_plan_file_decides_about_a_nodes_experts() -> None:
    eight = QuantSpec(bits=8, symmetric=True, granularity=PerBlock(block_size=16), scale_dtype="float32")
    assert label(planned(given={"y/experts": eight})) == "8b16"
    assert set(planned(given={"y/experts": None}).stay.values()) == {"--plan: keep"}
    with pytest.raises(OptionError, match="can't have blocks of 8b64 with the inputs of 'y/experts', 32 and 48"):
        planned(given={"y/experts": replace(eight, granularity=PerBlock(block_size=64))})


def test_stored_bytes_are_those_of_the_arrays() -> None:
    spec = QuantSpec(bits=4, symmetric=False, granularity=PerBlock(block_size=16), scale_dtype="float16")
    arrays = np.empty((6, 24), np.uint8), np.empty((6, 3), np.float16), np.empty((6, 2), np.uint8)
    assert stored_bytes(6, 48, spec) == sum(array.nbytes for array in arrays)
