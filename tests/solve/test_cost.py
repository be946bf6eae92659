"""Counted operations are those of real runs: an algorithm that changes shows here which count must follow."""

from __future__ import annotations

from dataclasses import astuple, replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stages.records import ActivationStats, PerBlock, PerChannel, QuantSpec
from stages.solve.cost import StatisticsForm, Work, count_work, estimated_seconds, measure_rates
from stages.solve.problem import GroupProblem
from tests.solve.problems import OPTIONS, random_layer, row_stats, solver_of

BLOCK = 32
RATIOS, REFITS = 11, 3
"""Of OPTIONS: clip ratios from 1 to 0.5 in steps of 0.05; refits of stages.solve.ranges."""
TILE = 128
FORMAT = QuantSpec(bits=4, symmetric=True, granularity=PerBlock(block_size=BLOCK), scale_dtype="float32")


class Counted(TorchDispatchMode):
    """Multiplications of matrix products, and numbers that are rounded, while torch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.rounded = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in ("mm", "bmm"):
            self.products += args[0].numel() * args[1].shape[-1]
        elif name in ("addmm", "baddbmm"):
            self.products += args[1].numel() * args[2].shape[-1]
        elif name in ("round", "round_"):
            self.rounded += args[0].numel()
        return func(*args, **(kwargs or {}))


def layer(*, rows: bool = False, spec: QuantSpec = FORMAT) -> GroupProblem:
    """Two sites whose channels are more than are looked at in samples."""
    drawn = random_layer(0, in_features=512, widths=(700, 300))
    problem = replace(drawn.problem, specs=(spec, spec))
    if not rows:
        return problem
    stats = ActivationStats(calibration=row_stats(drawn.tokens), held_out=row_stats(drawn.held_out))
    return replace(problem, stats=stats)


def counted(problem: GroupProblem, algorithm: str) -> Counted:
    solver = solver_of(problem, algorithm)
    solver = replace(solver, options=replace(OPTIONS, column_chunk=1024))
    with Counted() as count:
        solver.solve(problem.group)
    return count


def expected(problem: GroupProblem, algorithm: str) -> Work:
    specs = {site.name: spec for site, spec in zip(problem.group.sites, problem.specs, strict=True)}
    stats = problem.stats
    assert stats is not None
    form = StatisticsForm(
        calibration_rows=None if stats.calibration.rows is None else stats.calibration.num_tokens,
        held_out_rows=None if stats.held_out.rows is None else stats.held_out.num_tokens,
    )
    return count_work(algorithm, problem.group, specs, form, OPTIONS)


def all_products(work: Work, block: int = BLOCK) -> float:
    """Those that the rates of ranges and walks contain, too."""
    in_blocks = (RATIOS + 2 * REFITS) * block
    return work.products + work.ranged * in_blocks + work.descended * (block + TILE)


def all_roundings(work: Work) -> float:
    return work.rounded + work.ranged * (RATIOS + 2 * REFITS) + work.compensated + work.descended


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["awq_lite", "awq_clip", "awq_full", "gptq", "awq_gptq"])
def test_counts_are_those_of_a_run(algorithm: str) -> None:
    problem = layer()
    found, work = counted(problem, algorithm), expected(problem, algorithm)
    assert found.products == pytest.approx(all_products(work), rel=0.1)
    assert found.rounded == pytest.approx(all_roundings(work), rel=0.1)


def test_kept_rows_are_multiplied_as_they_are() -> None:
    problem = layer(rows=True)
    found, work = counted(problem, "awq_full"), expected(problem, "awq_full")
    # Blocks of the Gram matrix are made from the rows anew for every range search.
    assert found.products == pytest.approx(all_products(work), rel=0.2)
    assert work.products != expected(layer(), "awq_full").products


def test_whole_rows_multiply_with_the_whole_gram_matrix() -> None:
    spec = replace(FORMAT, bits=8, granularity=PerChannel())
    problem = layer(spec=spec)
    found, work = counted(problem, "awq_clip"), expected(problem, "awq_clip")
    assert found.products == pytest.approx(work.products, rel=0.1)
    assert work.products > 5 * expected(layer(), "awq_clip").products


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["rtn", "rtn_dq", "mse"])
def test_rounding_multiplies_nothing(algorithm: str) -> None:
    problem = replace(layer(), stats=None)
    solver = solver_of(problem, algorithm)
    with Counted() as count:
        replace(solver, read_stats=None).solve(problem.group)
    work = count_work(algorithm, problem.group, dict(solver.specs), StatisticsForm(), OPTIONS)
    assert count.products == work.products == 0
    assert count.rounded == pytest.approx(all_roundings(work), rel=0.1)


def test_a_factor_and_each_walk_are_counted() -> None:
    problem = layer()
    specs = {site.name: FORMAT for site in problem.group.sites}
    none, two = (
        count_work("gptq", problem.group, specs, StatisticsForm(), replace(OPTIONS, descent_passes=passes))
        for passes in (0, 2)
    )
    weights = 512 * 1000
    assert none.factored == two.factored == 512**3
    assert (none.compensated, none.descended, two.descended) == (weights, 0, 2 * weights)
    assert two.products - none.products > 2 * weights * 512


def test_rates_are_measured_and_seconds_add_up() -> None:
    rates = measure_rates(torch.device("cpu"), FORMAT, replace(OPTIONS, column_chunk=256), with_statistics=True)
    assert all(rate > 1e4 for rate in astuple(rates)), rates
    work = Work(products=rates.products, descended=2 * rates.descended)
    assert estimated_seconds(work, rates) == pytest.approx(3)
    assert estimated_seconds(work + work.times(2), rates) == pytest.approx(9)


def test_the_counter_counts() -> None:
    with Counted() as count:
        a, b = torch.ones(3, 4), torch.ones(4, 5)
        product: Tensor = a @ b
        product.round_()
    assert (count.products, count.rounded) == (60, 15)
