"""Samples of output channels stand for all of them."""

from __future__ import annotations

import pytest
import torch

from stages.quantization.search import awq
from stages.quantization.search.awq import awq_lite
from stages.quantization.search.choices import full_ranges, site_errors
from stages.quantization.search.problem import FINE_CHANNELS, IDENTITY, InputScale, Sample
from tests.stages.quantization.search.problems import OPTIONS, joint_error, random_layer


def test_small_layers_are_sampled_whole() -> None:
    problem = random_layer(0, widths=(FINE_CHANNELS, 20)).problem
    sample = Sample(problem, FINE_CHANNELS)
    both = zip(sample.problem.weights, problem.weights, strict=True)
    assert all(torch.equal(few, whole) for few, whole in both)
    assert sample.joint_error((2.0, 3.0)) == 5


@pytest.mark.parametrize(("width", "step"), [(513, 3), (1024, 5), (1500, 7)])
def test_the_sample_is_even_and_its_error_stands_for_all_channels(width: int, step: int) -> None:
    layer = random_layer(1, widths=(width, 700))
    sample = Sample(layer.problem, FINE_CHANNELS)
    few = sample.problem
    assert all(len(weight) <= FINE_CHANNELS for weight in few.weights)
    assert torch.equal(few.weights[0][1], layer.problem.weights[0][step])
    assert layer.problem.stats is not None
    stats = layer.problem.stats.calibration
    scale = InputScale(
        family="test", alpha=None, scale=torch.rand(48, generator=torch.Generator().manual_seed(0)) + 0.5
    )
    whole = sum(site_errors(layer.problem, full_ranges(layer.problem, "full", scale), stats))
    part = sample.joint_error(site_errors(few, full_ranges(few, "full", scale), stats))
    # A mean of 170 and more channels whose errors vary by a third or so.
    assert part == pytest.approx(whole, rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_nearly_as_good_as_one_from_all_channels(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer(seed, widths=(1500, 1100))
    assert layer.problem.stats is not None
    stats = layer.problem.stats.calibration
    ours = joint_error(layer.problem, awq_lite(layer.problem, OPTIONS), stats)
    for name in ("COARSE_CHANNELS", "FINE_CHANNELS", "_FINE_CANDIDATES"):
        monkeypatch.setattr(awq, name, 10**9)
    best = joint_error(layer.problem, awq_lite(layer.problem, OPTIONS), stats)
    baseline = joint_error(layer.problem, full_ranges(layer.problem, "full", IDENTITY), stats)
    assert ours - best < 0.02 * (baseline - best)
