"""Choices are kept where held-out tokens confirm them, and measured once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from stages.quantization.search.awq import awq_lite
from stages.quantization.search.choices import (
    errors_of,
    first_validated,
    full_ranges,
    keep_validated,
    measured,
    output_energies,
    rtn,
    site_errors,
    stored_weight,
)
from stages.quantization.search.objective import joint_errors
from stages.quantization.search.problem import IDENTITY, Errors, InputScale, evenly_spaced
from stages.records.results import TokenStats
from tests.stages.quantization.search import problems
from tests.stages.quantization.search.problems import OPTIONS, random_layer

LOUD = InputScale(family="test", alpha=None, scale=torch.full((48,), 1.0).index_fill_(0, torch.arange(24), 1e-4))
"""A scale that spoils half of the channels."""


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


def test_the_first_candidate_that_both_texts_confirm_is_taken_and_later_ones_are_never_made() -> None:
    problem = random_layer(0).problem
    good = full_ranges(problem, "full", IDENTITY)

    def ranked():
        yield full_ranges(problem, "full", LOUD)
        yield good
        raise AssertionError("made for nothing")

    (choice,) = first_validated(problem, OPTIONS, ranked())
    assert choice.input_scale is IDENTITY
    assert torch.equal(choice.parameters.scales, good[0].parameters.scales)


def test_rounding_is_the_answer_where_no_candidate_passes() -> None:
    problem = random_layer(0).problem
    (choice,) = first_validated(problem, OPTIONS, [full_ranges(problem, "full", LOUD)])
    (baseline,) = rtn(problem, OPTIONS)
    assert torch.equal(choice.parameters.scales, baseline.parameters.scales)
    assert choice.errors is not None


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_chain_of_refinements_ends_at_the_best_on_held_out_tokens(kept: int) -> None:
    problem = random_layer(1).problem
    (choice,) = full_ranges(problem, "full", IDENTITY)
    chain = []
    for step in range(3):
        choice = choice if step == 0 else choice.refined(choice.parameters)
        choice = replace(choice, errors=Errors(calibration=-float(step), held_out=float(step != kept)))
        chain.append(choice)
    (found,) = keep_validated(problem, (choice,))
    assert found.errors is chain[kept].errors
    assert found.fallback is None


def test_measured_choices_are_not_measured_again() -> None:
    problem = random_layer(2).problem
    once = measured(problem, full_ranges(problem, "full", IDENTITY))
    assert measured(problem, once)[0] is once[0]
    assert problem.stats is not None
    assert errors_of(once[0]).held_out == site_errors(problem, once, problem.stats.held_out)[0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_error_of_a_choice_is_that_of_the_stored_weight(symmetric: bool) -> None:
    layer = random_layer(3, symmetric=symmetric)
    problem, weight = layer.problem, layer.problem.weights[0]
    scale = InputScale(family="test", alpha=None, scale=torch.linspace(0.5, 2, 48))
    (choice,) = full_ranges(problem, "full", scale)
    stored = problems.stored_weight(stored_weight(problem.group.sites[0], weight, problem.specs[0], choice))
    outputs = (stored - weight).double() @ layer.tokens.double().T
    assert problem.stats is not None
    (error,) = site_errors(problem, (choice,), problem.stats.calibration)
    # Sums of 48 * 48 float32 products.
    assert error == pytest.approx(float(outputs.square().sum() / 300), rel=1e-4)
    (energy,) = output_energies(weight, None, (problem.stats.calibration,))
    assert energy == pytest.approx(float((weight.double() @ layer.tokens.double().T).square().sum() / 300), rel=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_evenly_spaced_channels_stand_for_all_of_a_wide_site(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer(3, widths=(901,), symmetric=symmetric)
    problem, weight = layer.problem, layer.problem.weights[0]
    assert problem.stats is not None
    both = problem.stats.calibration, problem.stats.held_out
    choices = awq_lite(problem, OPTIONS)
    whole = [site_errors(problem, choices, stats)[0] for stats in both], output_energies(weight, None, both)
    seen: list[int] = []
    original = joint_errors

    def noted(error: torch.Tensor, stats: Sequence[TokenStats]) -> list[float]:
        seen.append(len(error))
        return original(error, stats)

    monkeypatch.setattr("stages.quantization.search.choices.joint_errors", noted)
    monkeypatch.setattr("stages.quantization.search.choices.MEASURED_CHANNELS", 300)
    some = [site_errors(problem, choices, stats)[0] for stats in both], output_energies(weight, None, both)
    assert seen == [181, 181, 181]  # every fifth
    # 181 channels whose errors scatter by a fifth or so.
    assert some[0] == pytest.approx(whole[0], rel=0.1)
    assert some[1] == pytest.approx(whole[1], rel=0.1)


@pytest.mark.parametrize("channels", [1536, 3584, 28672, 5760, 100])
def test_evenly_spaced_channels_are_of_both_projections_where_rows_alternate(channels: int) -> None:
    chosen = torch.arange(channels)[evenly_spaced(channels, 128)]
    assert len(chosen) <= 128
    assert abs(int((chosen % 2 == 0).sum()) - int((chosen % 2).sum())) <= 1


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_layer(2, in_features=40, widths=(21,), symmetric=False).problem
    scale = InputScale(family="test", alpha=None, scale=torch.rand(40) + 0.5)
    (whole,) = full_ranges(problem, "full", scale)
    arguments = problem.group.sites[0], problem.weights[0], problem.specs[0]
    codes = stored_weight(*arguments, whole).codes
    monkeypatch.setattr("stages.quantization.search.choices._CPU_ELEMENTS", 4 * 40)
    (parts,) = full_ranges(problem, "full", scale)
    assert torch.equal(whole.parameters.scales, parts.parameters.scales)
    torch.testing.assert_close(whole.parameters.zero_points, parts.parameters.zero_points, rtol=0, atol=0)
    assert torch.equal(codes, stored_weight(*arguments, parts).codes)
