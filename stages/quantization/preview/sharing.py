"""Forecast what a run takes when several processes share it: seconds and memory of each, and bytes that move.

Sums, not simulations. Bytes are counted each time a process reads them: machines that keep files in their memory, and
processes on one machine, which share them there, read less. Seconds are those of multiplications and what takes as long
as some of them (``costs``), at the rate at which this device has just multiplied; what disks and networks take comes on
top.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from stages.calibration.capture import TextShape
from stages.quantization.preview.costs import (
    ATTENTION,
    BACK_OF_ATTENTION,
    CACHED_ATTENTION,
    FEW_ROWS,
    PER_CHANNEL,
    PER_LABEL,
    seconds_of,
)
from stages.quantization.preview.table import SharedRun, StageMemory
from stages.quantization.search.solver import search_cost
from stages.records.sites import ActivationGroup, layer_of
from stages.system.distributed import split_by_cost

COUNTS = (1, 8, 64)
"""Processes that are always shown."""
_PARTS = ("calibration", "held_out")
_FLOAT32 = 4
_STRIP = 256
"""Columns that a Gram matrix's product computes above its diagonal."""
_ROWS, _ROUNDS = 512, 3
_ENOUGH = 0.2
"""Seconds after which no further round is timed."""
_NARROWEST, _WIDEST = 256, 4096
"""Of the timed product."""
_KEPT_OF_PASS = 3
"""Copies of a layer's activations that its way back holds: forward, gradients, and what the statistics read."""
_STREAMS = 2
"""The gradients behind and before a layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassWork:
    """What stage one still computes and moves, all processes together."""

    writing: float
    """Multiplications and additions that take as long as the text that the model writes itself; one process does it."""
    forward: float
    """Multiplications and additions of the forward passes and their statistics."""
    back: float
    """The same of the pass that weighs tokens; 0 where there is none."""
    batches: tuple[int, ...]
    """Of each part of the text; one part comes after the other."""
    sent: int
    """Bytes of what is added up, which processes send to those that do it."""
    statistics: int
    """Bytes of the cache."""
    streams: int
    """Bytes of what enters each layer, which lie on the disk until tokens are weighed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a run computes and moves, however many processes share it."""

    calibration: PassWork | None
    """None where no calibration is made."""
    groups: Sequence[ActivationGroup]
    algorithm: str
    """The name of the search's."""
    seconds: Mapping[str, float]
    """Of the search, by site."""
    base: int
    """Bytes of the base model, and below of its sites' weights, of statistics that a search reads, and so on."""
    sites: int
    statistics: int
    spends_budget: bool
    """Whether the first process reads all weights and statistics once more, to choose formats."""
    weights: int
    output: int


def pass_work(
    groups: Sequence[ActivationGroup], text: TextShape, statistics: int, *, weighs: bool, own_windows: int = 0
) -> PassWork | None:
    """Return what the passes over ``text`` compute; None where it is of samples, whose sizes aren't known.

    Args:
        groups: all activations of the graph with their sites, experts' too.
        text: the windows.
        statistics: bytes of the cache.
        weighs: whether a pass back weighs the tokens.
        own_windows: how many of the windows the model writes first.
    """
    if text.seq_len is None:
        return None
    parts = (text.calibration_windows, text.held_out_windows)
    tokens = sum(parts) * text.seq_len
    outside = _outside(groups)
    products = _products(groups)
    tapped = [group for group in groups if not group.is_of_expert]
    grams = sum(
        float(group.in_features * (group.in_features + _STRIP))
        for group in tapped
        if not text.size(group, "calibration").keeps_rows
    )
    layers, hidden = _layers(groups), groups[0].in_features
    attention = ATTENTION * text.seq_len * hidden * layers
    channels = sum(group.in_features + sum(site.out_features for site in group.sites) for group in groups)
    labels = PER_LABEL * _vocabulary(outside)
    back = 2 * products + grams + (1 + BACK_OF_ATTENTION) * attention + PER_CHANNEL * channels + labels
    sent = tokens * sum(group.in_features * text.size(group, "calibration").itemsize for group in tapped)
    weighted = tokens * sum(group.in_features for group in tapped) * _FLOAT32
    return PassWork(
        writing=writing_work(groups, own_windows, text.seq_len),
        # The forward passes end at the last value that a site reads: they don't run a head.
        forward=tokens * (products - _products(outside) + grams + attention),
        back=tokens * back if weighs else 0.0,
        batches=tuple(math.ceil(windows / text.batch_size) for windows in parts),
        sent=sent + weighted if weighs else sent,
        statistics=statistics,
        streams=tokens * hidden * _FLOAT32 * (layers + 1) if weighs else 0,
    )


def writing_work(groups: Sequence[ActivationGroup], windows: int, seq_len: int) -> float:
    """Return the multiplications and additions that take as long as text that the model writes, token by token.

    Args:
        groups: all activations of the graph with their sites, experts' too.
        windows: how many are written.
        seq_len: tokens in each.
    """
    before = seq_len / 2  # tokens that one sees, in the mean
    attention = ATTENTION * before * groups[0].in_features * _layers(groups)
    labels = PER_LABEL * _vocabulary(_outside(groups))
    return windows * seq_len * (FEW_ROWS * _products(groups) + CACHED_ATTENTION * attention + labels)


