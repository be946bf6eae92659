import numpy as np
import pytest
import torch

from stages.records import PerChannel, QuantSpec
from stages.solve.awq import awq_lite
from stages.solve.awq_full import awq_full
from stages.solve.clip import awq_clip, clip_ratio_grid, search_clip_ratios
from stages.solve.objective import gram_blocks
from stages.solve.problem import IDENTITY, SiteChoice
from tests.reference.search import best_clip_ratio
from tests.solve.problems import OPTIONS, joint_error, random_layer, spec

RATIOS = clip_ratio_grid(0.5, 0.05)


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


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_algorithm_is_worse_than_rounding_and_full_is_the_best(seed: int, symmetric: bool) -> None:
    layer = random_layer(seed, widths=(12, 8), symmetric=symmetric)
    assert layer.problem.stats is not None
    plain = (SiteChoice(input_scale=IDENTITY),) * 2
    results = {"rtn": plain} | {
        name: algorithm(layer.problem, OPTIONS)
        for name, algorithm in (("lite", awq_lite), ("clip", awq_clip), ("full", awq_full))
    }
    calibration = {
        name: joint_error(layer.problem, choices, layer.problem.stats.calibration) for name, choices in results.items()
    }
    held_out = {
        name: joint_error(layer.problem, choices, layer.problem.stats.held_out) for name, choices in results.items()
    }
    assert all(calibration[name] <= calibration["rtn"] for name in results)
    assert all(held_out[name] <= held_out["rtn"] for name in results)
    assert calibration["full"] <= calibration["clip"]


def test_held_out_tokens_veto_a_choice_that_only_fits_the_calibration_text() -> None:
    layer = random_layer(5)
    assert layer.problem.stats is not None
    calm = torch.ones(48)
    calm[:24] = 1e-3  # calibration never sees what the first half does
    layer.problem.stats.calibration.gram[:] = torch.diag(calm)
    layer.problem.stats.calibration.abs_mean[:] = calm
    layer.problem.stats.held_out.gram[:] = torch.diag(1 / calm)
    chosen = awq_lite(layer.problem, OPTIONS)
    assert chosen[0].input_scale is IDENTITY


def test_per_channel_int8_clips_whole_rows() -> None:
    layer = random_layer(6)
    assert layer.problem.stats is not None
    number = QuantSpec(bits=8, symmetric=True, granularity=PerChannel(), scale_dtype="float32")
    blocks = gram_blocks(layer.problem.stats.calibration, number.block_size(48))
    assert search_clip_ratios(layer.problem.weights[0], number, "full", blocks, RATIOS).shape == (20, 1)
