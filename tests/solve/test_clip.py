"""Clip ratios of weights that carry an input scale."""

from __future__ import annotations

import torch

from stages.solve.clip import clip_sites
from stages.solve.evaluate import full_range
from stages.solve.objective import gram_blocks
from stages.solve.problem import InputScale
from stages.solve.ranges import clip_ratio_grid, search_clip_ratios
from tests.reference.rounding import round_trip
from tests.reference.search import output_loss
from tests.solve.problems import OPTIONS, random_layer, spec


def _loss(held_out: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, ratios: torch.Tensor) -> float:
    """Return the output error of diag(s) W, clipped by ``ratios``, on tokens that no search saw."""
    stored = round_trip((weight * scale).numpy(), 16, 4, symmetric=True, ratios=ratios.numpy())
    return output_loss(held_out.numpy(), stored / scale.numpy() - weight.numpy())


def test_scaled_weights_meet_scaled_activations() -> None:
    """Clipped against the unscaled activation, channel k would count s_k^2 times too much."""
    layer = random_layer(12)
    assert layer.problem.stats is not None
    weight = layer.problem.weights[0]
    scale = torch.rand(48, generator=torch.Generator().manual_seed(3)) * 4 + 0.2
    plain = full_range(weight, spec(), "full", InputScale(family="test", alpha=None, scale=scale))
    (choice,) = clip_sites(layer.problem, OPTIONS, (plain,))
    unscaled = gram_blocks(layer.problem.stats.calibration, 16)
    wrong = search_clip_ratios(weight * scale, spec(), "full", unscaled, clip_ratio_grid(0.5, 0.05))
    right = choice.parameters.scales / plain.parameters.scales
    assert _loss(layer.held_out, weight, scale, right) < _loss(layer.held_out, weight, scale, wrong)