def _outside(groups: Sequence[ActivationGroup]) -> list[ActivationGroup]:
    """Return the groups behind the layers, such as the head's; none where no layer is known."""
    outside = [group for group in groups if layer_of(group.sites[0].name) is None]
    return [] if len(outside) == len(groups) else outside


def _layers(groups: Sequence[ActivationGroup]) -> int:
    return len({layer_of(group.sites[0].name) for group in groups} - {None}) or 1


def _vocabulary(outside: Sequence[ActivationGroup]) -> int:
    return sum(site.out_features for group in outside for site in group.sites)


def _products(groups: Sequence[ActivationGroup]) -> float:
    """Return the multiplications and additions of a token with the weights of ``groups``."""
    return sum(
        (
            2.0 * group.in_features * site.out_features * (1.0 if site.expert is None else site.expert.share)
            for group in groups
            for site in group.sites
        ),
        start=0.0,
    )


def multiply_rate(device: torch.device, width: int) -> float:
    """Return how many multiplications and additions a second ``device`` makes in matrix products.

    Args:
        device: where the model runs.
        width: channels of its activations: products of narrow matrices are slower.
    """
    width = min(max(width, _NARROWEST), _WIDEST)
    times = (_WIDEST // width) ** 2
    left, right = torch.rand(_ROWS, width, device=device), torch.rand(width, width, device=device)

    def multiply(times: int = times) -> None:
        for _ in range(times):
            made = left @ right
        float(made[0, 0])

    multiply(1)  # which may start the device
    rounds = [seconds_of(multiply, device)]
    while len(rounds) < _ROUNDS and sum(rounds) < _ENOUGH:
        rounds.append(seconds_of(multiply, device))
    return 2.0 * times * _ROWS * width * width / median(rounds)


def shared_run(work: Work, processes: int, rate: float | None, first: int, others: int) -> SharedRun:
    """Return what each of so many processes takes.

    Args:
        work: all of it.
        processes: how many share it.
        rate: by ``multiply_rate``; None where no calibration is made.
        first: the most memory of the first process, which does alone what can't be shared.
        others: the same of each other one.
    """
    made = work.calibration
    costs = [search_cost(group, work.algorithm) for group in work.groups]
    seconds = [sum(work.seconds.get(site.name, 0.0) for site in group.sites) for group in work.groups]
    shares = split_by_cost(costs, processes)
    read = work.sites + work.statistics  # by the search
    read += work.weights + work.base - work.sites + work.output  # by the export and its check
    written = work.weights + work.output
    if work.spends_budget:
        read += work.sites + work.statistics
    if made is not None:
        read += processes * work.base + made.streams + (processes * work.sites if made.back else 0)
        written += made.statistics + made.streams
    return SharedRun(
        processes=processes,
        calibrate_seconds=None if made is None or rate is None else _calibrate_seconds(made, processes, rate),
        search_seconds=max(sum(seconds[index] for index in share) for share in shares),
        memory_first=first,
        memory_others=None if processes == 1 else others,
        read=read,
        written=written,
        sent=0 if made is None else made.sent * (processes - 1) // processes,
    )


def _calibrate_seconds(made: PassWork, processes: int, rate: float) -> float:
    turns = sum(math.ceil(batches / processes) for batches in made.batches)
    back = math.ceil(sum(made.batches) / processes)  # where one part of the text needs not wait for the other
    return (made.writing + (made.forward * turns + made.back * back) / sum(made.batches)) / rate


def weighing_memory(
    groups: Sequence[ActivationGroup], text: TextShape, processes: int, limit: int, held: int
) -> StageMemory:
    """Return what the pass that weighs tokens holds in one process.

    Args:
        groups: all activations of the graph.
        text: the windows that run.
        processes: how many share them.
        limit: bytes that the rows of several layers may take.
        held: bytes of this process already.
    """
    tokens = math.ceil(sum(text.tokens(part) or 0 for part in _PARTS) / processes)
    streams = _STREAMS * tokens * groups[0].in_features * _FLOAT32
    layers: dict[int | None, list[ActivationGroup]] = {}
    for group in groups:
        layers.setdefault(layer_of(group.sites[0].name), []).append(group)
    largest = max(_layer_bytes(layer, text) for layer in layers.values())
    widest = max(sum(group.in_features for group in layer) for layer in layers.values())
    streams += min((processes - 1) * tokens * widest * _FLOAT32, limit)
    return StageMemory(
        stage="weigh tokens",
        bytes=held + streams + largest,
        holds=f"{streams / 1e6:,.0f} MB of what its tokens hand from layer to layer, {largest / 1e6:,.0f} MB of one "
        "layer (less with fewer windows; none with --token_weights none)",
    )


def _layer_bytes(layer: Sequence[ActivationGroup], text: TextShape) -> int:
    weights = sum(group.in_features * site.out_features for group in layer for site in group.sites) * _FLOAT32
    statistics = sum(text.size(group, part).memory for group in layer for part in _PARTS)
    channels = sum(group.in_features + sum(site.out_features for site in group.sites) for group in layer)
    return weights + statistics + _KEPT_OF_PASS * text.rows_at_once * channels * _FLOAT32
