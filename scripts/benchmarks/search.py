"""The search's arithmetic, its time, and what plain matrix products of the same shape reach on the same device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from scripts.benchmarks.figures import SearchFigure
from stages.commands.quantize_options import QuantizeConfig
from stages.quantization.run import open_search
from stages.quantization.search.solver import GroupSolver
from stages.records.sites import ActivationGroup

_PRODUCT_SECONDS = 1.0


def measure_search(config: QuantizeConfig) -> Iterator[SearchFigure]:
    """One group of each shape, searched twice: once to count operations, once to take the time.

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
    with FlopCounterMode(display=False) as counter:
        solver.solve(group)
    cuda = solver.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(solver.device)
        torch.cuda.synchronize(solver.device)
    started = time.perf_counter()
    solver.solve(group)  # what it returns lies on the CPU: it is over when it returns
    seconds = time.perf_counter() - started
    outputs = sum(site.out_features for site in group.sites)
    return SearchFigure(
        group=Path(group.sites[0].name).parent.name or group.sites[0].name,
        in_features=group.in_features,
        out_features=outputs,
        algorithm=algorithm,
        flops=counter.get_total_flops(),
        seconds=seconds,
        matmul_flops_per_second=_matmul_speed(outputs, group.in_features, solver.device),
        device_peak_bytes=torch.cuda.max_memory_allocated(solver.device) if cuda else None,
    )


def _matmul_speed(rows: int, inner: int, device: torch.device) -> float:
    """FLOP/s of [rows, inner] x [inner, inner] in float32."""
    left, right = torch.randn(rows, inner, device=device), torch.randn(inner, inner, device=device)
    left @ right
    count, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < _PRODUCT_SECONDS:
        left @ right
        count += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return 2 * rows * inner * inner * count / spent
