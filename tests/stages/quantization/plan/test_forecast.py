from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stages.errors import UserError
from stages.quantization.plan.forecast import (
    forecast_key,
    forecast_site,
    quick_error,
    quick_weight,
    read_forecasts,
    write_forecasts,
)
from stages.quantization.search.choices import full_ranges, site_errors
from stages.quantization.search.problem import IDENTITY
from stages.quantization.search.ranges import awq_clip
from stages.records.formats import PerBlock, QuantSpec
from stages.records.results import SiteForecast, TokenStats
from tests.stages.quantization.search.problems import OPTIONS, random_layer, spec
from tests.stages.quantization.search.problems import site as make_site

SPECS = {
    "4b16": spec(block_size=16),
    "4b48": QuantSpec(bits=4, symmetric=True, granularity=PerBlock(block_size=48), scale_dtype="float32"),
    "8b16": spec(block_size=16, bits=8),
}


def test_energy_and_errors_are_those_of_the_tokens_outputs() -> None:
    layer = random_layer(0)
    weight, stats = layer.problem.weights[0], layer.problem.stats
    assert stats is not None
    found = forecast_site(layer.problem.group.sites[0], weight, SPECS, stats.calibration)
    outputs = layer.tokens.double() @ weight.double().T
    # float32 Gram matrix of 300 tokens.
    assert found.energy == pytest.approx(float(outputs.square().sum(1).mean()), rel=1e-4)
    assert found.errors["8b16"] < found.errors["4b16"] < found.errors["4b48"]


def test_the_forecast_lies_between_the_full_clip_search_and_rounding() -> None:
    for seed in range(4):
        layer = random_layer(seed)
        problem = layer.problem
        assert problem.stats is not None
        found = forecast_site(problem.group.sites[0], problem.weights[0], SPECS, problem.stats.calibration)
        searched = site_errors(problem, awq_clip(problem, OPTIONS), problem.stats.calibration)[0] / found.energy
        plain_choice = full_ranges(problem, "full", IDENTITY)
        plain = site_errors(problem, plain_choice, problem.stats.calibration)[0] / found.energy
        # Blocks are searched one by one, so a coarser search can be luckier by a little.
        assert searched * 0.98 <= found.errors["4b16"] < plain


def test_relative_errors_of_sections_count_one_by_one() -> None:
    layer = random_layer(1)
    weight, stats = layer.problem.weights[0].clone(), layer.problem.stats
    assert stats is not None
    weight[15:] *= 0.01  # a quiet section: its errors are lost in the whole
    site = layer.problem.group.sites[0]
    parts = (slice(0, 15), slice(15, 20))
    each = [
        forecast_site(make_site("part", 20, 48), weight[part], SPECS, stats.calibration).errors["4b16"]
        for part in parts
    ]
    together = forecast_site(site, weight, SPECS, stats.calibration, parts).errors["4b16"]
    # Sums of float32 in another order.
    assert together == pytest.approx(sum(each), rel=1e-4)
    assert together > 1.5 * forecast_site(site, weight, SPECS, stats.calibration).errors["4b16"]


def test_what_all_logits_share_is_no_signal() -> None:
    layer = random_layer(2)
    stats = layer.problem.stats
    assert stats is not None
    head = replace(layer.problem.group.sites[0], feeds_logits=True)
    weight = layer.problem.weights[0]
    shifted = weight + 50 * torch.ones(48)
    energies = [forecast_site(head, each, {}, stats.calibration).energy for each in (weight, shifted)]
    # float32 after a shift by fifty times the weights.
    assert energies[0] == pytest.approx(energies[1], rel=1e-2)


def test_a_forecast_is_the_error_of_the_quick_weight() -> None:
    layer = random_layer(3)
    site, weight, stats = layer.problem.group.sites[0], layer.problem.weights[0], layer.problem.stats
    assert stats is not None
    forecast = forecast_site(site, weight, SPECS, stats.calibration)
    for key, number_format in SPECS.items():
        stored = quick_weight(weight, number_format, stats.calibration)
        assert quick_error(site, weight, stored, stats.calibration) == forecast.errors[key]
        lost = (layer.tokens @ (stored - weight).T).double().square().sum() / len(layer.tokens)
        # float32 Gram matrix of 300 tokens.
        assert forecast.errors[key] == pytest.approx(float(lost) / forecast.energy, rel=1e-3)


def test_a_site_that_no_token_reaches_has_no_error() -> None:
    layer = random_layer(0)
    silent = TokenStats(num_tokens=0, abs_mean=torch.zeros(48), gram=torch.zeros(48, 48))
    found = forecast_site(layer.problem.group.sites[0], layer.problem.weights[0], SPECS, silent)
    assert found == SiteForecast(energy=0.0, errors=dict.fromkeys(SPECS, 0.0))


def test_formats_with_and_without_zero_point_have_forecasts_of_their_own() -> None:
    assert (forecast_key(spec()), forecast_key(spec(symmetric=False))) == ("4b16", "4b16z")


def test_forecasts_are_read_as_written_and_none_from_a_damaged_file(tmp_path: Path) -> None:
    assert read_forecasts(tmp_path) == {}
    forecasts = {"a": SiteForecast(energy=0.1, errors={"4b16": 1 / 3})}
    write_forecasts(tmp_path, forecasts)
    assert read_forecasts(tmp_path) == forecasts
    (tmp_path / "forecast.json").write_text("{", encoding="utf-8")
    assert read_forecasts(tmp_path) == {}


def test_a_folder_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "forecast.json").mkdir()
    with pytest.raises(UserError, match=r"forecasts can't be kept in .*forecast\.json.*--cache_dir"):
        write_forecasts(tmp_path, {})
