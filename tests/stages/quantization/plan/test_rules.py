from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.commands.quantize_options import MixedRule, QuantizeConfig
from stages.errors import OptionError
from stages.quantization.plan.rules import QuantPlan, excludes_lm_head, make_plan, sensitive_sites
from stages.quantization.targets.choose import choose_formats
from stages.quantization.targets.formats import ModelFacts, RequestedFormats
from stages.records.formats import PerBlock
from stages.records.sites import ActivationGroup, MatMulSite, NormAbsorber
from tests.stages.quantization.search.problems import site

# Lists of the two tools' own rules for 32 layers.
MODELOPT = {0, 1, 2, 3, 4, 7, 10, 13, 16, 19, 22, 25, 28, 29, 30, 31}


LLAMACPP = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}


def _layers(count: int, *kinds: str) -> list[MatMulSite]:
    return [site(f"/model/layers.{index}/{kind}/MatMul", 4, 4) for index in range(count) for kind in kinds]


@pytest.mark.parametrize(("rule", "expected"), [("modelopt", MODELOPT), ("llamacpp", LLAMACPP)])
def test_the_rules_of_both_tools_for_32_layers(rule: MixedRule, expected: set[int]) -> None:
    chosen = sensitive_sites(_layers(32, "attn/qkv_proj", "attn/o_proj", "mlp/down_proj", "mlp/up_proj"), rule)
    assert set(chosen) == {
        f"/model/layers.{index}/{kind}/MatMul" for index in expected for kind in ("attn/qkv_proj", "mlp/down_proj")
    }


def test_llamacpp_counts_its_end_from_seven_eighths() -> None:
    # 30 layers: 7 * 30 // 8 = 26, so the last four; 30 // 8 = 3 would make it three.
    chosen = sensitive_sites(_layers(30, "mlp/down_proj"), "llamacpp")
    numbers = {int(name.split("layers.")[1].split("/")[0]) for name in chosen}
    assert numbers == {0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29}


def test_v_is_taken_where_projections_are_separate_and_layers_are_ordered_by_number() -> None:
    chosen = sensitive_sites(_layers(12, "attn/q_proj", "attn/k_proj", "attn/v_proj"), "modelopt")
    assert set(chosen) == {f"/model/layers.{index}/attn/v_proj/MatMul" for index in (0, 1, 4, 7, 10, 11)}


@pytest.mark.parametrize(
    "name",
    [
        "/model/layers/{}/attn/qkv_proj/MatMul",
        "model.layers.{}.self_attn.v_proj.weight",
        "layers.{}/mlp/down_proj",
        "/model/layers.{}/mlp/down_proj/MatMul_quant",
    ],
)
def test_layers_are_counted_in_every_way_of_naming_them(name: str) -> None:
    sites = [site(name.format(index), 4, 4) for index in range(12)]
    assert sensitive_sites(sites, "modelopt") == tuple(name.format(index) for index in (0, 1, 4, 7, 10, 11))


@pytest.mark.parametrize(
    "name",
    [
        "/model/layers.{}/mlp/down_projector/MatMul",
        "/model/layers.{}/mlp/experts/mlp/down_proj/MatMul",
        "/model/blocks.{}/mlp/down_proj/MatMul",
    ],
)
def test_names_that_only_look_alike_are_left(name: str) -> None:
    with pytest.raises(OptionError, match="no site is called"):
        sensitive_sites([site(name.format(0), 4, 4)], "modelopt")


@pytest.mark.parametrize("rule", ["modelopt", "llamacpp"])
def test_a_rule_that_finds_nothing_is_an_error(rule: MixedRule) -> None:
    # The competitor silently stores nothing as INT8.
    with pytest.raises(OptionError, match=r"--enable_mixed_quant.*--layers_8bit"):
        sensitive_sites([site("transformer/h.0/mlp/c_proj", 4, 4)], rule)


