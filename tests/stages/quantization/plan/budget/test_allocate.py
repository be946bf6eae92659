"""Spend budgets on a builder-made model: the best choice by trying all, forecasts that are kept, and what is said."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from stages.calibration.cache import CalibrationCache
from stages.commands.quantize_options import QuantizeConfig
from stages.errors import OptionError
from stages.model.directory import locate_model
from stages.model.load import load_graph
from stages.model.sites import find_groups
from stages.quantization.plan.budget.allocate import BudgetResult, allocate_budget, needs_weights, unmeasured_groups
from stages.quantization.plan.budget.candidates import SizeBudget
from stages.quantization.plan.budget.forecast import read_forecasts
from stages.quantization.plan.budget.left_open import OpenPlan
from stages.quantization.plan.plan import ModelPlan, own_budget, plan_model
from stages.quantization.plan.plan_file import KEEP, read_plan, write_plan
from stages.quantization.plan.rules import all_sites
from tests.reference.knapsack import smallest_loss

CPU = torch.device("cpu")


@pytest.fixture
def model(tiny_model: Path) -> ir.Model:
    return load_graph(locate_model(tiny_model))


def _plan(model: ir.Model, folder: Path, **options: object) -> ModelPlan:
    # Of 11 sites, 5 have two formats and lm_head has three: few enough to try all.
    given = {"lm_head": None, "layers_8bit": "layers.1", "block_size": 32, **options}
    config = QuantizeConfig(onnx_path=folder, output_path=folder / "out", target="any", **given)
    return plan_model(config, model, locate_model(folder))


def _open(plan: ModelPlan) -> OpenPlan:
    assert plan.left_open is not None
    return plan.left_open


def _allocated(plan: ModelPlan, model: ir.Model, folder: Path, cache: CalibrationCache) -> BudgetResult:
    return allocate_budget(plan, model, locate_model(folder), cache, CPU)


@pytest.mark.parametrize("part", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0])
def test_a_size_gets_the_smallest_sum_of_forecasts(
    part: float, model: ir.Model, tiny_model: Path, forecast_once: CalibrationCache
) -> None:
    plan = _plan(model, tiny_model, target_size="1GB")
    undecided = _open(plan)
    assert isinstance(undecided.budget, SizeBudget)
    low, high = undecided.reachable.smallest, undecided.reachable.largest
    budget = replace(undecided.budget, num_bytes=int(low + part * (high - low)))
    result = _allocated(replace(plan, left_open=replace(undecided, budget=budget)), model, tiny_model, forecast_once)
    losses = read_forecasts(forecast_once.folder, undecided.search)
    pairs = {
        each.site.name: {
            label: (
                budget.cost(each, label),
                0.0 if spec is None else losses[each.site.name][label],
            )
            for label, spec in each.formats.items()
        }
        for each in undecided.candidates
    }
    best = smallest_loss([list(site.values()) for site in pairs.values()], budget.num_bytes - budget.fixed_bytes)
    specs = result.plan.sites.specs
    chosen = [site[specs[name].label if name in specs else KEEP] for name, site in pairs.items()]
    assert budget.fixed_bytes + sum(cost for cost, _ in chosen) <= budget.num_bytes
    # Sums of the same numbers in another order.
    assert sum(loss for _, loss in chosen) == pytest.approx(best, rel=1e-12)


def test_everything_is_decided_and_the_file_says_the_same(
    model: ir.Model, tiny_model: Path, cache: CalibrationCache, tmp_path: Path
) -> None:
    plan = _plan(model, tiny_model, target_bpw=7.0)
    result = _allocated(plan, model, tiny_model, cache)
    assert result.plan.left_open is None
    sites = all_sites(find_groups(model))
    specs, skipped = result.plan.sites.specs, dict(result.plan.sites.skipped)
    assert {*specs, *skipped} >= {site.name for site in sites}
    write_plan(tmp_path / "plan.toml", result.file_text)
    planned = read_plan(tmp_path / "plan.toml", sites)
    assert {name: line.format for name, line in planned.items()} == {
        site.name: specs[site.name].label if site.name in specs else KEEP for site in sites
    }
    down = "/model/layers.1/mlp/down_proj/MatMul"
    assert planned[down].why == "--layers_8bit"
    assert re.match(
        r"others: (4b32z?|8b128) [\d.e-]+, (4b32z|8b128) [\d.e-]+$", planned[down.replace("layers.1", "layers.0")].why
    )
    assert result.file_text.startswith(f"# {result.summary}\n")


def test_the_summary_names_the_budget_what_was_reached_and_what_can_be(
    model: ir.Model, tiny_model: Path, cache: CalibrationCache
) -> None:
    plan = _plan(model, tiny_model, target_bpw=7.0)
    result = _allocated(plan, model, tiny_model, cache)
    said = re.fullmatch(
        r"--target_bpw 7: ([\d.]+) bits a weight, about ([\d.]+) MB in all, expected KL [\d.e-]+ nats a token by "
        r"--sensitivity cache; (from .* can be reached)\.",
        result.summary,
    )
    assert said is not None
    sites, specs, size = all_sites(result.plan.sites.groups), result.plan.sites.specs, _open(plan).size
    stored = sum(specs[site.name].format_bytes(site.out_features, site.in_features) for site in sites)
    weights = sum(site.in_features * site.out_features for site in sites)
    assert float(said[1]) == pytest.approx(8 * stored / weights, abs=5e-4)  # printed to three places
    every = all_sites(find_groups(model))
    total = size.fixed_bytes(every) + sum(size.site_bytes(site, specs.get(site.name)) for site in every)
    assert float(said[2]) == pytest.approx(total / 1e6, abs=0.05)  # printed to one place
    assert said[3] == _open(plan).reachable.summary
    unweighted = replace(cache.manifest, key=replace(cache.manifest.key, token_weights="none"))
    plain = _allocated(plan, model, tiny_model, replace(cache, manifest=unweighted))
    assert re.search(r"MB in all, relative errors of [\d.e-]+ in sum by --sensitivity cache", plain.summary)


def test_forecasts_are_kept_and_only_new_formats_are_forecast(
    model: ir.Model, tiny_model: Path, cache: CalibrationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = _plan(model, tiny_model, target_bpw=7.0)
    assert needs_weights(_open(plan), cache)
    first = _allocated(plan, model, tiny_model, cache)
    search = _open(plan).search
    kept = read_forecasts(cache.folder, search)
    assert not needs_weights(_open(plan), cache)
    with monkeypatch.context() as patched:
        patched.setattr(CalibrationCache, "read_for_search", lambda *_: pytest.fail("statistics are read again"))
        assert _allocated(plan, model, tiny_model, cache).file_text == first.file_text
    finer = _plan(model, tiny_model, target_bpw=7.0, block_size=16)
    assert needs_weights(_open(finer), cache)
    _allocated(finer, model, tiny_model, cache)
    for name, forecast in read_forecasts(cache.folder, search).items():
        assert forecast.items() >= kept[name].items()


def test_a_site_without_a_choice_is_not_measured(model: ir.Model, tiny_model: Path, cache: CalibrationCache) -> None:
    groups, plan = find_groups(model), _plan(model, tiny_model, target_bpw=7.0, sensitivity="measured")
    left = unmeasured_groups(groups, _open(plan).candidates, cache)
    assert {site.name for site in all_sites(left)} == {
        site.name for site in all_sites(groups) if "layers.1/" not in site.name
    }
    assert unmeasured_groups(groups, [each for each in _open(plan).candidates if len(each.formats) == 1], cache) == []


def test_a_head_that_a_budget_leaves_is_skipped_for_its_sake(
    model: ir.Model, tiny_model: Path, cache: CalibrationCache
) -> None:
    plan = _plan(model, tiny_model, target_size="1GB")
    result = _allocated(plan, model, tiny_model, cache)
    assert dict(result.plan.sites.skipped)["/lm_head/MatMul"] == "--target_size 1GB spends its bytes elsewhere"


def _own(model: ir.Model, folder: Path, cache: CalibrationCache | None, **options: object) -> QuantizeConfig:
    config = QuantizeConfig(onnx_path=folder, output_path=folder / "out", **{"target": "cpu", **options})
    plan = plan_model(config, model, locate_model(folder))
    return replace(config, target_size=own_budget(config, plan, model, locate_model(folder), cache))


@pytest.mark.parametrize(
    "options",
    [{}, {"block_size": 128}, {"use_zero_point": True}, {"use_zero_point": False}, {"lm_head": "8", "embedding": "4"}],
    ids=str,
)
def test_who_names_no_whole_format_gets_the_bytes_of_one_for_all_and_loses_no_more(
    options: dict[str, object], model: ir.Model, tiny_model: Path, forecast_once: CalibrationCache
) -> None:
    config = _own(model, tiny_model, forecast_once, **options)
    plan = plan_model(config, model, locate_model(tiny_model))
    undecided = _open(plan)
    assert isinstance(undecided.budget, SizeBudget)
    spent = _allocated(plan, model, tiny_model, forecast_once).plan.sites.specs
    uniform = plan_model(replace(config, target_size=None), model, locate_model(tiny_model)).sites.specs
    sites = [each.site for each in undecided.candidates]
    sizes = [undecided.size.total_bytes(sites, specs) for specs in (uniform, spent)]
    assert sizes[1] <= undecided.budget.num_bytes
    assert 0 <= undecided.budget.num_bytes - sizes[0] < 100_000
    losses = read_forecasts(forecast_once.folder, undecided.search)
    sums = [
        sum(losses[name][spec.label if spec.label in losses[name] else "8b128"] for name, spec in specs.items())
        for specs in (uniform, spent)  # unless asked for, a budget gives INT8 no zero points
    ]
    assert sums[1] < sums[0]


@pytest.mark.parametrize(
    "options",
    [
        {"target": "cuda"},
        {"target": "any"},
        {"block_size": 32, "use_zero_point": False},
        {"accuracy_level": 1},
        {"target_bpw": 5.0},
        {"layers_8bit": "layers.0"},
    ],
)
def test_who_names_a_format_or_another_runtime_gets_it(
    options: dict[str, object], model: ir.Model, tiny_model: Path, cache: CalibrationCache
) -> None:
    assert _own(model, tiny_model, cache, **options).target_size is None


def test_statistics_that_know_no_nats_spend_nothing(model: ir.Model, tiny_model: Path, cache: CalibrationCache) -> None:
    key = replace(cache.manifest.key, token_weights="none")
    alike = replace(cache, manifest=replace(cache.manifest, key=key))
    assert _own(model, tiny_model, alike).target_size is None
    assert _own(model, tiny_model, None).target_size is None


def test_a_budget_that_quantizes_nothing_is_refused(model: ir.Model, tiny_model: Path, cache: CalibrationCache) -> None:
    plan = _plan(model, tiny_model, layers_8bit="", exclude="layers", target_size="20GB")
    with pytest.raises(OptionError, match=r"--target_size 20GB leaves .*: nothing would be quantized; pass a smaller"):
        _allocated(plan, model, tiny_model, cache)


def test_what_was_not_measured_is_in_no_sum(model: ir.Model, tiny_model: Path, cache: CalibrationCache) -> None:
    plan = _plan(model, tiny_model, target_bpw=7.0, sensitivity="measured")
    result = _allocated(plan, model, tiny_model, cache)
    assert "nats a token at the sites that had a choice by --sensitivity measured" in result.summary
    lines = [line for line in result.file_text.splitlines() if "format = " in line and line.startswith('"')]
    assert all(("loss = " in line) != ("layers.1/" in line) for line in lines)
    assert any("layers.1/" in line for line in lines)


@pytest.mark.parametrize(("embedding", "wider"), [(None, False), ("4", False), ("8", True), ("none", True)])
def test_int4_makes_a_table_smaller_that_has_another_format(
    embedding: str | None, wider: bool, model: ir.Model, tiny_model: Path
) -> None:
    config = QuantizeConfig(
        onnx_path=tiny_model, output_path=tiny_model / "out", target="cpu@1.31", target_size="1GB", embedding=embedding
    )
    budget = _open(plan_model(config, model, locate_model(tiny_model))).budget
    assert isinstance(budget, SizeBudget)
    assert budget.wider_tables is wider


def test_a_table_that_samples_calibrated_is_forecast_from_its_rows(
    model: ir.Model, tiny_model: Path, cache: CalibrationCache
) -> None:
    key = replace(cache.manifest.key, seq_len=None, token_weights="none")
    config = QuantizeConfig(onnx_path=tiny_model, output_path=tiny_model / "out", target="cpu@1.31", target_size="1GB")
    plan = plan_model(config, model, locate_model(tiny_model))
    _allocated(plan, model, tiny_model, replace(cache, manifest=replace(cache.manifest, key=key)))
    losses = read_forecasts(cache.folder, _open(plan).search)
    found = losses["lookups of model.embed_tokens.weight in relative errors"]
    assert found["4b32"] > 20 * found["8b128"] > 0


@pytest.mark.parametrize(
    ("size", "bits"),
    [
        pytest.param("smallest", 4, marks=pytest.mark.thorough),
        ("between", 8),
        pytest.param("largest", None, marks=pytest.mark.thorough),
    ],
)
def test_a_size_decides_about_a_table_that_is_not_tied(
    size: str, bits: int | None, model: ir.Model, tiny_model: Path, cache: CalibrationCache
) -> None:
    def planned(wanted: str) -> ModelPlan:
        config = QuantizeConfig(
            onnx_path=tiny_model, output_path=tiny_model / "out", target="cpu@1.31", target_size=wanted
        )
        return plan_model(config, model, locate_model(tiny_model))

    undecided = _open(planned("1GB"))
    (table,) = undecided.tables
    assert list(table.formats) == ["4b32", "8b128", KEEP]
    low, high = undecided.reachable.smallest, undecided.reachable.largest
    room = {"smallest": low, "between": low + 30_000, "largest": high}[size]
    result = _allocated(planned(f"{int(room)}B"), model, tiny_model, cache)
    assert [each.bits for each in result.plan.embeddings] == ([] if bits is None else [bits])
    assert (bits is None) == any("embedding" in each.reason for each in result.plan.unquantized)
    options = (
        "--embedding none" if bits is None else f"--embedding {bits} --gather_block_size {32 if bits == 4 else 128}"
    )
    assert f"it takes {options}" in result.file_text
    losses = read_forecasts(cache.folder, undecided.search)["lookups of model.embed_tokens.weight in nats"]
    assert losses["4b32"] > 20 * losses["8b128"] > 0
