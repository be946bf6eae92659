"""Measure how much longer calibration's passes take than plain inference: alternating rounds, medians compared."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
import torch

from scripts.benchmarks.figures import CaptureFigure
from stages.calibration.capture import fold_in
from stages.calibration.statistics import StatisticsAccumulator, StatisticsSize
from stages.model.directory import ModelDirectory
from stages.model.load import load_graph
from stages.model.sites import find_groups
from stages.runtime.feeds import CausalFeeds
from stages.runtime.providers import ProviderChoice
from stages.runtime.session import SessionSettings, open_session
from stages.runtime.tap import open_value_tap

_MANY_TOKENS = 1 << 40
"""So many that Gram matrices are kept, as for real calibrations."""


def measure_capture(
    directory: ModelDirectory, tokens: np.ndarray, choice: ProviderChoice, device: torch.device, rounds: int
) -> CaptureFigure:
    """Run ``tokens`` alternately through the plain and the tapped graph.

    Args:
        directory: the base model.
        tokens: [batch, length].
        choice: execution providers of both graphs.
        device: where statistics are added up.
        rounds: how many are counted; one more comes before, in which memory is laid out.

    Raises:
        GraphError: ONNX Runtime can't open or run the model.
    """
    groups = find_groups(load_graph(directory))
    plain = open_session(directory.onnx_file, SessionSettings(providers=choice.names))
    feeds = CausalFeeds.of(plain, directory)(tokens)
    activations = tuple(group.activation for group in groups)
    sums = {
        group.activation: StatisticsAccumulator(
            group.activation,
            StatisticsSize(in_features=group.in_features, tokens=_MANY_TOKENS, itemsize=4),
            device,
        )
        for group in groups
    }
    with open_value_tap(load_graph(directory), directory, activations, choice, {}) as tap:
        times: dict[str, list[float]] = {"plain": [], "tapped": [], "observed": []}
        for _ in range(rounds + 1):
            times["plain"].append(seconds_on(device, lambda: plain.run(["logits"], feeds)))
            started = time.perf_counter()
            values = {name: [value] for name, value in tap.run(tokens)}
            times["tapped"].append(time.perf_counter() - started)
            adding = seconds_on(device, partial(fold_in, sums, values, device))
            times["observed"].append(times["tapped"][-1] + adding)
    speeds = {name: tokens.size / median(of_rounds[1:]) for name, of_rounds in times.items()}
    return CaptureFigure(
        tokens=int(tokens.size),
        plain=speeds["plain"],
        tapped=speeds["tapped"],
        observed=speeds["observed"],
        provider=tap.providers.names[0],
    )


def seconds_on(device: torch.device, work: Callable[[], object]) -> float:
    """Return how long ``work`` takes until ``device`` has done it."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