def _group(*names: str) -> ActivationGroup:
    return ActivationGroup(
        activation=f"x of {names[0]}",
        in_features=32,
        sites=tuple(site(name, 16, 32) for name in names),
        absorber=NormAbsorber(output="x", parameters=("gain",)),
    )


GROUPS = (
    _group("/model/layers.1/attn/q_proj/MatMul", "/model/layers.1/attn/v_proj/MatMul"),
    _group("/model/layers.10/mlp/down_proj/MatMul"),
    _group("/lm_head/MatMul"),
)


FACTS = ModelFacts(dtypes=frozenset({"float32"}), in_features=frozenset({32}))
CONFIG = QuantizeConfig(onnx_path=Path("base"), output_path=Path("out"))
CHOICE = choose_formats(None, RequestedFormats(block_size=32), FACTS)


def _plan(exclude: str) -> QuantPlan:
    return _made(exclude=exclude)


def _made(groups: tuple[ActivationGroup, ...] = GROUPS, **options: object) -> QuantPlan:
    config = replace(CONFIG, **options)
    return make_plan(groups, config, replace(CHOICE, lm_head=config.lm_head))


def _eight_bit(**changes: object) -> set[str]:
    plan = _made(**changes)
    return {name for name, spec in plan.specs.items() if spec.bits == 8}


def test_plan_is_total() -> None:
    plan = _plan("lm_head")
    assert set(plan.specs) | {name for name, _ in plan.skipped} == {s.name for g in GROUPS for s in g.sites}
    assert plan.skipped == (("/lm_head/MatMul", "--exclude lm_head"),)


def test_a_pattern_is_a_whole_part_of_a_name() -> None:
    assert {name for name, _ in _plan("layers.1").skipped} == {s.name for s in GROUPS[0].sites}


def test_a_skipped_sibling_forbids_the_fold() -> None:
    group = _plan("v_proj,lm_head").groups[0]
    assert [s.name for s in group.sites] == ["/model/layers.1/attn/q_proj/MatMul"]
    assert group.absorber is None
    assert "v_proj" in group.unfoldable_because


def test_a_pattern_that_matches_nothing_lists_the_nearest_names() -> None:
    with pytest.raises(OptionError, match=r"'dwn_proj' matches no site.*down_proj"):
        _plan("dwn_proj")


def test_a_model_without_lm_head_is_fine_by_default() -> None:
    assert len(_made(GROUPS[:2]).specs) == 3


def test_excluding_everything_is_refused() -> None:
    with pytest.raises(OptionError, match="nothing would be quantized"):
        _plan("model,lm_head")


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("layers.1", {"/model/layers.1/attn/q_proj/MatMul", "/model/layers.1/attn/v_proj/MatMul"}),
        ("model/layers.1/attn/v_proj", {"/model/layers.1/attn/v_proj/MatMul"}),
        ("v_proj,down_proj", {"/model/layers.1/attn/v_proj/MatMul", "/model/layers.10/mlp/down_proj/MatMul"}),
        ("lm_head", {"/lm_head/MatMul"}),
    ],
)
def test_layers_8bit_takes_layers_paths_parts_of_names_and_lm_head(patterns: str, expected: set[str]) -> None:
    assert _eight_bit(layers_8bit=patterns) == expected


def test_sites_of_the_mixed_rule_stay_where_the_target_has_no_int8_and_named_ones_do_not() -> None:
    choice, config = replace(CHOICE, keep_mixed_because="it has none"), replace(CONFIG, enable_mixed_quant=True)
    plan = make_plan(GROUPS, config, choice)
    skipped = dict(plan.skipped)
    # Both of the rule's sites: one of one v_proj, one of one down_proj.
    for name in ("/model/layers.1/attn/v_proj/MatMul", "/model/layers.10/mlp/down_proj/MatMul"):
        assert skipped[name] == "--enable_mixed_quant: it has none"
    assert {spec.label for spec in plan.specs.values()} == {"4b32"}
    named = make_plan(GROUPS, replace(config, layers_8bit="down_proj", lm_head="8"), replace(choice, lm_head="8"))
    eight_bit = {name for name, spec in named.specs.items() if spec.bits == 8}
    assert eight_bit == {"/model/layers.10/mlp/down_proj/MatMul", "/lm_head/MatMul"}
    assert named.skipped == ()


