"""Measure the time and the device memory of a search, on one group of each shape."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from scripts.benchmarks.figures import SearchFigure
from stages.commands.quantize_options import QuantizeConfig
from stages.quantization.run import open_search
from stages.quantization.search.solver import GroupSolver
from stages.records.sites import ActivationGroup


def measure_search(config: QuantizeConfig) -> Iterator[SearchFigure]:
    """Search one group of each shape twice, and yield the second search's figures.

    Raises:
        UserError: what stages.quantize raises before it searches.
    """
    search = open_search(config)
    seen: set[tuple[int, ...]] = set()
    for group in search.groups:
        shape = (group.in_features, *(site.out_features for site in group.sites))
        if shape not in seen:
            seen.add(shape)
            yield _measure(search.solver, group, config.algo)


def _measure(solver: GroupSolver, group: ActivationGroup, algorithm: str) -> SearchFigure:
    solver.solve(group)  # libraries load and lay out memory in the first search
    cuda = solver.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(solver.device)
        torch.cuda.synchronize(solver.device)
    started = time.perf_counter()
    solver.solve(group)  # what it returns lies on the CPU: it is over when it returns
    seconds = time.perf_counter() - started
    return SearchFigure(
        group=Path(group.sites[0].name).parent.name or group.sites[0].name,
        in_features=group.in_features,
        out_features=sum(site.out_features for site in group.sites),
        algorithm=algorithm,
        seconds=seconds,
        device_peak_bytes=torch.cuda.max_memory_allocated(solver.device) if cuda else None,
    )
