"""Error feedback against least squares; refined weights are nearer on tokens that were never seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.quantization.blocks.error_feedback import (
    QuantizedStreamAccumulator,
    QuantizedStreamStats,
    drift_error,
    refine,
    target_weight,
)
from stages.quantization.blocks.learnable_weight import effective_weight
from stages.quantization.search.choices import full_ranges, stored_weight
from stages.quantization.search.gptq.compensate import gptq
from stages.quantization.search.problem import IDENTITY, GroupProblem, InputScale
from stages.records.results import QuantizedWeight
from tests.stages.quantization.search.problems import OPTIONS, RandomLayer, random_layer

CPU = torch.device("cpu")


def drifted(tokens: Tensor, seed: int) -> Tensor:
    """Return what a quantized model makes of the activation: a leak between channels."""
    generator = torch.Generator().manual_seed(seed)
    leak = torch.eye(tokens.shape[1]) + 0.05 * torch.randn(tokens.shape[1], tokens.shape[1], generator=generator)
    return tokens @ leak


def measured(tokens: Tensor, quantized: Tensor) -> QuantizedStreamStats:
    accumulator = QuantizedStreamAccumulator(tokens.shape[1], CPU)
    for quantized_part, part in zip(torch.split(quantized, 70), torch.split(tokens, 70), strict=True):
        accumulator.add(quantized_part[None], part[None])
    return accumulator.finish()


def statistics(layer: RandomLayer) -> tuple[QuantizedStreamStats, QuantizedStreamStats]:
    """Return those of the calibration and of the held-out tokens."""
    return measured(layer.tokens, drifted(layer.tokens, 1)), measured(layer.held_out, drifted(layer.held_out, 1))


def start_of(problem: GroupProblem, scale: InputScale = IDENTITY) -> tuple[QuantizedWeight, ...]:
    choices = full_ranges(problem, "full", scale)
    return tuple(
        stored_weight(site, weight, spec, choice)
        for site, weight, spec, choice in zip(problem.group.sites, problem.weights, problem.specs, choices, strict=True)
    )


def output_gap(layer: RandomLayer, stored: QuantizedWeight) -> float:
    """Return ||X_q V^T - X_f W^T||^2 / T over the held-out tokens, spelled out."""
    weight = layer.problem.weights[0].double()
    wanted = layer.held_out.double() @ weight.T
    found = drifted(layer.held_out, 1).double() @ effective_weight(stored, CPU).double().T
    return float((found - wanted).square().sum() / len(wanted))


def test_statistics_are_those_of_both_activations() -> None:
    layer = random_layer(0)
    exact, quantized = layer.tokens.double(), drifted(layer.tokens, 1).double()
    stats = statistics(layer)[0]
    assert stats.num_tokens == 300
    torch.testing.assert_close(stats.gram.double(), quantized.T @ quantized / 300, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stats.drift.double(), quantized.T @ (quantized - exact) / 300, rtol=1e-3, atol=1e-3)


def test_error_is_the_output_gap_up_to_what_no_weight_can_change() -> None:
    layer = random_layer(2)
    held_out = statistics(layer)[1]
    weight = layer.problem.weights[0]
    exact, quantized = layer.held_out.double().numpy(), drifted(layer.held_out, 1).double().numpy()
    generator = torch.Generator().manual_seed(5)
    gaps, errors = [], []
    for size in (0.0, 0.01, 0.1):
        error = size * torch.randn(weight.shape, generator=generator)
        gap = quantized @ (weight + error).double().numpy().T - exact @ weight.double().numpy().T
        gaps.append(np.square(gap).sum() / len(exact))
        errors.append(float(drift_error(error, weight, held_out)))
    # Differences from the same constant; the statistics are float32 sums.
    assert np.diff(errors) == pytest.approx(np.diff(gaps), rel=1e-3)


def test_target_is_the_least_squares_solution() -> None:
    layer = random_layer(3)
    stats = statistics(layer)[0]
    weight = layer.problem.weights[0]
    quantized, wanted = drifted(layer.tokens, 1).double(), layer.tokens.double() @ weight.double().T
    # Damping amounts to 48 more tokens, in each of which one channel is loud and both models agree.
    more = (300 * 0.01 * quantized.square().mean()).sqrt() * torch.eye(48, dtype=torch.float64)
    rows, results = torch.cat([quantized, more]), torch.cat([wanted, more @ weight.double().T])
    exact = torch.linalg.lstsq(rows, results).solution.T
    # The Gram matrix's condition, about a thousand when damped, times float32's last digit.
    torch.testing.assert_close(target_weight(weight, stats, 0.01).double(), exact, rtol=1e-3, atol=1e-3)


def test_without_drift_the_target_is_the_weight_and_damping_leads_back_to_it() -> None:
    layer = random_layer(4)
    weight = layer.problem.weights[0]
    still = measured(layer.tokens, layer.tokens)
    torch.testing.assert_close(target_weight(weight, still, 0.01), weight)
    moved = statistics(layer)[0]
    distances = [float((target_weight(weight, moved, damping) - weight).norm()) for damping in (0.001, 1.0, 1e6)]
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 1e-3


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_refined_weights_close_the_gap_on_tokens_never_seen(seed: int, symmetric: bool, scaled: bool) -> None:
    layer = random_layer(seed, symmetric=symmetric)
    drawn = torch.rand(48, generator=torch.Generator().manual_seed(9)) + 0.5
    scale = InputScale(family="test", alpha=None, scale=drawn) if scaled else IDENTITY
    start = start_of(layer.problem, scale)
    (refined,) = refine(layer.problem, OPTIONS, start, *statistics(layer))
    (unaware,) = gptq(layer.problem, OPTIONS)
    site, spec = layer.problem.group.sites[0], layer.problem.specs[0]
    one_shot = stored_weight(site, layer.problem.weights[0], spec, unaware)
    assert output_gap(layer, refined) < 0.5 * output_gap(layer, start[0])
    assert output_gap(layer, refined) < output_gap(layer, one_shot)
    assert (refined.input_scale is None) == (not scaled)


def test_the_start_stays_where_held_out_tokens_say_so() -> None:
    layer = random_layer(6)
    calibration, held_out = statistics(layer)
    start = start_of(layer.problem)
    opposite = replace(held_out, drift=-20 * held_out.drift)
    assert refine(layer.problem, OPTIONS, start, calibration, opposite) == start
