"""Solve many groups: small ones in parallel, one thread each; large ones one after another, with all threads.

Sums over a few hundred channels gain little from a second thread, and wait for it after every operation; two groups at
a time keep two cores busy. Where one group fills the memory that is allowed, its matrices are large enough for several
threads; the next group's weights and statistics are then read while it is solved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice

import torch

from stages.quantization.search.gptq.stacks import numbers_at_once
from stages.quantization.search.problem import GroupProblem
from stages.quantization.search.solver import GroupSolver
from stages.records.formats import QuantSpec
from stages.records.results import SolvedGroup
from stages.records.sites import ActivationGroup
from stages.system.hardware import one_thread_each

Solved = tuple[int, SolvedGroup]
"""A group's place among those that are solved, and its result."""

_AT_ONCE, _PART = 8, 2
"""Groups of one shape that are solved at once, and together at most one part in so many of what is solved as one
matrix: larger ones gain nothing. Those that were begun are lost when a search is stopped."""
_MEMORY = 2 << 30
"""Bytes that the groups solved in parallel may take together; one that takes more is solved by itself in any case."""
_READ_AHEAD = 3 << 29
"""Bytes of weights and Gram matrix up to which a group is read while another one is solved."""
_HELD_COPIES, _COPIES_AT_WORK, _COPIES_OF_GRAM = 2, 10, 5
"""Float32 copies that a search holds at once, at most: of all weights with their codes and scales, of the weights that
are solved as one matrix, and of the Gram matrix, where a float64 copy counts twice."""
_FLOAT32 = 4


def search_memory(group: ActivationGroup, device: torch.device) -> int:
    """Estimate how many bytes the search of ``group`` on ``device`` holds at once."""
    inputs = group.in_features
    weights = inputs * sum(site.out_features for site in group.sites)
    at_once = max(numbers_at_once(device), inputs)
    copies = _HELD_COPIES * weights + _COPIES_AT_WORK * min(weights, at_once) + _COPIES_OF_GRAM * inputs * inputs
    return _FLOAT32 * copies


def _read_memory(group: ActivationGroup) -> int:
    """Return the bytes of what is read of ``group``."""
    return _FLOAT32 * group.in_features * (group.in_features + sum(site.out_features for site in group.sites))


def solve_groups(solver: GroupSolver, groups: Sequence[ActivationGroup]) -> Iterator[Solved]:
    """Solve all ``groups`` and yield each with its place among them as soon as it is done.

    When the caller stops early, groups that were begun are finished and dropped.
    """
    if (rounder := solver.rounder) is not None:
        yield from rounder.rounded(groups)
        return
    workers = workers_on(solver.device)
    small = small_groups(groups, solver.device)
    large = [place for place in range(len(groups)) if place not in set(small)]
    together = batches(groups, solver.specs, solver.device)
    for places in _in_parallel([_task(solver, groups, batch) for batch in _among(together, small)], workers):
        yield from places
    alone = list[tuple[int, ActivationGroup]]()
    for batch in _among(together, large):
        if len(batch) > 1:
            yield from _task(solver, groups, batch)()
        else:
            alone.append((batch[0], groups[batch[0]]))
    yield from _in_turn(solver, alone)


def most_at_once(weights: int, device: torch.device) -> int:
    """Return how many groups of so many weights are solved at once where there are as many of one shape."""
    return max(min(_AT_ONCE, numbers_at_once(device) // _PART // weights), 1)


def batches(
    groups: Sequence[ActivationGroup], specs: Mapping[str, QuantSpec], device: torch.device
) -> list[tuple[int, ...]]:
    """Put small groups of the same shapes and formats together, to be solved at once; all others stay alone.

    Args:
        groups: those to search.
        specs: the formats of their sites.
        device: where.
    """
    found: list[list[int]] = []
    open_to_more: dict[tuple[object, ...], list[int]] = {}
    for place, group in enumerate(groups):
        size = group.in_features * sum(site.out_features for site in group.sites)
        most = min(most_at_once(size, device), _memory(device) // search_memory(group, device))
        kind = (
            group.in_features,
            tuple((site.out_features, site.expert is None, specs[site.name]) for site in group.sites),
            group.absorber is None,
        )
        batch = open_to_more.get(kind)
        if batch is None or len(batch) >= most:
            found.append(batch := [])
            open_to_more[kind] = batch
        batch.append(place)
    return [tuple(batch) for batch in found]


def _among(batches: Sequence[tuple[int, ...]], places: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the batches of groups at these places; those of a batch have one size, so all of it is there or none."""
    wanted = set(places)
    return [batch for batch in batches if batch[0] in wanted]


def workers_on(device: torch.device) -> int:
    """Return how many groups ``device`` solves at a time."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def _memory(device: torch.device) -> int:
    """Return the bytes that each of the groups solved in parallel may take."""
    return _MEMORY // workers_on(device)


def small_groups(groups: Sequence[ActivationGroup], device: torch.device) -> list[int]:
    """Return the places of the groups that are solved in parallel, by one thread each; all others get all threads."""
    workers = workers_on(device)
    small = [place for place, group in enumerate(groups) if search_memory(group, device) <= _memory(device)]
    return [] if workers == 1 or len(small) == 1 else small


def _task(solver: GroupSolver, groups: Sequence[ActivationGroup], batch: tuple[int, ...]) -> Callable[[], list[Solved]]:
    def solve() -> list[Solved]:
        if len(batch) == 1:
            return [(batch[0], solver.solve(groups[batch[0]]))]
        return list(zip(batch, solver.solve_alike([groups[place] for place in batch]), strict=True))

    return solve


def _in_parallel(tasks: Sequence[Callable[[], list[Solved]]], workers: int) -> Iterator[list[Solved]]:
    with one_thread_each(workers) as pool:
        waiting = iter(tasks)
        running: set[Future[list[Solved]]] = {pool.submit(task) for task in islice(waiting, workers)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                if (task := next(waiting, None)) is not None:
                    running.add(pool.submit(task))
                yield future.result()


def _in_turn(solver: GroupSolver, groups: Sequence[tuple[int, ActivationGroup]]) -> Iterator[Solved]:
    if not groups:
        return
    with ThreadPoolExecutor(1) as reader:
        coming: Future[GroupProblem] | None = None
        for (place, group), following in zip(groups, (*groups[1:], None), strict=True):
            problem = solver.pose(group) if coming is None else coming.result()
            coming = None
            if following is not None and _read_memory(following[1]) <= _READ_AHEAD:
                coming = reader.submit(solver.pose, following[1])
            solved = solver.solve_posed(problem)
            del problem  # its weights are as large as the copies that are made of the codes when they are written
            yield place, solved
