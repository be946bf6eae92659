from dataclasses import replace

import pytest
import torch

from stages.solve.awq import awq_lite
from stages.solve.awq_full import awq_full
from stages.solve.awq_gptq import awq_gptq
from stages.solve.clip import awq_clip
from stages.solve.evaluate import full_ranges
from stages.solve.gptq import gptq
from stages.solve.problem import IDENTITY, SiteChoice
from stages.solve.registry import Algorithm
from stages.solve.rtn import rtn
from tests.solve.problems import OPTIONS, joint_error, random_layer


def both_signs(choices: tuple[SiteChoice, ...]) -> list[set[float]]:
    return [set(choice.parameters.scales.sign().unique().tolist()) for choice in choices]


@pytest.mark.parametrize("algorithm", [rtn, awq_lite, awq_clip, awq_full, gptq, awq_gptq])
def test_scales_are_positive_unless_signed_ones_are_asked_for(algorithm: Algorithm) -> None:
    layer = random_layer(3)
    assert both_signs(algorithm(layer.problem, OPTIONS)) == [{1.0}] * len(layer.problem.weights)
    signed = replace(OPTIONS, range_rule="signed")
    assert both_signs(algorithm(layer.problem, signed)) == [{-1.0, 1.0}] * len(layer.problem.weights)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_algorithm_is_worse_than_rounding_and_full_is_the_best(seed: int, symmetric: bool) -> None:
    layer = random_layer(seed, widths=(12, 8), symmetric=symmetric)
    assert layer.problem.stats is not None
    plain = full_ranges(layer.problem, "full", IDENTITY)
    results = {"rtn": plain} | {
        name: algorithm(layer.problem, OPTIONS)
        for name, algorithm in (
            ("lite", awq_lite),
            ("clip", awq_clip),
            ("full", awq_full),
            ("gptq", gptq),
            ("awq_gptq", awq_gptq),
        )
    }
    calibration = {
        name: joint_error(layer.problem, choices, layer.problem.stats.calibration) for name, choices in results.items()
    }
    held_out = {
        name: joint_error(layer.problem, choices, layer.problem.stats.held_out) for name, choices in results.items()
    }
    assert all(calibration[name] <= calibration["rtn"] for name in results)
    assert all(held_out[name] <= held_out["rtn"] for name in results)
    assert held_out["gptq"] <= held_out["clip"]
    assert held_out["awq_gptq"] <= held_out["full"]


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
