"""Coordinate descent against an exhaustive search over each single code and scale."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from stages.quantization.search.affine import BlockParameters, choose_parameters, join, quantize, split
from stages.quantization.search.gptq.factor import damped
from stages.records.formats import PerChannel, QuantSpec
from tests.reference.compensation import best_code, error
from tests.stages.quantization.search.problems import descent_of_one, random_layer, spec, spread, two_sided_of_one


def start(seed: int, *, in_features: int = 48, symmetric: bool = True, scale_dtype: str = "float32"):
    layer = random_layer(seed, in_features=in_features, symmetric=symmetric, widths=(5,))
    number = QuantSpec(bits=4, symmetric=symmetric, granularity=spec().granularity, scale_dtype=scale_dtype)
    weight = layer.problem.weights[0]
    parameters = choose_parameters(split(weight, 16), number, "full")
    assert layer.problem.stats is not None
    gram = layer.problem.stats.calibration.gram
    assert gram is not None
    codes = join(quantize(split(weight, 16), parameters, number), in_features)
    return weight, codes, parameters, number, damped(gram, 0.01)


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_code_is_the_best_beside_the_others(symmetric: bool) -> None:
    """After many passes nothing is left to gain by changing a single code."""
    weight, codes, parameters, number, gram = start(1, symmetric=symmetric)
    found, fitted = descent_of_one(weight, codes, parameters, number, gram, 30)
    scales, zeros = spread(fitted, 48)
    levels = range(number.code_min, number.code_max + 1)
    rows, exact = found.numpy().astype(int), gram.double().numpy()
    for n, row in enumerate(weight.double().numpy()):
        best = [best_code(row, rows[n], exact, scales[n], zeros[n], column, levels) for column in range(48)]
        # A tie within float32 may go either way.
        assert (rows[n] == best).mean() > 0.97


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("in_features", [48, 40, 300])
def test_error_falls_with_every_pass(symmetric: bool, scale_dtype: str, in_features: int) -> None:
    weight, codes, parameters, number, gram = start(
        2, symmetric=symmetric, scale_dtype=scale_dtype, in_features=in_features
    )
    losses = []
    for passes in range(4):
        found, fitted = descent_of_one(weight, codes, parameters, number, gram, passes)
        scales, zeros = spread(fitted, in_features)
        rows = found.numpy().astype(int)
        exact = gram.double().numpy()
        losses.append(
            sum(error(row, rows[n], exact, scales[n], zeros[n]) for n, row in enumerate(weight.double().numpy()))
        )
        assert found.min() >= number.code_min
        assert found.max() <= number.code_max
        assert torch.equal(fitted.scales.to(getattr(torch, scale_dtype)).float(), fitted.scales)
    # float32 keeps running errors; a pass that gains nothing may lose the last digits.
    assert all(later <= earlier * (1 + 1e-4) for earlier, later in itertools.pairwise(losses))
    assert losses[1] < 0.8 * losses[0]


def test_scale_is_the_best_beside_all_other_blocks() -> None:
    weight, codes, parameters, number, gram = start(3)
    found, fitted = descent_of_one(weight, codes, parameters, number, gram, 40)
    scales, zeros = spread(fitted, 48)
    rows, exact = found.numpy().astype(int), gram.double().numpy()
    for n, row in enumerate(weight.double().numpy()):
        least = error(row, rows[n], exact, scales[n], zeros[n])
        for block in range(3):
            for factor in (0.99, 1.01):
                moved = scales[n].copy()
                moved[block * 16 : (block + 1) * 16] *= factor
                assert error(row, rows[n], exact, moved, zeros[n]) > least


def test_no_pass_changes_nothing_and_rows_of_one_scale_keep_it() -> None:
    weight, codes, parameters, number, gram = start(4)
    same, kept = descent_of_one(weight, codes, parameters, number, gram, 0)
    assert torch.equal(same, codes)
    assert torch.equal(kept.scales, parameters.scales)
    channel = QuantSpec(bits=8, symmetric=True, granularity=PerChannel(), scale_dtype="float32")
    ranges = choose_parameters(split(weight, 48), channel, "full")
    _, kept = descent_of_one(weight, join(quantize(split(weight, 48), ranges, channel), 48), ranges, channel, gram, 2)
    assert torch.equal(kept.scales, ranges.scales)
    assert np.isfinite(kept.scales.numpy()).all()


def _together(heads: int, size: int, seed: int) -> torch.Tensor:
    """Gram matrices of strongly correlated channels, one for each head."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(heads, 40, size, generator=generator) + 2 * torch.randn(heads, 40, 1, generator=generator)
    return rows.transpose(1, 2) @ rows / 40


def _two_sided_error(found: torch.Tensor, weight: torch.Tensor, parameters, gram, output_gram) -> float:
    scales, zeros = (torch.from_numpy(part).double() for part in spread(parameters, weight.shape[1]))
    error = (found.double() - zeros) * scales - weight.double()
    whole = torch.block_diag(*output_gram.double())
    return float(torch.trace(whole @ error @ gram.double() @ error.T))


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_that_count_together_are_each_the_best_beside_the_others(symmetric: bool) -> None:
    """Each code against all others of its grid, after many passes; one channel of a head moves at a time here."""
    layer = random_layer(4, symmetric=symmetric, widths=(6,))
    weight, number = layer.problem.weights[0], spec(symmetric=symmetric)
    parameters = choose_parameters(split(weight, 16), number, "full")
    assert layer.problem.stats is not None
    assert layer.problem.stats.calibration.gram is not None
    gram, output_gram = damped(layer.problem.stats.calibration.gram, 0.01), _together(2, 3, 0)
    found = join(quantize(split(weight, 16), parameters, number), 48)
    errors = [_two_sided_error(found, weight, parameters, gram, output_gram)]
    for _ in range(20):
        found = two_sided_of_one(weight, found, parameters, number, gram, output_gram)
        errors.append(_two_sided_error(found, weight, parameters, gram, output_gram))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]
    for n, column in itertools.product(range(6), range(0, 48, 5)):
        for code in range(number.code_min, number.code_max + 1):
            other = found.clone()
            other[n, column] = code
            assert _two_sided_error(other, weight, parameters, gram, output_gram) >= errors[-1] * (1 - 1e-5)


def test_channels_that_count_alone_end_where_one_pass_of_plain_descent_ends() -> None:
    weight, codes, _, _, gram = start(3)
    alone = torch.diag(torch.tensor([0.5, 1.0, 2.0, 4.0, 0.25])).unsqueeze(0)
    per_row = QuantSpec(bits=4, symmetric=True, granularity=PerChannel(), scale_dtype="float32")
    scales = torch.ones(5, 1)
    expected, _ = descent_of_one(weight, codes, BlockParameters(scales=scales, zero_points=None), per_row, gram, 1)
    found = two_sided_of_one(weight, codes, BlockParameters(scales=scales, zero_points=None), per_row, gram, alone)
    assert torch.equal(found, expected)
