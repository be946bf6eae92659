"""Tune a finished search decoder block by decoder block (signround, refine), each saved before the next begins.

Two streams of hidden states go through the blocks in parallel: the float one, which says what a block should give, and
the one that the blocks as quantized so far make. ONNX Runtime computes what enters the first block; the blocks compute
everything else, as torch modules. A run that was stopped sends both streams through the finished blocks again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from stages.calibration.cache import CalibrationCache
from stages.commands.progress import progress_bar
from stages.model.directory import ModelDirectory
from stages.model.weights import read_weight
from stages.quantization.blocks.context import BlockContext, reported
from stages.quantization.blocks.error_feedback import ErrorFeedback
from stages.quantization.blocks.learnable_weight import effective_weight
from stages.quantization.blocks.signround import SignRoundOptions, StreamPair, TunedBlock, tune_block
from stages.quantization.search.problem import SearchOptions
from stages.quantization.weights.store import QuantizedStore
from stages.records.results import SearchStats, SolvedGroup
from stages.runtime.blocks.cut import DecoderBlock, cut_block
from stages.runtime.blocks.decoder import DecoderBlocks
from stages.runtime.blocks.module import BlockModule
from stages.runtime.blocks.stream import BlockInputs, BlockRunner, read_inputs, sizes_of_batches

_LOGGER = logging.getLogger(__name__)


@runtime_checkable
class BlockStep(Protocol):
    """A way to improve a block's weights; never worse than its start on the held-out windows."""

    @property
    def name(self) -> str:
        """Return the algorithm's name for reports."""

    @property
    def ticks(self) -> int | None:
        """Return how often ``advance`` is called for a block; None: once a group."""

    def __call__(self, block: BlockContext, advance: Callable[[], None]) -> TunedBlock:
        """Return the block's weights, improved; call ``advance`` as the work goes on."""


@dataclass(frozen=True, slots=True)
class SignRoundStep:
    """Tunes roundings and ranges by signed gradient descent."""

    options: SignRoundOptions
    name: str = "signround"

    @property
    def ticks(self) -> int | None:
        """Return the number of iterations."""
        return self.options.iterations

    def __call__(self, block: BlockContext, advance: Callable[[], None]) -> TunedBlock:
        """Tune the block."""
        starts = tuple(weight for group in block.starts for weight in group.weights)
        return tune_block(block.run, block.originals, starts, block.calibration, block.held_out, self.options, advance)


@dataclass(frozen=True, slots=True)
class RefineStep:
    """Solves codes and ranges anew for what the quantized layers before give: error feedback."""

    options: SearchOptions
    name: str = "refine"
    ticks: int | None = None

    def __call__(self, block: BlockContext, advance: Callable[[], None]) -> TunedBlock:
        """Solve the block's groups one after another."""
        return ErrorFeedback(block, self.options).refine_block(advance)


