"""Range search against an exhaustive search over all tokens and the least-squares solution of each refit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.quantization.search.affine import BlockParameters, choose_parameters, quantize, round_trip, split
from stages.quantization.search.choices import full_range
from stages.quantization.search.objective import gram_blocks
from stages.quantization.search.problem import InputScale
from stages.quantization.search.ranges import (
    Blocks,
    clip_ratio_grid,
    clip_sites,
    refit,
    search_clip_ratios,
    search_ranges,
)
from stages.records.formats import PerChannel, QuantSpec
from tests.reference.rounding import round_trip as reference_round_trip
from tests.reference.search import best_clip_ratio, output_loss
from tests.stages.quantization.search.problems import OPTIONS, random_layer, spec

RATIOS = clip_ratio_grid(0.5, 0.05)


def _loss(held_out: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, ratios: torch.Tensor) -> float:
    """Return the output error of diag(s) W, clipped by ``ratios``, on tokens that no search saw."""
    stored = reference_round_trip((weight * scale).numpy(), 16, 4, symmetric=True, ratios=ratios.numpy())
    return output_loss(held_out.numpy(), stored / scale.numpy() - weight.numpy())


def test_scaled_weights_meet_scaled_activations() -> None:
    """Clipped against the unscaled activation, channel k would count s_k^2 times too much."""
    layer = random_layer(12)
    assert layer.problem.stats is not None
    weight = layer.problem.weights[0]
    scale = torch.rand(48, generator=torch.Generator().manual_seed(3)) * 4 + 0.2
    unclipped = full_range(weight, spec(), "full", InputScale(family="test", alpha=None, scale=scale))
    (choice,) = clip_sites(layer.problem, OPTIONS, (unclipped,))
    unscaled = gram_blocks(layer.problem.stats.calibration, 16)
    wrong = search_clip_ratios(weight * scale, spec(), "full", unscaled, RATIOS)
    right = choice.parameters.scales / unclipped.parameters.scales
    assert _loss(layer.held_out, weight, scale, right) < _loss(layer.held_out, weight, scale, wrong)


def test_grid_starts_unclipped_and_ends_at_the_minimum() -> None:
    assert RATIOS[0] == 1
    assert RATIOS[-1] == pytest.approx(0.5)
    assert len(RATIOS) == 11
    assert clip_ratio_grid(1.0, 0.05) == [1]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("in_features", [48, 40])
def test_ratios_match_an_exhaustive_search_over_all_tokens(symmetric: bool, in_features: int) -> None:
    layer = random_layer(11, in_features=in_features, symmetric=symmetric)
    assert layer.problem.stats is not None
    weight = layer.problem.weights[0]
    blocks = gram_blocks(layer.problem.stats.calibration, 16)
    ours = search_clip_ratios(weight, spec(symmetric=symmetric), "full", blocks, RATIOS)
    tokens = layer.tokens.double().numpy()
    reference = np.array(
        [
            [
                best_clip_ratio(tokens, row, start, 16, 4, RATIOS, symmetric=symmetric)
                for start in range(0, in_features, 16)
            ]
            for row in weight.double().numpy()
        ]
    )
    # Two ratios can tie within float32; nearly all must agree exactly.
    assert (np.abs(ours.numpy() - reference) < 1e-6).mean() > 0.97
    assert (reference < 1).any()


def test_equal_errors_keep_the_full_range() -> None:
    weight = torch.zeros(3, 16)
    gram = torch.eye(16)[None]
    assert torch.equal(search_clip_ratios(weight, spec(), "full", gram, RATIOS), torch.ones(3, 1))


def test_per_channel_int8_clips_whole_rows() -> None:
    layer = random_layer(6)
    assert layer.problem.stats is not None
    number = QuantSpec(bits=8, symmetric=True, granularity=PerChannel(), scale_dtype="float32")
    blocks = gram_blocks(layer.problem.stats.calibration, number.block_size(48))
    assert search_clip_ratios(layer.problem.weights[0], number, "full", blocks, RATIOS).shape == (20, 1)


def refitted(blocks: torch.Tensor, start: BlockParameters, number: QuantSpec, gram: torch.Tensor) -> BlockParameters:
    """Return ``refit`` of blocks [N, nB, B], with its parameters [N, nB]."""
    weights = blocks.permute(1, 2, 0).contiguous()
    turned = BlockParameters(scales=start.scales.T, zero_points=None)
    if start.zero_points is not None:
        turned = BlockParameters(scales=start.scales.T, zero_points=start.zero_points.T)
    part = Blocks(weights=weights, gram=gram, work=torch.empty(2, *weights.shape))
    return BlockParameters(scales=refit(part, turned, number).scales.T, zero_points=None)


def block_errors(
    weight: torch.Tensor, parameters: BlockParameters, number: QuantSpec, gram: torch.Tensor
) -> torch.Tensor:
    blocks = split(weight, 16)
    error = (round_trip(blocks, parameters, number) - blocks).transpose(0, 1)
    return ((error @ gram) * error).sum(dim=-1).T


@pytest.mark.parametrize("symmetric", [True, False])
def test_refitted_scale_is_the_least_squares_solution_for_its_codes(symmetric: bool) -> None:
    layer = random_layer(2, symmetric=symmetric)
    assert layer.problem.stats is not None
    weight, number = layer.problem.weights[0], layer.problem.specs[0]
    gram = gram_blocks(layer.problem.stats.calibration, 16)
    blocks = split(weight, 16)
    start = choose_parameters(blocks, number, "full", 0.8)
    codes = quantize(blocks, start, number)
    fitted = refitted(blocks, start, number, gram)
    tokens = layer.tokens.double().numpy()
    for row in range(3):
        for block in range(3):
            zero = 0 if start.zero_points is None else float(start.zero_points[row, block])
            part = tokens[:, block * 16 : (block + 1) * 16]
            steps = part @ (codes[row, block].double().numpy() - zero)
            wanted = part @ blocks[row, block].double().numpy()
            exact = np.linalg.lstsq(steps[:, None], wanted, rcond=None)[0][0]
            # float32 products of a Gram matrix of 300 tokens.
            assert float(fitted.scales[row, block]) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
def test_no_block_gets_worse_than_its_best_ratio_and_most_get_better(symmetric: bool, scale_dtype: str) -> None:
    layer = random_layer(4)
    assert layer.problem.stats is not None
    weight = layer.problem.weights[0]
    number = QuantSpec(bits=4, symmetric=symmetric, granularity=spec().granularity, scale_dtype=scale_dtype)
    gram = gram_blocks(layer.problem.stats.calibration, 16)
    ratios = search_clip_ratios(weight, number, "full", gram, RATIOS)
    grid = block_errors(weight, choose_parameters(split(weight, 16), number, "full", ratios), number, gram)
    parameters = search_ranges(weight, number, "full", gram, RATIOS)
    found = block_errors(weight, parameters, number, gram)
    assert bool((found <= grid).all())
    assert float((found < grid).float().mean()) > 0.5
    stored = parameters.scales.to(getattr(torch, scale_dtype)).float()
    assert torch.equal(stored, parameters.scales)


def test_scales_of_empty_blocks_survive_a_refit() -> None:
    blocks = torch.zeros(2, 1, 16)
    start = choose_parameters(blocks, spec(), "full")
    assert torch.equal(refitted(blocks, start, spec(), torch.eye(16)[None]).scales, torch.ones(2, 1))
