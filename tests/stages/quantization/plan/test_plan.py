"""Plan a builder-made model: which option decides what, and what a search's digest covers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

from stages.commands.parsing import parse_target
from stages.commands.quantize_options import QuantizeConfig
from stages.errors import OptionError
from stages.model.directory import locate_model
from stages.model.load import load_graph
from stages.model.sites import find_groups
from stages.quantization.plan.budget.left_open import OpenPlan
from stages.quantization.plan.plan import ModelPlan, plan_model
from stages.quantization.plan.plan_file import PlannedSite, plan_text, write_plan
from stages.quantization.plan.recipe import describe_recipe, make_recipe
from stages.quantization.plan.rules import all_sites
from stages.records.formats import PerBlock, PerChannel, QuantSpec, WeightForm

HEAD = "/lm_head/MatMul"


@pytest.fixture
def model(tiny_model: Path) -> ir.Model:
    return load_graph(locate_model(tiny_model))


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> QuantizeConfig:
    return QuantizeConfig(onnx_path=tiny_model, output_path=tmp_path / "out", target="any")


def _planned(config: QuantizeConfig, model: ir.Model) -> ModelPlan:
    return plan_model(config, model, locate_model(config.onnx_path))


def _finest(undecided: OpenPlan) -> dict[str, QuantSpec]:
    """Return INT8 for every site but lm_head, which takes most where it stays."""
    return {each.site.name: each.specs["8b128"] for each in undecided.candidates if each.site.name != HEAD}


def _plan_file(model: ir.Model, path: Path, *formats: str) -> Path:
    """Write a plan in which the sites have ``formats`` in turn, and lm_head stays."""
    names = [site.name for site in all_sites(find_groups(model)) if site.name != HEAD]
    lines = {name: PlannedSite(format=formats[index % len(formats)]) for index, name in enumerate(names)}
    write_plan(path, plan_text({**lines, HEAD: PlannedSite(format="keep")}))
    return path


def test_every_site_is_planned_once(config: QuantizeConfig, model: ir.Model) -> None:
    plan = _planned(config, model)
    names = [site.name for site in all_sites(find_groups(model))]
    skipped = dict(plan.sites.skipped)
    assert sorted([*plan.sites.specs, *(name for name in skipped if name in names)]) == sorted(names)
    assert skipped[HEAD] == "--exclude lm_head"
    assert {spec.label for spec in plan.sites.specs.values()} == {"4b128"}
    assert plan.left_open is None
    assert [part.op_type for part in plan.unquantized] == ["Gather"]
    embedded = _planned(replace(config, gather_quantize_axis=1), model)
    assert len(embedded.embeddings) == 1
    assert embedded.unquantized == ()


def test_a_plan_file_decides_about_formats_and_the_target_about_the_rest(
    config: QuantizeConfig, model: ir.Model, tmp_path: Path
) -> None:
    path = _plan_file(model, tmp_path / "p.toml", "4b64z", "8ch", "4b64")
    asked = replace(config, plan=path, target="cuda")
    plan = _planned(asked, model)
    labels = [spec.label for spec in plan.sites.specs.values()]
    assert labels == [("4b64z", "8ch", "4b64")[index % 3] for index in range(len(labels))]
    without = _planned(replace(asked, use_zero_point=False), model)
    assert {spec.label for spec in without.sites.specs.values()} == {"4b64", "8ch"}
    assert dict(plan.sites.skipped)[HEAD] == "--plan p.toml: keep"
    assert (plan.choice.four_bit, plan.choice.eight_bit) == (PerBlock(block_size=64), PerChannel())
    assert plan.choice.form is WeightForm.MATMUL_NBITS  # of INT8 on CUDA


def test_the_target_warns_of_every_format_of_a_plan_file(
    config: QuantizeConfig, model: ir.Model, tmp_path: Path
) -> None:
    path = _plan_file(model, tmp_path / "p.toml", "4b64", "4b64z", "4b16")
    warnings = _planned(replace(config, plan=path, target="webgpu"), model).choice.warnings
    assert warnings == ()
    warnings = _planned(replace(config, plan=path, target="qnn"), model).choice.warnings
    assert [size for size in ("64", "16") if any(f"not of {size}" in warning for warning in warnings)] == ["64", "16"]
    assert any("only symmetric codes" in warning for warning in warnings)


def test_a_plan_file_that_keeps_everything_is_refused(config: QuantizeConfig, model: ir.Model, tmp_path: Path) -> None:
    path = _plan_file(model, tmp_path / "p.toml", "keep")
    with pytest.raises(OptionError, match=r"p\.toml keeps every MatMul"):
        _planned(replace(config, plan=path), model)


def test_a_budget_is_left_open_with_the_smallest_format_of_every_site(config: QuantizeConfig, model: ir.Model) -> None:
    plan = _planned(replace(config, target_bpw=5.0, sensitivity="measured"), model)
    assert plan.left_open is not None
    assert (plan.left_open.option, plan.left_open.sensitivity) == ("--target_bpw 5", "measured")
    assert {spec.label for spec in plan.sites.specs.values()} == {"4b128"}
    assert HEAD in plan.sites.specs
    sized = _planned(replace(config, target_size="1GB"), model)
    assert sized.left_open is not None
    assert (sized.left_open.option, sized.left_open.sensitivity) == ("--target_size 1GB", "cache")
    size, sites = sized.left_open.size, all_sites(find_groups(model))
    assert sized.left_open.reachable.unit == "bytes"
    assert sized.left_open.reachable.smallest == size.total_bytes(sites, sized.sites.specs)
    assert sized.left_open.reachable.largest == size.total_bytes(sites, _finest(sized.left_open))


@pytest.mark.parametrize(
    "options",
    [
        {"algo": "gptq"},
        {"block_size": 32},
        {"scale_range": "signed"},
        {"use_zero_point": True},
        {"layers_8bit": "layers.1"},
        {"gather_quantize_axis": 1},
        {"gptq_damping": 0.1},
        {"refine": True},
        {"awqlite_run_per_subgraph": True},
        {"awqlite_disable_fuse_nodes": True},
    ],
)
def test_the_digest_covers_what_codes_depend_on(
    options: dict[str, object], config: QuantizeConfig, model: ir.Model
) -> None:
    assert _digest(replace(config, **options), model) != _digest(config, model)


@pytest.mark.parametrize(
    "options", [{"signround_iters": 100}, {"signround_seed": 1}, {"signround_lr": 0.1}, {"signround_start": "gptq"}]
)
def test_options_of_signround_count_only_with_it(
    options: dict[str, object], config: QuantizeConfig, model: ir.Model
) -> None:
    assert _digest(replace(config, **options), model) == _digest(config, model)
    tuned = replace(config, algo="signround")
    assert _digest(replace(tuned, **options), model) != _digest(tuned, model)


@pytest.mark.parametrize(
    "options", [{"output_path": Path("elsewhere")}, {"device": "cpu"}, {"verify": "off"}, {"accuracy_level": 1}]
)
def test_the_digest_leaves_out_what_codes_do_not_depend_on(
    options: dict[str, object], config: QuantizeConfig, model: ir.Model
) -> None:
    assert _digest(replace(config, **options), model) == _digest(config, model)


def test_the_digest_covers_the_calibration(config: QuantizeConfig, model: ir.Model) -> None:
    assert _digest(config, model, cache="one") != _digest(config, model, cache="other")


def _digest(config: QuantizeConfig, model: ir.Model, cache: str = "") -> str:
    return make_recipe(config, _planned(config, model), "base", cache).search


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"algo": "rtn_dq"}, "rtn_dq INT4 block 128 without zero point"),
        ({"use_zero_point": True, "refine": True}, "awq_gptq refined INT4 block 128 with zero point"),
        ({"algo": "signround"}, "signround from awq_gptq INT4 block 128 without zero point"),
        (
            {"layers_8bit": "down_proj", "target": "cpu@1.31", "algo": "gptq"},
            "gptq INT4 block 32 with zero point, INT8 at 3 sites, embedding INT8 block 128 for cpu@1.31",
        ),
        (
            {"target": None, "embedding": "none", "use_zero_point": False},
            f"awq_gptq INT4 block 32 without zero point, INT8 at 1 site for {parse_target('cpu').label}",
        ),
        (
            {"target_bpw": 5.5, "layers_8bit": "down_proj"},
            "awq_gptq --target_bpw 5.5 (9 x 4b128, 2 x 8b128)",
        ),
    ],
)
def test_a_recipe_is_described_in_a_line(
    options: dict[str, object], said: str, config: QuantizeConfig, model: ir.Model
) -> None:
    config = replace(config, **options)
    assert describe_recipe(config, _planned(config, model)) == said
