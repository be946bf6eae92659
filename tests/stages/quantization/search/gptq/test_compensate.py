"""GPTQ against optimal brain surgery solved anew at each step, and its effect on the output error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from stages.errors import SolveError
from stages.quantization.search.affine import BlockParameters, choose_parameters, join, quantize, split
from stages.quantization.search.choices import full_ranges
from stages.quantization.search.gptq.codes import gptq_codes
from stages.quantization.search.gptq.compensate import compensate, gptq
from stages.quantization.search.gptq.factor import damped, factor_gram
from stages.quantization.search.problem import IDENTITY, InputScale
from stages.records.formats import PerChannel, QuantSpec
from tests.reference.compensation import obq_codes
from tests.stages.quantization.search.problems import (
    OPTIONS,
    gptq_of_one,
    joint_error,
    random_layer,
    row_stats,
    solver_of,
    spec,
    spread,
)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("in_features", [48, 40])
def test_codes_match_brain_surgery_solved_anew_at_each_step(symmetric: bool, act_order: bool, in_features: int) -> None:
    layer = random_layer(3, in_features=in_features, symmetric=symmetric)
    assert layer.problem.stats is not None
    weight, number = layer.problem.weights[0], layer.problem.specs[0]
    gram = layer.problem.stats.calibration.gram
    assert gram is not None
    parameters = choose_parameters(split(weight, 16), number, "full", 0.9)
    factor = factor_gram(gram, 0.01, act_order=act_order)
    ours = gptq_of_one(weight, parameters, number, factor).numpy()
    scales, zeros = spread(parameters, in_features)
    exact = damped(gram.double(), 0.01).numpy()
    reference = np.stack(
        [
            obq_codes(row, exact, scales[n], zeros[n], number.code_min, number.code_max, factor.order.tolist())
            for n, row in enumerate(weight.double().numpy())
        ]
    )
    # float32 may round a tie the other way, and the rest of that row then differs too.
    assert (ours == reference).all(axis=1).mean() >= 0.9
    if act_order:
        assert factor.order.tolist() != list(range(in_features))


def test_uncorrelated_inputs_are_rounded_to_nearest() -> None:
    layer = random_layer(1)
    weight = layer.problem.weights[0]
    parameters = choose_parameters(split(weight, 16), spec(), "full")
    factor = factor_gram(torch.diag(torch.rand(48) + 0.5), 0.01, act_order=True)
    rounded = join(quantize(split(weight, 16), parameters, spec()), 48)
    assert torch.equal(gptq_of_one(weight, parameters, spec(), factor), rounded)


def test_two_columns_by_hand() -> None:
    """w = (0.4, 0.4), G = [[1, 0.8], [0.8, 1]], scale 1: 0.4 becomes 0, so the second must be 0.4 + 0.8 * 0.4."""
    parameters = BlockParameters(scales=torch.ones(1, 1), zero_points=None)
    factor = factor_gram(torch.tensor([[1.0, 0.8], [0.8, 1.0]]), 1e-6, act_order=False)
    codes = gptq_of_one(torch.tensor([[0.4, 0.4]]), parameters, spec(), factor)
    assert codes.tolist() == [[0, 1]]


def test_tiles_do_not_show() -> None:
    """More columns than one tile holds: the same codes as one column's errors spread at once."""
    layer = random_layer(5, in_features=300, widths=(6,))
    assert layer.problem.stats is not None
    gram = layer.problem.stats.held_out.gram
    assert gram is not None
    weight = layer.problem.weights[0]
    parameters = choose_parameters(split(weight, 16), spec(), "full")
    factor = factor_gram(gram, 0.01, act_order=True)
    pending, codes = weight.double().clone(), torch.zeros_like(weight)
    scales = parameters.scales.double()
    ordered = damped(gram.double(), 0.01)[factor.order][:, factor.order]
    upper = torch.linalg.cholesky(torch.linalg.inv(ordered), upper=True)  # as Frantar et al. have it
    for step, column in enumerate(factor.order.tolist()):
        scale = scales[:, column // 16]
        codes[:, column] = torch.round(pending[:, column] / scale).clamp(-8, 7)
        error = (pending[:, column] - codes[:, column] * scale) / upper[step, step]
        pending[:, factor.order[step:]] -= error[:, None] * upper[step, step:]
    assert (gptq_of_one(weight, parameters, spec(), factor) == codes).float().mean() > 0.99


@pytest.mark.parametrize("damping", [0.5, 1e-6])
def test_the_factor_is_that_of_the_damped_matrix(monkeypatch: pytest.MonkeyPatch, damping: float) -> None:
    """By blocks that don't divide it; the small damping takes float64."""
    monkeypatch.setattr("stages.quantization.search.gptq.factor._BLOCK", 20)
    layer = random_layer(0)
    assert layer.problem.stats is not None
    gram = layer.problem.stats.calibration.gram
    assert gram is not None
    factor = factor_gram(gram, damping, act_order=True)
    upper = factor.upper.double()
    ordered = damped(gram.double(), damping)[factor.order][:, factor.order]
    # Its numbers are rounded to float32.
    scale = float(ordered.abs().max())
    torch.testing.assert_close(upper * factor.unpredicted @ upper.T, ordered, rtol=0, atol=1e-6 * scale)
    assert torch.equal(torch.diagonal(factor.upper), torch.ones(48))
    assert not factor.upper.tril(-1).any()
    diagonal = torch.diagonal(gram)[factor.order]
    assert bool((diagonal[:-1] >= diagonal[1:]).all())


def test_dead_channels_are_rounded_and_disturb_nobody() -> None:
    layer = random_layer(8)
    assert layer.problem.stats is not None
    gram = layer.problem.stats.calibration.gram
    assert gram is not None
    gram = gram.clone()
    gram[5], gram[:, 5] = 0, 0
    weight = layer.problem.weights[0]
    parameters = choose_parameters(split(weight, 16), spec(), "full")
    codes = gptq_of_one(weight, parameters, spec(), factor_gram(gram, 0.01, act_order=True))
    rounded = join(quantize(split(weight, 16), parameters, spec()), 48)
    assert torch.equal(codes[:, 5], rounded[:, 5])


def test_damping_grows_until_the_matrix_can_be_factored() -> None:
    gram = torch.eye(8)
    gram[0, 1] = gram[1, 0] = 1.05  # not positive: eigenvalue -0.05
    factor = factor_gram(gram, 0.01, act_order=False)
    assert bool(torch.isfinite(factor.upper).all())
    with pytest.raises(SolveError, match="can't be factored"):
        factor_gram(-1e9 * torch.eye(8) + torch.diag(torch.full((8,), 1.0)), 0.01, act_order=False)


@pytest.mark.parametrize("seed", range(10))
def test_output_error_falls_well_below_that_of_the_ranges(seed: int) -> None:
    layer = random_layer(seed, widths=(30, 20))
    assert layer.problem.stats is not None
    plain = [full_ranges(layer.problem, "full", IDENTITY)]
    codes_only = compensate([layer.problem], replace(OPTIONS, descent_passes=0), plain)[0]
    both = compensate([layer.problem], OPTIONS, [full_ranges(layer.problem, "full", IDENTITY)])[0]
    baseline = full_ranges(layer.problem, "full", IDENTITY)
    held_out = layer.problem.stats.held_out
    losses = [joint_error(layer.problem, choices, held_out) for choices in (baseline, codes_only, both)]
    assert losses[1] < 0.9 * losses[0]
    assert losses[2] < losses[1]


def test_scaled_space_is_that_of_the_divided_activation() -> None:
    """Under an input scale the codes are those of the scaled weight against x / s."""
    layer = random_layer(6)
    assert layer.problem.stats is not None
    scale = torch.rand(48, generator=torch.Generator().manual_seed(1)) * 3 + 0.3
    weight = layer.problem.weights[0]
    gram = layer.problem.stats.calibration.gram
    assert gram is not None
    start = full_ranges(layer.problem, "full", InputScale(family="test", alpha=None, scale=scale))
    (choice,) = compensate([layer.problem], replace(OPTIONS, descent_passes=0), [start])[0]
    factor = factor_gram(gram / scale / scale[:, None], 0.01, act_order=True)
    assert choice.codes is not None
    assert torch.equal(choice.codes, gptq_of_one(weight * scale, start[0].parameters, spec(), factor))


def test_rows_in_place_of_a_gram_matrix_give_the_same_codes() -> None:
    layer = random_layer(7)
    assert layer.problem.stats is not None
    stats = replace(layer.problem.stats, calibration=row_stats(layer.tokens))
    ours, theirs = (gptq(problem, OPTIONS)[0] for problem in (layer.problem, replace(layer.problem, stats=stats)))
    assert ours.codes is not None
    assert theirs.codes is not None
    # The two Gram matrices differ in the last digit, which may turn a tie.
    assert (ours.codes == theirs.codes).float().mean() > 0.97


def test_held_out_tokens_veto_codes_that_only_fit_the_calibration_text() -> None:
    layer = random_layer(5)
    assert layer.problem.stats is not None
    layer.problem.stats.held_out.gram[:] = torch.eye(48)
    (choice,) = compensate([layer.problem], OPTIONS, [full_ranges(layer.problem, "full", IDENTITY)])[0]
    assert choice.codes is None


def test_per_channel_int8() -> None:
    layer = random_layer(2)
    assert layer.problem.stats is not None
    number = QuantSpec(bits=8, symmetric=True, granularity=PerChannel(), scale_dtype="float16")
    problem = replace(layer.problem, specs=(number,))
    chosen, baseline = gptq(problem, OPTIONS), full_ranges(problem, "full", IDENTITY)
    held_out = layer.problem.stats.held_out
    assert joint_error(problem, chosen, held_out) < joint_error(problem, baseline, held_out)


@pytest.mark.parametrize("algorithm", ["gptq", pytest.param("awq_gptq", marks=pytest.mark.thorough)])
def test_rows_of_a_large_site_are_solved_some_after_others(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sites, one of heads whose channels count together, in pieces that begin in one site and end in another."""
    layer = random_layer(4, widths=(260, 64, 20), symmetric=False)
    draws = torch.randn(8, 40, 8, generator=torch.Generator().manual_seed(1))
    problem = replace(layer.problem, output_grams=(None, draws.transpose(1, 2) @ draws / 40, None))
    solver = solver_of(problem, algorithm)
    solver = replace(solver, options=replace(solver.options, column_chunk=512))
    whole = solver.solve(problem.group)
    rows: list[int] = []

    def noted(weights: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(weights.shape[2])
        return gptq_codes(weights, *rest)

    monkeypatch.setattr("stages.quantization.search.gptq.compensate.gptq_codes", noted)
    monkeypatch.setattr("stages.quantization.search.gptq.stacks._STACKED_ON_CPU", 150 * 48)
    parts = solver.solve(problem.group)
    assert rows == [132, 148, 64]
    for one, other in zip(whole.weights, parts.weights, strict=True):
        assert torch.equal(one.codes, other.codes)
        torch.testing.assert_close(one.scales, other.scales, rtol=1e-6, atol=0)  # products of few rows differ in a bit
        torch.testing.assert_close(one.zero_points, other.zero_points, rtol=0, atol=0)
    losses = [[report.held_out_loss for report in solved.reports] for solved in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
