from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stages.errors import UserError
from stages.quantization.plan.budget.forecast import (
    GroupForecast,
    SearchTraits,
    compensated_errors,
    quick_loss,
    quick_weight,
    read_forecasts,
    unpredicted_inputs,
    write_forecasts,
)
from stages.quantization.search.affine import split
from stages.quantization.search.choices import full_ranges, site_errors, stored_weight
from stages.quantization.search.gptq.compensate import gptq
from stages.quantization.search.objective import output_error
from stages.quantization.search.problem import IDENTITY
from stages.quantization.search.ranges import awq_clip
from stages.records.formats import PerBlock, QuantSpec
from stages.records.results import ActivationStats, SearchStats, TokenStats
from tests.stages.quantization.search.problems import OPTIONS, RandomLayer, random_layer, spec

SPECS = {
    "4b16": spec(block_size=16),
    "4b48": QuantSpec(bits=4, symmetric=True, granularity=PerBlock(block_size=48), scale_dtype="float32"),
    "8b16": spec(block_size=16, bits=8),
}


def _stats(layer: RandomLayer, channels: Tensor | None = None) -> SearchStats:
    assert layer.problem.stats is not None
    weights = {} if channels is None else {layer.problem.group.sites[0].name: channels}
    return SearchStats(tokens=layer.problem.stats, channel_weights=weights)


ROUNDED, COMPENSATED = (SearchTraits(rule="full", compensates=compensates) for compensates in (False, True))


def _forecast(layer: RandomLayer, stats: SearchStats, search: SearchTraits = ROUNDED) -> dict[str, float]:
    site, weight = layer.problem.group.sites[0], layer.problem.weights[0]
    with ThreadPoolExecutor(2) as pool:
        return GroupForecast.of(stats, search).of_site(site, weight, SPECS, pool)


