import itertools

import numpy as np
import pytest
import torch

from stages.records import HeadSharing
from stages.solve.awq import awq_lite, input_scale_candidates, rank_input_scales, share_over_heads, weight_magnitude
from stages.solve.evaluate import candidate_errors, weight_error
from stages.solve.problem import IDENTITY, InputScale, SiteChoice
from stages.solve.runner import _one_by_one
from tests.reference.search import awq_loss
from tests.reference.search import weight_magnitude as reference_magnitude
from tests.solve.problems import OPTIONS, joint_error, random_layer, spec


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


def test_weight_magnitude_normalizes_by_the_contiguous_block() -> None:
    weight = torch.rand(5, 8) * torch.tensor([1.0, 1, 1, 1, 100, 100, 100, 100])
    ours = weight_magnitude((weight,), (spec(block_size=4),))
    np.testing.assert_allclose(ours.numpy(), reference_magnitude(weight.double().numpy(), 4), rtol=1e-6)


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


@pytest.mark.parametrize("seed", range(50))
def test_never_worse_than_rounding_on_calibration_and_held_out(seed: int) -> None:
    layer = random_layer(seed, widths=(12, 8))
    chosen = awq_lite(layer.problem, OPTIONS)
    plain = (SiteChoice(input_scale=IDENTITY),) * 2
    assert layer.problem.stats is not None
    for stats in (layer.problem.stats.calibration, layer.problem.stats.held_out):
        assert joint_error(layer.problem, chosen, stats) <= joint_error(layer.problem, plain, stats)
    assert chosen[0].input_scale is chosen[1].input_scale


def test_siblings_are_ranked_by_the_loss_at_the_shared_scale() -> None:
    layer = random_layer(7, widths=(12, 30))
    assert layer.problem.stats is not None
    ranked = [trial.choices[0].input_scale for trial in rank_input_scales(layer.problem, OPTIONS)]
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


def test_mean_of_separate_sibling_scales_is_worse() -> None:
    # Negative control for the competitor's bug B5: the arithmetic mean of separately searched scales. Single layers
    # can be lucky with it; over twenty of them the joint search must win.
    averaged, joint = 0.0, 0.0
    for seed in range(20):
        problem = random_layer(seed, widths=(12, 12)).problem
        assert problem.stats is not None
        separate = [
            rank_input_scales(single, OPTIONS)[0].choices[0].input_scale.scale for single in _one_by_one(problem)
        ]
        mean = torch.stack([torch.ones(48) if scale is None else scale for scale in separate]).mean(dim=0)
        for name, scale in (
            ("mean", InputScale(family="mean", alpha=None, scale=mean)),
            ("joint", rank_input_scales(problem, OPTIONS)[0].choices[0].input_scale),
        ):
            choices = (SiteChoice(input_scale=scale),) * 2
            plain = (SiteChoice(input_scale=IDENTITY),) * 2
            stats = problem.stats.calibration
            relative = joint_error(problem, choices, stats) / joint_error(problem, plain, stats)
            averaged, joint = averaged + relative * (name == "mean"), joint + relative * (name == "joint")
    assert joint < averaged


def test_scale_repeats_over_the_query_heads_of_a_group() -> None:
    heads = HeadSharing(kv_heads=2, group_size=3, head_size=8)
    layer = random_layer(1, heads=heads)
    assert layer.problem.stats is not None
    for candidate in input_scale_candidates(layer.problem, layer.problem.stats.calibration, 0.2):
        assert candidate.scale is not None
        grouped = candidate.scale.reshape(2, 3, 8)
        assert torch.equal(grouped, grouped[:, :1].expand_as(grouped))
    values = torch.arange(48.0)
    assert share_over_heads(values, heads)[0] == (0 + 8 + 16) / 3


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


def test_result_does_not_depend_on_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer(4, widths=(33,))
    assert layer.problem.stats is not None
    whole = awq_lite(layer.problem, OPTIONS)[0]
    monkeypatch.setattr("stages.solve.evaluate._CPU_ELEMENTS", 48)
    assert awq_lite(layer.problem, OPTIONS)[0].input_scale.alpha == whole.input_scale.alpha
    error = weight_error(layer.problem.weights[0], layer.problem.specs[0], whole, "full")
    assert error.shape == (33, 48)
