"""Every algorithm through the solver: never worse than rounding, and reports that are true of the stored numbers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stages.quantization.search import choices as choices_module
from stages.quantization.search.awq import awq_full, awq_lite
from stages.quantization.search.choices import full_ranges, rtn
from stages.quantization.search.gptq.compensate import awq_gptq, gptq
from stages.quantization.search.objective import output_error
from stages.quantization.search.problem import IDENTITY, SiteChoice
from stages.quantization.search.ranges import awq_clip
from stages.quantization.search.solver import ALGORITHMS, Algorithm
from stages.records.results import ActivationStats, QuantizedWeight, TokenStats
from stages.records.sites import NormAbsorber
from tests.stages.quantization.search.problems import (
    OPTIONS,
    gram_stats,
    joint_error,
    random_layer,
    row_stats,
    solver_of,
    spec,
    stored_weight,
)


def both_signs(choices: tuple[SiteChoice, ...]) -> list[set[float]]:
    return [set(choice.parameters.scales.sign().unique().tolist()) for choice in choices]


@pytest.mark.parametrize("algorithm", [rtn, awq_lite, awq_clip, awq_full, gptq, awq_gptq])
def test_scales_are_positive_unless_signed_ones_are_asked_for(algorithm: Algorithm) -> None:
    layer = random_layer(3)
    assert both_signs(algorithm(layer.problem, OPTIONS)) == [{1.0}] * len(layer.problem.weights)
    signed = replace(OPTIONS, range_rule="signed")
    assert both_signs(algorithm(layer.problem, signed)) == [{-1.0, 1.0}] * len(layer.problem.weights)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_algorithm_is_worse_than_rounding_and_full_is_the_best(seed: int, symmetric: bool) -> None:
    layer = random_layer(seed, widths=(12, 8), symmetric=symmetric)
    assert layer.problem.stats is not None
    results = {"rtn": full_ranges(layer.problem, "full", IDENTITY)} | {
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


@pytest.mark.parametrize("name", list(ALGORITHMS))
@pytest.mark.parametrize("symmetric", [True, False])
def test_reported_losses_are_those_of_the_stored_numbers(name: str, symmetric: bool) -> None:
    layer = random_layer(21, widths=(12, 8), symmetric=symmetric)
    solved = solver_of(layer.problem, name).solve(layer.problem.group)
    assert layer.problem.stats is not None
    for weight, original, report in zip(solved.weights, layer.problem.weights, solved.reports, strict=True):
        assert weight.codes.dtype == (torch.int8 if symmetric else torch.uint8)
        assert int(weight.codes.min()) >= weight.spec.code_min
        assert int(weight.codes.max()) <= weight.spec.code_max
        assert (weight.zero_points is None) == symmetric
        assert report.algorithm == name
        if name.startswith("rtn"):
            assert report.loss is None
            continue
        stats = layer.problem.stats.calibration
        error = float(output_error(stored_weight(weight) - original, stats).sum() / output_error(original, stats).sum())
        # The same float32 sums in another order.
        assert report.loss == pytest.approx(error, rel=1e-3)
        assert report.loss_rtn is not None
        assert report.loss <= report.loss_rtn * 1.5


def test_siblings_share_one_scale_unless_each_may_have_its_own() -> None:
    layer = random_layer(22, widths=(12, 8))
    group = replace(layer.problem.group, absorber=NormAbsorber(output="x", parameters=("gain",)))
    shared = solver_of(layer.problem, "awq_lite").solve(group).weights
    assert shared[0].input_scale is not None
    assert shared[1].input_scale is not None
    assert torch.equal(shared[0].input_scale, shared[1].input_scale)
    own = solver_of(layer.problem, "awq_lite", fold=False).solve(group)
    joint = solver_of(layer.problem, "awq_lite", fold=False, one_scale=True).solve(group)
    assert {report.alpha for report in joint.reports} == {joint.reports[0].alpha}
    losses = [sum(report.loss or 0 for report in result.reports) for result in (own, joint)]
    assert own.reports[0].site != own.reports[1].site
    # Each by itself can only fit its own output better (relative losses weigh sites a little differently).
    assert losses[0] <= losses[1] * 1.001


def _unseen(kind: str, in_features: int) -> TokenStats:
    if kind == "zeros":
        return gram_stats(torch.zeros(4, in_features))
    rows = torch.zeros(0, in_features)
    gram = torch.zeros(in_features, in_features) if kind == "no gram" else None
    return TokenStats(num_tokens=0, abs_mean=torch.zeros(in_features), gram=gram, rows=rows if gram is None else None)


@pytest.mark.parametrize(
    ("name", "bits", "used"),
    [
        ("awq_gptq", 4, "gptq"),
        ("awq_full", 4, "awq_clip"),
        ("awq_lite", 4, "rtn"),
        ("gptq", 4, "gptq"),
        ("awq_gptq", 8, "rtn"),
        ("rtn_dq", 8, "rtn_dq"),
    ],
)
def test_a_weight_that_lookups_read_too_has_no_input_scale(name: str, bits: int, used: str) -> None:
    problem = replace(random_layer(0).problem, specs=(spec(bits=bits),))
    alone = solver_of(problem, name)
    (report,) = alone.solve_posed(problem).reports
    assert (report.algorithm, report.note) == (name, "")
    solved = replace(alone, looked_up=frozenset({problem.group.sites[0].name})).solve_posed(problem)
    (weight,), (report,) = solved.weights, solved.reports
    assert weight.input_scale is None
    assert report.algorithm == used
    assert bool(report.note) == (used != name)


@pytest.mark.parametrize("name", ["awq_lite", "awq_clip", "awq_full"])
@pytest.mark.parametrize("kind", ["no gram", "no rows", "zeros"])
def test_an_expert_that_no_token_chose_is_rounded_and_says_so(name: str, kind: str) -> None:
    layer = random_layer(23, widths=(12,))
    silent = _unseen(kind, layer.problem.group.in_features)
    problem = replace(layer.problem, stats=ActivationStats(calibration=silent, held_out=silent))
    (weight,) = solver_of(problem, name).solve(problem.group).weights
    (rounded,) = solver_of(layer.problem, "rtn").solve(problem.group).weights
    assert torch.equal(weight.codes, rounded.codes)
    assert torch.equal(weight.scales, rounded.scales)
    assert weight.input_scale is None
    (report,) = solver_of(problem, name).solve(problem.group).reports
    assert report.algorithm == "rtn"
    assert "no calibration token" in report.note
    assert (report.loss, report.loss_rtn, report.held_out_loss) == (None, None, None)


@pytest.mark.parametrize("kind", ["no gram", "no rows", "zeros"])
def test_an_expert_that_only_held_out_tokens_missed_is_searched(kind: str) -> None:
    layer = random_layer(24, widths=(12,))
    assert layer.problem.stats is not None
    silent = _unseen(kind, layer.problem.group.in_features)
    stats = ActivationStats(calibration=layer.problem.stats.calibration, held_out=silent)
    problem = replace(layer.problem, stats=stats)
    solved = solver_of(problem, "awq_full").solve(problem.group)
    (report,) = solved.reports
    assert report.note == ""
    assert report.held_out_loss is None
    assert report.loss is not None
    assert report.loss_rtn is not None
    assert report.loss < report.loss_rtn
    assert bool(torch.isfinite(solved.weights[0].scales).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["awq_lite", "awq_clip", "awq_full"])
def test_codes_depend_neither_on_chunks_nor_on_threads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_layer(4, widths=(133,)).problem
    solver = solver_of(problem, name)
    threads = torch.get_num_threads()
    whole = solver.solve(problem.group)
    monkeypatch.setattr(choices_module, "_CPU_ELEMENTS", 48)
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        parts = replace(solver, options=replace(OPTIONS, column_chunk=1024)).solve(problem.group)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(parts.weights[0].codes, whole.weights[0].codes)
    assert torch.equal(parts.weights[0].scales, whole.weights[0].scales)
    assert whole.reports[0].loss is not None
    # The same float32 sums in another order.
    assert parts.reports[0].loss == pytest.approx(whole.reports[0].loss, rel=1e-5)


def test_codes_from_128_on_survive() -> None:
    layer = random_layer(10)
    problem = replace(layer.problem, specs=(spec(symmetric=False, bits=8),))
    (stored,) = solver_of(problem, "awq_lite").solve(problem.group).weights
    assert stored.codes.dtype == torch.uint8
    assert int(stored.codes.max()) > 200
    # Half of 1/255 of a block's range, which is about four standard deviations.
    assert float((stored_weight(stored) - problem.weights[0]).norm() / problem.weights[0].norm()) < 0.01


@dataclass
class MatMulTypes(TorchDispatchMode):
    """Note the number types of all matrix products that torch computes in this thread."""

    seen: set[torch.dtype] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__.rstrip("_") in ("mm", "bmm", "addmm", "baddbmm", "mv", "dot"):
            self.seen |= {argument.dtype for argument in args if isinstance(argument, torch.Tensor)}
        return func(*args, **(kwargs or {}))


def test_no_product_is_computed_in_half_precision() -> None:
    """A CPU has no BLAS for float16: its products are a hundred times slower."""
    layer = random_layer(9)
    found = MatMulTypes()
    # Fewer rows than channels are kept as the model computed them.
    stats = ActivationStats(
        calibration=row_stats(layer.tokens[:16].half()), held_out=row_stats(layer.held_out[:16].half())
    )
    problem = replace(layer.problem, stats=stats)
    with found:
        solver_of(problem, "awq_full").solve(problem.group)
    assert found.seen
    assert found.seen <= {torch.float32, torch.float64}


def test_heads_whose_channels_count_together_get_codes_of_their_own() -> None:
    """What is reported is tr(H D G D^T), relative to the output; and it is smaller than without the last pass."""
    layer = random_layer(6, widths=(12,))
    rows = torch.randn(3, 30, 4) + 2 * torch.randn(3, 30, 1)
    output_gram = rows.transpose(1, 2) @ rows / 30
    problem = replace(layer.problem, output_grams=(output_gram,))
    (report,), (weight,) = (getattr(solver_of(problem, "awq_gptq").solve(problem.group), name) for name in _PARTS)
    (plain,) = solver_of(layer.problem, "awq_gptq").solve(problem.group).weights
    whole, gram = torch.block_diag(*output_gram).double(), layer.tokens.double().T @ layer.tokens.double() / 300

    def relative(stored: QuantizedWeight) -> float:
        original = problem.weights[0].double()
        error = stored_weight(stored).double() - original
        return float(torch.trace(whole @ error @ gram @ error.T) / torch.trace(whole @ original @ gram @ original.T))

    assert report.loss == pytest.approx(relative(weight), rel=1e-3)
    assert relative(weight) < 0.97 * relative(plain)


_PARTS = ("reports", "weights")