@pytest.mark.parametrize("search", [ROUNDED, COMPENSATED])
def test_a_few_channels_tell_the_loss_of_all_even_where_others_have_most_of_it(
    search: SearchTraits, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = random_layer(1, widths=(600,))
    counts = torch.rand(600, generator=torch.Generator().manual_seed(0)) + 0.1
    counts[1::15] = 100.0  # not among those that are looked at
    whole = _forecast(layer, _stats(layer, counts), search)
    relative = _forecast(layer, _stats(layer), search)
    monkeypatch.setattr("stages.quantization.plan.budget.forecast.MEASURED_CHANNELS", 150)
    assert _forecast(layer, _stats(layer, counts), search) == pytest.approx(whole, rel=0.25)
    assert _forecast(layer, _stats(layer), search) == pytest.approx(relative, rel=0.25)


def test_a_forecast_is_half_the_weighted_error_of_the_quick_weight() -> None:
    layer = random_layer(3)
    weight, channels = layer.problem.weights[0], torch.linspace(0.1, 1.9, 20)
    stats = _stats(layer, channels)
    forecast = _forecast(layer, stats)
    assert forecast["8b16"] < forecast["4b16"] < forecast["4b48"]
    for key, number_format in SPECS.items():
        stored = quick_weight(weight, number_format, stats.tokens.calibration, "full")
        outputs = (layer.tokens @ (stored - weight).T).double().square().mean(0)
        # float32 Gram matrix of 300 tokens.
        assert forecast[key] == pytest.approx(float(outputs @ channels.double()) / 2, rel=1e-3)


def test_outputs_that_enter_attention_count_together() -> None:
    layer = random_layer(3)
    stats, factor = _stats(layer, torch.ones(20)), torch.randn(2, 10, 10, generator=torch.Generator().manual_seed(0))
    grams = {layer.problem.group.sites[0].name: factor @ factor.transpose(1, 2)}
    weight = layer.problem.weights[0]
    stored = quick_weight(weight, SPECS["4b16"], stats.tokens.calibration, "full")
    mixed = ((layer.tokens @ (stored - weight).T).view(-1, 2, 1, 10) @ factor).double().square().sum()
    found = _forecast(layer, replace(stats, output_grams=grams))["4b16"]
    # float32 Gram matrix of 300 tokens, and a Cholesky factor.
    assert found == pytest.approx(float(mixed) / len(layer.tokens) / 2, rel=1e-3)


def test_without_weights_a_forecast_is_relative_to_the_output() -> None:
    layer = random_layer(0)
    weight, stats = layer.problem.weights[0], _stats(layer)
    outputs, wrong = (layer.tokens.double() @ part.double().T for part in (weight, 0.1 * weight))
    site = layer.problem.group.sites[0]
    lost = float(wrong.square().sum() / outputs.square().sum())
    # float32 Gram matrix of 300 tokens.
    assert quick_loss(site, weight, 1.1 * weight, stats) == pytest.approx(lost, rel=1e-3)
    # Of logits without what all of them share.
    shifted = weight + 50 * torch.ones(48)
    head = replace(site, feeds_logits=True)
    losses = [quick_loss(head, each, each + 0.1 * weight, stats) for each in (weight, shifted)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_the_forecast_lies_between_the_full_clip_search_and_rounding() -> None:
    for seed in range(4):
        problem = random_layer(seed).problem
        assert problem.stats is not None
        found = 2 * _forecast(random_layer(seed), _stats(random_layer(seed), torch.ones(20)))["4b16"]
        searched = site_errors(problem, awq_clip(problem, OPTIONS), problem.stats.calibration)[0]
        plain = site_errors(problem, full_ranges(problem, "full", IDENTITY), problem.stats.calibration)[0]
        # Blocks are searched one by one, so a coarser search can be luckier by a little.
        assert searched * 0.98 <= found < plain


def test_what_inputs_behind_tell_about_an_input_is_taken_off_its_mean_square() -> None:
    layer = random_layer(1)
    assert layer.problem.stats is not None
    found = unpredicted_inputs(layer.problem.stats.calibration)
    loudest_first = torch.argsort(layer.tokens.square().mean(0), descending=True)
    tokens = layer.tokens[:, loudest_first].double()
    ridge = 0.01 * tokens.square().mean()
    for place, channel in enumerate(loudest_first):
        own, behind = tokens[:, place], tokens[:, place + 1 :]
        gram = behind.T @ behind / len(tokens) + ridge * torch.eye(behind.shape[1], dtype=torch.float64)
        shared = behind.T @ own / len(tokens)
        left = own.square().mean() + ridge - shared @ torch.linalg.solve(gram, shared)
        assert float(found[channel]) == pytest.approx(float(left), rel=1e-3)  # of a float32 Gram matrix


def test_where_no_input_tells_about_another_nothing_makes_up_for_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    rounding, loud = torch.rand(20, 48, generator=generator) - 0.5, torch.rand(48, generator=generator)
    independent = TokenStats(num_tokens=300, abs_mean=loud, gram=torch.diag(loud))
    errors = compensated_errors(rounding, unpredicted_inputs(independent))
    expected = output_error(rounding, independent) + 0.01 * loud.mean() * rounding.square().sum(-1)
    torch.testing.assert_close(errors, expected)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("channels", [None, torch.linspace(0.1, 1.9, 20)], ids=["relative", "nats"])
def test_codes_that_make_up_for_each_other_are_forecast_closer(seed: int, channels: Tensor | None) -> None:
    layer = random_layer(seed)
    stats, problem = _stats(layer, channels), layer.problem
    site, weight, number_format = problem.group.sites[0], problem.weights[0], SPECS["4b16"]
    stored = stored_weight(site, weight, number_format, gptq(problem, OPTIONS)[0])
    numbers = (split(stored.codes.float(), 16) * stored.scales.unsqueeze(-1)).flatten(-2)
    lost = quick_loss(site, weight, numbers, stats)
    compensated, rounded = (_forecast(layer, stats, search)["4b16"] for search in (COMPENSATED, ROUNDED))
    assert lost < compensated < 0.9 * rounded


def test_errors_of_channels_that_count_together_are_forecast_one_by_one() -> None:
    layer = random_layer(3)
    name = layer.problem.group.sites[0].name
    stats, factor = _stats(layer, torch.ones(20)), torch.randn(2, 10, 10, generator=torch.Generator().manual_seed(0))
    grams = factor @ factor.transpose(1, 2)
    together = _forecast(layer, replace(stats, output_grams={name: grams}), COMPENSATED)
    alone = replace(stats, channel_weights={name: torch.diagonal(grams, dim1=1, dim2=2).flatten()})
    assert together == pytest.approx(_forecast(layer, alone, COMPENSATED))


@pytest.mark.parametrize("search", [ROUNDED, COMPENSATED])
@pytest.mark.parametrize("channels", [None, torch.ones(20)])
def test_a_site_that_no_token_reaches_has_no_error(channels: Tensor | None, search: SearchTraits) -> None:
    silent = TokenStats(num_tokens=0, abs_mean=torch.zeros(48), gram=torch.zeros(48, 48))
    stats = replace(_stats(random_layer(0), channels), tokens=ActivationStats(calibration=silent, held_out=silent))
    assert _forecast(random_layer(0), stats, search) == dict.fromkeys(SPECS, 0.0)


@pytest.mark.parametrize(
    "unfit", ["{", '{"a": {"energy": 0.1, "errors": {"4b16": 0.3}}}'], ids=["damaged", "an earlier version's"]
)
def test_forecasts_are_read_as_written_and_none_that_rest_on_something_else(tmp_path: Path, unfit: str) -> None:
    assert read_forecasts(tmp_path, ROUNDED) == {}
    forecasts = {"a": {"4b16": 1 / 3}}
    write_forecasts(tmp_path, ROUNDED, forecasts)
    assert read_forecasts(tmp_path, ROUNDED) == forecasts
    assert read_forecasts(tmp_path, COMPENSATED) == {}
    (tmp_path / "forecast.json").write_text(unfit, encoding="utf-8")
    assert read_forecasts(tmp_path, ROUNDED) == {}


def test_a_folder_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "forecast.json").mkdir()
    with pytest.raises(UserError, match=r"forecasts can't be kept in .*forecast\.json.*--cache_dir"):
        write_forecasts(tmp_path, ROUNDED, {})
