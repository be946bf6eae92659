import pytest

from stages.errors import RecipeError
from stages.records import ActivationGroup, NormAbsorber, PerBlock
from stages.solve.recipe import QuantPlan, make_plan
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


def _plan(exclude: str) -> QuantPlan:
    return make_plan(GROUPS, exclude, PerBlock(block_size=32), symmetric=True)


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
    assert len(make_plan(GROUPS[:2], "lm_head", PerBlock(block_size=32), symmetric=True).specs) == 3


def test_excluding_everything_is_refused() -> None:
    with pytest.raises(RecipeError, match="nothing would be quantized"):
        _plan("model,lm_head")
