"""Round weights to nearest without statistics: from the model's file to codes in one pass, a small piece at a time.

What the solver makes of whole weights in float32 has the same bits, and goes through memory some twenty times. A piece
here stays in a core's own cache, in the order in which the file has it, until only its codes are left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stages.model.weights import require_finite
from stages.quantization.search.affine import (
    BlockParameters,
    BlockRange,
    RangeRule,
    as_stored,
    block_range,
    quantize,
    range_parameters,
    spec_for_range,
)
from stages.quantization.weights.bitpack import slices, turned
from stages.records.formats import QuantSpec, torch_float
from stages.records.results import QuantizedWeight, SiteReport, SolvedGroup
from stages.records.sites import ActivationGroup, MatMulSite
from stages.system.hardware import one_thread_each

_NUMBERS, _INPUTS, _CHANNELS = 1 << 18, 256, 64
"""Of a piece: about so many, of whole blocks of about so many inputs, and at least so many output channels."""
_PIECES = 16
"""That a thread rounds in turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounder:
    """Rounds groups; ``stored_weight`` gives a site's [N, K] as its file has it, and is read where it is looked at."""

    name: str
    """Of the algorithm, for reports."""
    rule: RangeRule
    specs: Mapping[str, QuantSpec]
    stored_weight: Callable[[MatMulSite], Tensor]

    def rounded(self, groups: Sequence[ActivationGroup]) -> Iterator[tuple[int, SolvedGroup]]:
        """Round ``groups``, and yield each with its place; the next is rounded while the caller has one.

        Raises:
            SolveError: a weight holds NaN or infinite values.
        """
        if not groups:
            return
        with one_thread_each(torch.get_num_threads()) as pool, ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(self._group, groups[0], pool)
            for place, following in enumerate((*groups[1:], None)):
                solved = coming.result()
                if following is not None:
                    coming = ahead.submit(self._group, following, pool)
                yield place, solved

    def _group(self, group: ActivationGroup, pool: Executor) -> SolvedGroup:
        started = time.perf_counter()
        weights = tuple(
            round_to_nearest(self.stored_weight(site), site, self.specs[site.name], self.rule, pool)
            for site in group.sites
        )
        seconds = (time.perf_counter() - started) / len(weights)
        reports = tuple(
            SiteReport(
                site=weight.site.name,
                algorithm=self.name,
                format=weight.spec.label,
                bytes=weight.spec.format_bytes(weight.site.out_features, weight.site.in_features),
                seconds=seconds,
            )
            for weight in weights
        )
        return SolvedGroup(group=group, weights=weights, reports=reports)


def round_to_nearest(
    weight: Float[Tensor, "N K"], site: MatMulSite, spec: QuantSpec, rule: RangeRule, pool: Executor
) -> QuantizedWeight:
    """Return a weight whose blocks keep their full ranges.

    Args:
        weight: in any type and order of memory.
        site: whose weight it is.
        spec: the format that is wanted; scales are of the site's type where a narrower one has no room for them.
        rule: how a block's full range becomes its scale.
        pool: rounds several pieces at once.

    Raises:
        SolveError: the weight holds NaN or infinite values.
    """
    place = _Rounded.empty(site, spec)
    pieces = _pieces(site, spec, inputs_first=weight.stride(0) == 1)
    tasks = [pieces[start : start + _PIECES] for start in range(0, len(pieces), _PIECES)]
    for _ in pool.map(partial(_round_pieces, weight, site, spec, rule, place), tasks):
        pass
    full = BlockRange(low=place.low, high=place.high)
    fitting = spec_for_range(full, spec, site.dtype)
    if fitting != spec:
        return round_to_nearest(weight, site, fitting, rule, pool)
    return QuantizedWeight(site=site, spec=spec, codes=place.codes, scales=place.scales, zero_points=place.zero_points)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rounded:
    """A place for what rounding a weight gives."""

    low: Tensor
    high: Tensor
    scales: Tensor
    zero_points: Tensor | None
    codes: Tensor

    @classmethod
    def empty(cls, site: MatMulSite, spec: QuantSpec) -> _Rounded:
        """Reserve it."""
        blocks = site.out_features, spec.num_blocks(site.in_features)
        return cls(
            low=torch.empty(blocks),
            high=torch.empty(blocks),
            scales=torch.empty(blocks, dtype=torch_float(spec.scale_dtype)),
            zero_points=None if spec.symmetric else torch.empty(blocks, dtype=torch.uint8),
            # numpy asks for huge pages: the system hands out 4 KB ones slower than they are filled
            codes=torch.from_numpy(
                np.empty((site.out_features, site.in_features), np.int8 if spec.symmetric else np.uint8)
            ),
        )

    def keep_parameters(self, channels: slice, blocks: slice, full: BlockRange, parameters: BlockParameters) -> None:
        """Keep the ranges, scales and zero points of some blocks."""
        self.low[channels, blocks], self.high[channels, blocks] = full.low, full.high
        self.scales[channels, blocks] = parameters.scales.to(self.scales.dtype)
        if self.zero_points is not None and parameters.zero_points is not None:
            self.zero_points[channels, blocks] = parameters.zero_points.to(torch.uint8)


def _pieces(site: MatMulSite, spec: QuantSpec, *, inputs_first: bool) -> list[tuple[slice, slice]]:
    """Return output channels and inputs of the pieces, in the order in which the file has them."""
    size = spec.block_size(site.in_features)
    step = max(_INPUTS // size, 1) * size if inputs_first else site.in_features
    channels = slices(site.out_features, max(_NUMBERS // step, _CHANNELS if inputs_first else 1))
    return [(part, inputs) for inputs in slices(site.in_features, step) for part in channels]


def _round_pieces(
    weight: Tensor,
    site: MatMulSite,
    spec: QuantSpec,
    rule: RangeRule,
    place: _Rounded,
    pieces: Sequence[tuple[slice, slice]],
) -> None:
    size = spec.block_size(site.in_features)
    for channels, inputs in pieces:
        blocks = _in_blocks(weight[channels, inputs], size)
        full = _range(blocks)
        require_finite(torch.cat((full.low, full.high)), f"weight of {site.name}")
        parameters = range_parameters(full, spec, rule, 1.0)
        first = inputs.start // size
        place.keep_parameters(channels, slice(first, first + blocks.shape[1]), full, parameters)
        codes = quantize(blocks, parameters, spec).flatten(1)[:, : inputs.stop - inputs.start]
        place.codes[channels, inputs] = _outputs_first(codes, spec)


def _in_blocks(part: Float[Tensor, "n k"], size: int) -> Float[Tensor, "n nB B"]:
    """Return a float32 copy cut into blocks, in the same order of memory; the last one is padded with zeros."""
    channels, inputs = part.shape
    filled = inputs + -inputs % size
    work = torch.empty((filled, channels)).T if part.stride(0) == 1 else torch.empty((channels, filled))
    work[:, :inputs] = part
    work[:, inputs:] = 0
    return work.view(channels, -1, size)


def _range(blocks: Float[Tensor, "n nB B"]) -> BlockRange:
    if blocks.stride(0) != 1:
        return block_range(blocks)
    in_memory = blocks.permute(1, 2, 0)  # reductions along another order take thirty times as long
    return BlockRange(low=in_memory.amin(dim=1).T, high=in_memory.amax(dim=1).T)


def _outputs_first(codes: Float[Tensor, "n k"], spec: QuantSpec) -> Tensor:
    """Return codes in the type that they are stored in, those of an output channel side by side."""
    stored = as_stored(codes, spec)
    return torch.from_numpy(turned(stored.T.numpy())) if codes.stride(0) == 1 else stored