@dataclass(slots=True, kw_only=True)
class _Streams:
    """Hidden states in front of a block, [windows, length, hidden]; the held-out windows come last."""

    exact: Tensor
    tuned: Tensor
    calibration_windows: int

    def pairs(self, wanted: Tensor) -> tuple[StreamPair, StreamPair]:
        """Return the calibration and the held-out windows, with what is wanted behind the block."""
        count = self.calibration_windows
        return (
            StreamPair(exact=self.exact[:count], quantized=self.tuned[:count], wanted=wanted[:count]),
            StreamPair(exact=self.exact[count:], quantized=self.tuned[count:], wanted=wanted[count:]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTuner:
    """Tunes the blocks of a model with one step, from the weights in ``start``, and saves them to ``store``.

    The recipes of both stores list the same groups.
    """

    model: DecoderBlocks
    directory: ModelDirectory
    cache: CalibrationCache
    start: QuantizedStore
    store: QuantizedStore
    step: BlockStep
    batch_size: int
    device: torch.device
    read_stats: Callable[[str], SearchStats]
    """Gives what the search minimized, by activation."""

    def tune(self) -> None:
        """Tune the blocks that aren't finished; groups outside of blocks are copied as they are.

        Raises:
            GraphError: ONNX Runtime can't run the part in front of the first block.
            CacheMismatch: the cache's tokens are gone.
        """
        for index in self.model.others:
            if not self.store.is_finished(index):
                self.store.write(index, self.start.read_group(index))
        unfinished = [place for place, groups in enumerate(self.model.groups) if not self._is_finished(groups)]
        if unfinished:
            self._tune_up_to(unfinished[-1])
        self.store.write_report()

    def _is_finished(self, groups: Iterable[int]) -> bool:
        return all(self.store.is_finished(index) for index in groups)

    def _tune_up_to(self, last: int) -> None:
        calibration, held_out = self.cache.read_tokens()
        inputs = self._inputs(calibration, held_out)
        streams = _Streams(exact=inputs.stream, tuned=inputs.stream, calibration_windows=len(calibration))
        megabytes = inputs.stream.numel() * inputs.stream.element_size() / 1e6
        _LOGGER.info("hidden states: 3 x %.0f MB in memory", megabytes)
        blocks = list(zip(self.model.blocks, self.model.groups, strict=True))[: last + 1]
        done = sum(self._is_finished(groups) for _, groups in blocks)
        with progress_bar() as progress:
            ticks = [self.step.ticks or len(groups) for _, groups in blocks]
            task = progress.add_task(
                self.step.name, total=sum(ticks), unit="steps", done=sum(ticks[:done]), keeps="layers"
            )
            for block, groups in blocks:
                progress.update(task, now=f"layer {block.layer}")
                result = self._take(block, groups, inputs.shared, streams, lambda: progress.advance(task))
                progress.update(task, note="" if result is None else _summary(block, result))

    def _inputs(self, calibration: np.ndarray, held_out: np.ndarray) -> BlockInputs:
        windows = np.concatenate([calibration, held_out])
        sizes = sizes_of_batches(len(calibration), len(held_out), self.batch_size)
        first = self.model.blocks[0].stream_in
        return read_inputs(self.model.graph, self.directory, windows, first, self.model.shared, sizes)

    def _take(
        self,
        block: DecoderBlock,
        groups: tuple[int, ...],
        shared: Mapping[int, Mapping[str, Tensor]],
        streams: _Streams,
        advance: Callable[[], None],
    ) -> TunedBlock | None:
        """Tune and save one block unless it is finished (None), and send both streams through it."""
        result: TunedBlock | None = None
        module = BlockModule(cut_block(self.model.graph, block), self.device)
        run = BlockRunner(module=module, shared=shared, batch_size=self.batch_size)
        originals = {site.name: read_weight(self.model.graph, site, self.device) for site in block.sites}
        wanted = run.over(streams.exact, originals)
        if not self._is_finished(groups):
            starts = tuple(self.start.read_group(index) for index in groups)
            calibration, held_out = streams.pairs(wanted)
            context = BlockContext(
                run=run,
                originals=originals,
                starts=starts,
                calibration=calibration,
                held_out=held_out,
                searched={
                    each.group.activation: self.read_stats(each.group.activation)
                    for each in starts
                    if not each.group.is_of_expert
                },
            )
            result = self.step(context, advance)
            for index, solved in zip(groups, self._reported(context, result), strict=True):
                self.store.write(index, solved)
        kept = (weight for index in groups for weight in self.store.read_group(index).weights)
        tuned = originals | {weight.site.name: effective_weight(weight, self.device) for weight in kept}
        streams.exact, streams.tuned = wanted, run.over(streams.tuned, tuned)
        return result

    def _reported(self, context: BlockContext, result: TunedBlock) -> Iterator[SolvedGroup]:
        """Yield the block's groups with their tuned weights and new reports."""
        weights = {weight.site.name: weight for weight in result.weights}
        for solved in context.starts:
            tuned, activation = solved, solved.group.activation
            is_left = solved.group.is_of_expert and all(weights[each.site.name] is each for each in solved.weights)
            if not is_left:
                searched = context.searched.get(activation) or self.read_stats(activation)
                tuned = reported(solved, weights, context.originals, searched, self.step.name)
            reports = (
                replace(report, block_loss_start=result.start_loss, block_loss=result.loss) for report in tuned.reports
            )
            yield replace(tuned, reports=tuple(reports))


def _summary(block: DecoderBlock, result: TunedBlock) -> str:
    return f"error of layer {block.layer} {result.start_loss:.3%} -> {result.loss:.3%}"