def test_layers_8bit_replaces_the_mixed_rule_and_refuses_what_matches_nothing() -> None:
    assert _eight_bit(enable_mixed_quant=True, layers_8bit="q_proj") == {"/model/layers.1/attn/q_proj/MatMul"}
    with pytest.raises(OptionError, match=r"--layers_8bit: 'layers\.7' matches no site"):
        _eight_bit(layers_8bit="layers.7")
    with pytest.raises(OptionError, match=r"--layers_8bit: '\*' matches no site; a name is /model/layers\.1/"):
        _eight_bit(layers_8bit="*")


def test_lm_head_option_wins_over_patterns() -> None:
    head = "/lm_head/MatMul"
    specs = {choice: _made(lm_head=choice).specs for choice in ("4", "8", "none")}
    assert (specs["4"][head].bits, specs["8"][head].bits) == (4, 8)
    assert head not in specs["none"]
    assert head not in _made(exclude="", lm_head="none").specs
    assert _made(layers_8bit="lm_head", lm_head="4").specs[head].bits == 4


@pytest.mark.parametrize(
    ("options", "bits"),
    [({}, 8), ({"lm_head": "4"}, 4), ({"exclude": "lm_head"}, None), ({"exclude": "q_proj"}, 8)],
)
def test_the_targets_head_gives_way_to_what_was_asked_for(options: dict[str, Any], bits: int | None) -> None:
    config, head = replace(CONFIG, **options), "/lm_head/MatMul"
    asked = "none" if excludes_lm_head([s for g in GROUPS for s in g.sites], config) else config.lm_head
    plan = make_plan(GROUPS, config, replace(CHOICE, lm_head=asked or "8"))
    assert (plan.specs[head].bits if head in plan.specs else None) == bits


def test_eight_bit_sites_have_their_own_granularity() -> None:
    choice = replace(CHOICE, eight_bit=PerBlock(block_size=128))
    plan = make_plan(GROUPS, replace(CONFIG, layers_8bit="down_proj"), choice)
    assert {spec.label for spec in plan.specs.values()} == {"4b32", "8b128"}
    assert plan.eight_bit_sites == 1


def _with_router() -> tuple[ActivationGroup, ...]:
    group = _group("/model/layers.1/moe/router/MatMul")
    return (*GROUPS, replace(group, sites=tuple(replace(member, routes_experts=True) for member in group.sites)))


def test_a_router_is_skipped_unless_it_is_named() -> None:
    router = "/model/layers.1/moe/router/MatMul"
    plan = _made(_with_router())
    assert "router of a mixture of experts" in dict(plan.skipped)[router]
    assert plan.skipped_routers == 1
    named = _made(_with_router(), layers_8bit="router")
    assert named.specs[router].bits == 8
    assert named.skipped_routers == 0
    excluded = _made(_with_router(), exclude="router,lm_head")
    assert dict(excluded.skipped)[router] == "--exclude router"


def test_gates_of_recurrent_states_are_int8_where_the_target_runs_it_and_nobody_says_otherwise() -> None:
    gate = "/model/layers.1/linear_attn/a_proj/MatMul"
    group = _group(gate)
    groups = (*GROUPS, replace(group, sites=tuple(replace(member, gates_state=True) for member in group.sites)))
    assert _made(groups).specs[gate].bits == 8
    assert _made(groups).eight_bit_sites == 1
    assert _made(groups, layers_8bit="down_proj").specs[gate].bits == 4
    slow = replace(CHOICE, keep_mixed_because="INT8 is slow there")
    assert make_plan(groups, CONFIG, slow).specs[gate].bits == 4
