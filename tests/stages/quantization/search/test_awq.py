"""AWQ input scales against the loss spelled out; the choice is never worse than rounding to nearest."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from stages.quantization.search.awq import (
    awq_lite,
    input_scale_candidates,
    mean_over_heads,
    rank_input_scales,
    repeat_over_heads,
    weight_magnitude,
)
from stages.quantization.search.choices import candidate_errors, full_ranges
from stages.quantization.search.problem import IDENTITY
from stages.records.sites import HeadSharing
from tests.reference.search import awq_loss
from tests.reference.search import weight_magnitude as reference_magnitude
from tests.stages.quantization.search.problems import OPTIONS, joint_error, random_layer, spec


@pytest.mark.parametrize("symmetric", [True, False])
def test_candidate_errors_match_the_scaled_activation_spelled_out(symmetric: bool) -> None:
    layer = random_layer(3, symmetric=symmetric)
    assert layer.problem.stats is not None
    candidates = input_scale_candidates(layer.problem, layer.problem.stats.calibration, 0.25)
    scales = torch.stack([candidate.scale for candidate in candidates if candidate.scale is not None])
    weight, number = layer.problem.weights[0], layer.problem.specs[0]
    ours = candidate_errors(weight, number, scales, "full", layer.problem.stats.calibration)
    for scale, loss in zip(scales, ours, strict=True):
        direct = awq_loss(layer.tokens.double().numpy(), weight.numpy(), scale.numpy(), 16, 4, symmetric=symmetric)
        # A tie may round the other way in float64: one code of 960 is at most about 1 % of the loss.
        assert float(loss) == pytest.approx(direct, rel=2e-2)


def test_grid_holds_both_families_without_repeats() -> None:
    layer = random_layer(0)
    assert layer.problem.stats is not None
    candidates = input_scale_candidates(layer.problem, layer.problem.stats.calibration, 0.1)
    assert [(c.family, c.alpha) for c in candidates] == [("activation", round(0.1 * i, 9)) for i in range(1, 11)] + [
        ("duo", round(0.1 * i, 9)) for i in range(10)
    ]


@pytest.mark.parametrize("step", [0.3, 0.25, 1.0])
def test_alpha_step_is_honoured(step: float) -> None:
    layer = random_layer(0)
    assert layer.problem.stats is not None
    candidates = input_scale_candidates(layer.problem, layer.problem.stats.calibration, step)
    assert len(candidates) == 2 * round(1 / step)


@pytest.mark.parametrize("seed", range(12))
def test_never_worse_than_rounding_on_calibration_and_held_out(seed: int) -> None:
    layer = random_layer(seed, widths=(12, 8))
    chosen = awq_lite(layer.problem, OPTIONS)
    baseline = full_ranges(layer.problem, "full", IDENTITY)
    assert layer.problem.stats is not None
    for stats in (layer.problem.stats.calibration, layer.problem.stats.held_out):
        assert joint_error(layer.problem, chosen, stats) <= joint_error(layer.problem, baseline, stats)
    assert chosen[0].input_scale is chosen[1].input_scale


def test_siblings_are_ranked_by_the_loss_at_the_shared_scale() -> None:
    layer = random_layer(7, widths=(12, 30))
    assert layer.problem.stats is not None
    ranked = rank_input_scales(layer.problem, OPTIONS)
    losses = [
        sum(
            awq_loss(
                layer.tokens.double().numpy(),
                weight.numpy(),
                np.ones(48) if scale.scale is None else scale.scale.numpy(),
                16,
                4,
                symmetric=True,
            )
            for weight in layer.problem.weights
        )
        for scale in ranked
    ]
    assert ranked[-1] is IDENTITY
    assert len(ranked) > 3
    # Neighbours in the ranking may be equal up to float32 rounding and ties.
    assert all(earlier <= later * 1.01 for earlier, later in itertools.pairwise(losses))


def test_scale_repeats_over_the_query_heads_of_a_group() -> None:
    heads = HeadSharing(kv_heads=2, group_size=3, head_size=8)
    layer = random_layer(1, heads=heads)
    assert layer.problem.stats is not None
    for candidate in input_scale_candidates(layer.problem, layer.problem.stats.calibration, 0.2):
        assert candidate.scale is not None
        grouped = candidate.scale.reshape(2, 3, 8)
        assert torch.equal(grouped, grouped[:, :1].expand_as(grouped))
    values = torch.arange(48.0)
    means = mean_over_heads(values, heads)
    assert means.shape == (16,)
    assert means[0] == (0 + 8 + 16) / 3
    assert torch.equal(repeat_over_heads(means, heads)[8:16], means[:8])


def test_dead_channels_give_finite_scales() -> None:
    layer = random_layer(2)
    assert layer.problem.stats is not None
    stats = layer.problem.stats.calibration
    stats.abs_mean[5] = 0
    layer.problem.weights[0][:, 9] = 0
    for candidate in input_scale_candidates(layer.problem, stats, 0.1):
        assert candidate.scale is not None
        assert torch.isfinite(candidate.scale).all()
        assert bool((candidate.scale >= 1e-4).all())
        assert bool((candidate.scale <= 1e4).all())


def test_the_identity_is_a_candidate() -> None:
    # Weights that rounding keeps exactly: codes from -7 to 7 times a power of two, 7 in every block.
    layer = random_layer(0)
    weight = torch.randint(-7, 8, (20, 48), generator=torch.Generator().manual_seed(0)).float() / 8
    weight[:, ::16] = 7 / 8
    problem = replace(layer.problem, weights=(weight,))
    assert problem.stats is not None
    assert rank_input_scales(problem, OPTIONS)[0] is IDENTITY
    assert joint_error(problem, awq_lite(problem, OPTIONS), problem.stats.calibration) == 0


def test_a_weight_is_large_relative_to_the_block_that_shares_its_scale() -> None:
    """Neighbouring channels share a block: 0 is compared with 1, 2 and 3, not with 2, 4 and 6."""
    weight = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
    weight *= torch.tensor([1.0, 1, 1, 1, 100, 100, 100, 100])
    exact = reference_magnitude(weight.double().numpy(), 4)
    np.testing.assert_allclose(weight_magnitude((weight,), (spec(block_size=4),)).numpy(), exact, rtol=1e-6)


def test_duo_scales_weigh_activations_against_weights() -> None:
    """a^r / w^(1 - r), its largest and smallest value with product 1."""
    layer = random_layer(8, in_features=48)
    assert layer.problem.stats is not None
    a = layer.tokens.double().abs().mean(0).numpy()
    w = reference_magnitude(layer.problem.weights[0].double().numpy(), 16)
    candidates = input_scale_candidates(layer.problem, layer.problem.stats.calibration, 0.1)
    for candidate in (one for one in candidates if one.family == "duo"):
        assert candidate.alpha is not None
        assert candidate.scale is not None
        scale = a**candidate.alpha / w ** (1 - candidate.alpha)
        np.testing.assert_allclose(candidate.scale.numpy(), scale / np.sqrt(scale.max() * scale.min()), rtol=1e-5)
