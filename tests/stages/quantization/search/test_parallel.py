"""Groups in parallel or one after another: the same results, the small ones first, and an early end is clean."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from stages.quantization.search import parallel
from stages.quantization.search.parallel import search_memory, solve_groups
from stages.quantization.search.problem import GroupProblem
from stages.quantization.search.solver import GroupSolver
from stages.records.results import ActivationStats, SearchStats, SolvedGroup
from stages.records.sites import ActivationGroup, ExpertPlace
from tests.stages.quantization.search.problems import gram_stats, random_layer, site, solver_of, spec

CPU = torch.device("cpu")
GROUP = random_layer(0, widths=(12, 8)).problem.group


def groups(count: int) -> list[ActivationGroup]:
    return [replace(GROUP, activation=f"x{place}") for place in range(count)]


def solver(seen: list[tuple[str, int]] | None = None) -> GroupSolver:
    """Return one that notes the threads of each search in ``seen``."""
    original = solver_of(random_layer(0, widths=(12, 8)).problem, "awq_lite")

    def noted(problem: GroupProblem, options: object) -> object:
        if seen is not None:
            seen.append((problem.group.activation, torch.get_num_threads()))
        return original.algorithm(problem, options)

    return replace(original, algorithm=noted)


def noting_reads(original: GroupSolver) -> tuple[GroupSolver, list[str]]:
    """Return the same solver, and a list of the activations whose statistics it reads, which grows."""
    read: list[str] = []

    def stats(activation: str) -> object:
        read.append(activation)
        return original.read_stats(activation)

    return replace(original, read_stats=stats), read


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def same(one: SolvedGroup, other: SolvedGroup) -> bool:
    both = zip(one.weights, other.weights, strict=True)
    return all(torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales) for a, b in both)


def experts_of(index: int) -> tuple[ActivationGroup, ...]:
    """Both projections of one expert, as a node lists them."""
    places = {"fc1": (12, 16), "fc2": (16, 8)}
    made = []
    for projection, (out_features, in_features) in places.items():
        name = f"{index}.{projection}"
        place = ExpertPlace(node="y", projection=projection, index=index, share=0.5)
        sites = (replace(site(name, out_features, in_features), activation=name, expert=place, op_type="MoE"),)
        made.append(replace(GROUP, activation=name, in_features=in_features, sites=sites, absorber=None))
    return tuple(made)


def test_experts_that_are_solved_at_once_are_those_solved_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = [group for index in range(3) for group in experts_of(index)]
    generator = torch.Generator().manual_seed(0)
    weights = {g.activation: torch.randn(g.sites[0].out_features, g.in_features, generator=generator) for g in experts}
    # Few rows, many, and none at all, as routers choose.
    rows = {
        g.activation: torch.randn(9 + 13 * place, g.in_features, generator=generator) for place, g in enumerate(experts)
    }
    rows["2.fc1"] = torch.zeros(4, 16)
    stats = {
        name: SearchStats(
            tokens=ActivationStats(calibration=gram_stats(x), held_out=gram_stats(x[::2])), channel_weights={}
        )
        for name, x in rows.items()
    }
    one_by_one = replace(
        solver_of(random_layer(0, widths=(12, 8)).problem, "awq_gptq"),
        specs={g.sites[0].name: spec(symmetric=False, block_size=4) for g in experts},
        read_weight=lambda each: weights[each.activation],
        read_stats=stats.__getitem__,
    )
    at_once: list[int] = []
    alike = GroupSolver.solve_alike
    monkeypatch.setattr(
        GroupSolver, "solve_alike", lambda self, groups: at_once.append(len(groups)) or alike(self, groups)
    )
    solved = dict(solve_groups(one_by_one, experts))
    assert at_once == [3, 3]
    for place, group in enumerate(experts):
        expected = one_by_one.solve(group)
        assert same(solved[place], expected), group.activation
        assert replace(solved[place].reports[0], seconds=0.0) == replace(expected.reports[0], seconds=0.0)


@pytest.mark.parametrize(("in_features", "widths"), [(48, (12, 8, 32)), (300, (27, 5, 24))])
def test_layers_that_are_solved_at_once_are_those_solved_one_by_one(in_features: int, widths: tuple[int, ...]) -> None:
    """Rows that no vector register divides, more columns than a tile, and heads whose channels count together."""
    generator = torch.Generator().manual_seed(3)
    problems = {
        f"x{seed}": random_layer(seed, in_features=in_features, widths=widths, symmetric=False).problem
        for seed in range(3)
    }
    layers = [
        ActivationGroup(
            activation=name,
            in_features=in_features,
            sites=tuple(replace(each, name=f"{name}.{each.name}", activation=name) for each in problem.group.sites),
            absorber=None,
        )
        for name, problem in problems.items()
    ]
    draws = torch.randn(3, widths[-1] // 8, 40, 8, generator=generator)
    stats = {
        group.activation: SearchStats(
            tokens=problems[group.activation].stats,
            channel_weights={},
            output_grams={group.sites[-1].name: draw.transpose(1, 2) @ draw / 40},
        )
        for group, draw in zip(layers, draws, strict=True)
    }
    weights = {
        each.name: weight
        for group in layers
        for each, weight in zip(group.sites, problems[group.activation].weights, strict=True)
    }
    solver = replace(
        solver_of(random_layer(0, widths=(12, 8)).problem, "awq_gptq"),
        specs=dict.fromkeys(weights, spec(symmetric=False)),
        read_weight=lambda each: weights[each.name],
        read_stats=stats.__getitem__,
    )
    assert parallel.batches(layers, solver.specs, CPU) == [(0, 1, 2)]
    solved = dict(solve_groups(solver, layers))
    for place, group in enumerate(layers):
        expected = solver.solve(group)
        assert same(solved[place], expected)
        assert [replace(report, seconds=0.0) for report in solved[place].reports] == [
            replace(report, seconds=0.0) for report in expected.reports
        ]


def test_what_is_solved_at_once_is_small_alike_and_few(monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(GROUP, activation="other", sites=(site("site0", 12, 48), site("wide", 80, 48)))
    specs = dict.fromkeys(["site0", "site1", "wide"], spec())
    layers = [GROUP, other, *groups(9)]
    assert parallel.batches(layers, specs, CPU) == [(0, 2, 3, 4, 5, 6, 7, 8), (1,), (9, 10)]
    monkeypatch.setattr("stages.quantization.search.gptq.stacks._STACKED_ON_CPU", 2 * 3 * 20 * 48)
    assert parallel.batches(groups(7), specs, CPU) == [(0, 1, 2), (3, 4, 5), (6,)]
    monkeypatch.setattr(parallel, "_MEMORY", 4 * search_memory(GROUP, CPU))  # shared by two threads
    assert parallel.batches(groups(3), specs, CPU) == [(0, 1), (2,)]


def test_small_groups_have_a_thread_each_and_all_come_once() -> None:
    seen: list[tuple[str, int]] = []
    solved = dict(solve_groups(solver(seen), groups(5)))
    assert sorted(solved) == [0, 1, 2, 3, 4]
    assert {threads for _, threads in seen} == {1}
    assert torch.get_num_threads() == 2
    expected = solver().solve(GROUP)
    assert all(same(group, expected) and group.group.activation == f"x{place}" for place, group in solved.items())


def test_large_groups_have_all_threads_and_the_next_one_is_read_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_MEMORY", search_memory(GROUP, CPU))
    seen: list[tuple[str, int]] = []
    some, read = noting_reads(solver(seen))
    coming = solve_groups(some, groups(3))
    place, _ = next(coming)
    assert place == 0
    assert seen == [("x0", 2)]
    assert [place for place, _ in coming] == [1, 2]
    assert read == ["x0", "x1", "x2"]
    assert {threads for _, threads in seen} == {2}


def test_a_group_that_is_too_large_to_lie_beside_another_is_read_when_its_turn_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parallel, "_MEMORY", search_memory(GROUP, CPU))
    monkeypatch.setattr(parallel, "_READ_AHEAD", 4 * 48 * (48 + 20) - 1)  # weights of 20 channels, and the Gram matrix
    some, read = noting_reads(solver())
    for place, _ in solve_groups(some, groups(3)):
        assert len(read) == place + 1


def test_a_large_group_waits_for_the_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    large = replace(GROUP, activation="large", sites=(*GROUP.sites, site("more", 200, 48)))
    monkeypatch.setattr(parallel, "_MEMORY", search_memory(large, CPU))
    seen: list[tuple[str, int]] = []
    some = solver(seen)
    some = replace(some, specs=dict.fromkeys(["more", *some.specs], next(iter(some.specs.values()))))
    weights = {place.name: some.read_weight(place) for place in GROUP.sites}
    weights["more"] = torch.randn(200, 48)
    some = replace(some, read_weight=lambda place: weights[place.name])
    list(solve_groups(some, [large, *groups(2)]))
    assert seen[-1] == ("large", 2)
    assert dict(seen) == {"x0": 1, "x1": 1, "large": 2}


def test_who_stops_early_waits_for_nothing_but_what_has_begun() -> None:
    before = threading.active_count()
    coming = solve_groups(solver(), groups(50))
    next(coming)
    coming.close()
    assert threading.active_count() == before


def test_an_error_of_a_group_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(problem: GroupProblem, options: object) -> object:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        list(solve_groups(replace(solver(), algorithm=broken), groups(3)))


def test_nothing_to_solve() -> None:
    assert list(solve_groups(solver(), [])) == []
