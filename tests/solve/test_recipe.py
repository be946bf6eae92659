from dataclasses import replace

import pytest

from stages.errors import RecipeError
from stages.records import ActivationGroup, NormAbsorber, PerBlock, PerChannel
from stages.solve.recipe import FormatRules, QuantPlan, make_plan
from tests.solve.problems import site


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


RULES = FormatRules(
    four_bit=PerBlock(block_size=32),
    eight_bit=PerChannel(),
    symmetric=True,
    exclude="lm_head",
    layers_8bit="",
    mixed=False,
    mixed_rule="modelopt",
    lm_head=None,
)


def _plan(exclude: str) -> QuantPlan:
    return make_plan(GROUPS, replace(RULES, exclude=exclude))


def _eight_bit(**changes: object) -> set[str]:
    plan = make_plan(GROUPS, replace(RULES, **changes))
    return {name for name, spec in plan.specs.items() if spec.bits == 8}


def test_plan_is_total() -> None:
    plan = _plan("lm_head")
    assert set(plan.specs) | {name for name, _ in plan.kept} == {s.name for g in GROUPS for s in g.sites}
    assert plan.kept == (("/lm_head/MatMul", "--exclude lm_head"),)


def test_a_pattern_is_a_whole_part_of_a_name() -> None:
    assert {name for name, _ in _plan("layers.1").kept} == {s.name for s in GROUPS[0].sites}


def test_a_kept_sibling_forbids_the_fold() -> None:
    group = _plan("v_proj,lm_head").groups[0]
    assert [s.name for s in group.sites] == ["/model/layers.1/attn/q_proj/MatMul"]
    assert group.absorber is None
    assert "v_proj" in group.unfoldable_because


def test_a_pattern_that_matches_nothing_lists_the_nearest_names() -> None:
    with pytest.raises(RecipeError, match=r"'dwn_proj' matches no site.*down_proj"):
        _plan("dwn_proj")


def test_a_model_without_lm_head_is_fine_by_default() -> None:
    assert len(make_plan(GROUPS[:2], RULES).specs) == 3


def test_excluding_everything_is_refused() -> None:
    with pytest.raises(RecipeError, match="nothing would be quantized"):
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
    rules = replace(RULES, mixed=True, keep_mixed_because="it has none")
    plan = make_plan(GROUPS, rules)
    kept = dict(plan.kept)
    # Both of the rule's sites: one of one v_proj, one of one down_proj.
    for name in ("/model/layers.1/attn/v_proj/MatMul", "/model/layers.10/mlp/down_proj/MatMul"):
        assert kept[name] == "--enable_mixed_quant: it has none"
    assert {spec.label for spec in plan.specs.values()} == {"4b32"}
    named = make_plan(GROUPS, replace(rules, layers_8bit="down_proj", lm_head="8"))
    eight_bit = {name for name, spec in named.specs.items() if spec.bits == 8}
    assert eight_bit == {"/model/layers.10/mlp/down_proj/MatMul", "/lm_head/MatMul"}
    assert named.kept == ()


def test_layers_8bit_replaces_the_mixed_rule_and_refuses_what_matches_nothing() -> None:
    assert _eight_bit(mixed=True, layers_8bit="q_proj") == {"/model/layers.1/attn/q_proj/MatMul"}
    with pytest.raises(RecipeError, match=r"--layers_8bit: 'layers\.7' matches no site"):
        _eight_bit(layers_8bit="layers.7")


def test_lm_head_option_wins_over_patterns() -> None:
    head = "/lm_head/MatMul"
    specs = {choice: make_plan(GROUPS, replace(RULES, lm_head=choice)).specs for choice in ("4", "8", "none")}
    assert (specs["4"][head].bits, specs["8"][head].bits) == (4, 8)
    assert head not in specs["none"]
    assert head not in make_plan(GROUPS, replace(RULES, exclude="", lm_head="none")).specs
    assert make_plan(GROUPS, replace(RULES, layers_8bit="lm_head", lm_head="4")).specs[head].bits == 4


def test_eight_bit_sites_have_their_own_granularity() -> None:
    plan = make_plan(GROUPS, replace(RULES, layers_8bit="down_proj", eight_bit=PerBlock(block_size=128)))
    assert {spec.label for spec in plan.specs.values()} == {"4b32", "8b128"}
    assert plan.eight_bit_sites == 1


def _with_router() -> tuple[ActivationGroup, ...]:
    group = _group("/model/layers.1/moe/router/MatMul")
    return (*GROUPS, replace(group, sites=tuple(replace(member, routes_experts=True) for member in group.sites)))


def test_a_router_is_kept_unless_it_is_named() -> None:
    router = "/model/layers.1/moe/router/MatMul"
    plan = make_plan(_with_router(), RULES)
    assert "router of a mixture of experts" in dict(plan.kept)[router]
    assert plan.kept_routers == 1
    named = make_plan(_with_router(), replace(RULES, layers_8bit="router"))
    assert named.specs[router].bits == 8
    assert named.kept_routers == 0
    excluded = make_plan(_with_router(), replace(RULES, exclude="router,lm_head"))
    assert dict(excluded.kept)[router] == "--exclude router"
