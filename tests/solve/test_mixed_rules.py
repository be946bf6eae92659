import pytest

from stages.errors import RecipeError
from stages.records import MatMulSite
from stages.solve.mixed_rules import MixedRule, sensitive_sites
from tests.solve.problems import site

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
    with pytest.raises(RecipeError, match="no site is called"):
        sensitive_sites([site(name.format(0), 4, 4)], "modelopt")


@pytest.mark.parametrize("rule", ["modelopt", "llamacpp"])
def test_a_rule_that_finds_nothing_is_an_error(rule: MixedRule) -> None:
    # The competitor silently stores nothing as INT8.
    with pytest.raises(RecipeError, match=r"--enable_mixed_quant.*--layers_8bit"):
        sensitive_sites([site("transformer/h.0/mlp/c_proj", 4, 4)], rule)
