"""Block-level tuning of a finished search: decoder block by decoder block, each saved before the next begins.

Two streams of hidden states go through the blocks side by side: the float one, which says what a block should give, and
the one that the blocks as quantized so far make. ONNX Runtime computes what enters the first block; all else the blocks
compute themselves, as torch modules. A run that was stopped sends both streams through the finished blocks again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from stages.block.cut import DecoderBlock, cut_block
from stages.block.stream import BlockInputs, BlockRunner, in_batches, read_inputs
from stages.block.torch_module import BlockModule
from stages.block.tunable import TunableModel
from stages.cli import progress_bar
from stages.graph.weights import read_weight
from stages.model_directory import ModelDirectory
from stages.observe.cache import CalibrationCache
from stages.quantized_store import QuantizedStore
from stages.records import QuantizedWeight, SolvedGroup, TokenStats
from stages.solve.objective import output_error, to_device
from stages.solve.rounding import effective_weight
from stages.solve.signround import SignRoundOptions, StreamPair, TunedBlock, tune_block

ALGORITHM = "signround"


@dataclass(slots=True, kw_only=True)
class _Streams:
    """Hidden states in front of a block, [windows, length, hidden]; the held-out windows come last."""

    exact: Tensor
    tuned: Tensor
    calibration_windows: int

    def pairs(self, wanted: Tensor) -> tuple[StreamPair, StreamPair]:
        """Calibration and held-out windows, with what is wanted behind the block."""
        count = self.calibration_windows
        return (
            StreamPair(quantized=self.tuned[:count], wanted=wanted[:count]),
            StreamPair(quantized=self.tuned[count:], wanted=wanted[count:]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTuner:
    """Everything that stays the same from block to block.

    ``start`` holds the search's result, ``store`` what becomes of it; their recipes list the same groups.
    """

    model: TunableModel
    directory: ModelDirectory
    cache: CalibrationCache
    start: QuantizedStore
    store: QuantizedStore
    options: SignRoundOptions
    device: torch.device

    def tune(self, console: Console) -> None:
        """Tune the blocks that aren't finished; groups outside of blocks are taken over as they are.

        Raises:
            GraphError: ONNX Runtime can't run the part in front of the first block.
            CacheMismatch: the cache's tokens are gone.
        """
        for index in self.model.others:
            if not self.store.is_finished(index):
                self.store.write(index, self.start.read_group(index))
        unfinished = [place for place, groups in enumerate(self.model.groups) if not self._is_finished(groups)]
        if unfinished:
            self._tune_up_to(unfinished[-1], console)
        self.store.write_report()

    def _is_finished(self, groups: Iterable[int]) -> bool:
        return all(self.store.is_finished(index) for index in groups)

    def _tune_up_to(self, last: int, console: Console) -> None:
        calibration, held_out = self.cache.read_tokens()
        inputs = self._inputs(calibration, held_out)
        streams = _Streams(exact=inputs.stream, tuned=inputs.stream, calibration_windows=len(calibration))
        megabytes = inputs.stream.numel() * inputs.stream.element_size() / 1e6
        console.print(f"hidden states: 3 x {megabytes:.0f} MB in memory", highlight=False)
        blocks = list(zip(self.model.blocks, self.model.groups, strict=True))[: last + 1]
        done = sum(self._is_finished(groups) for _, groups in blocks)
        with progress_bar(console) as progress:
            steps = self.options.iterations
            task = progress.add_task("tuning", total=len(blocks) * steps, completed=done * steps)
            for block, groups in blocks:
                progress.update(task, description=f"layer {block.layer}")
                self._take(block, groups, inputs.shared, streams, lambda: progress.advance(task))

    def _inputs(self, calibration: np.ndarray, held_out: np.ndarray) -> BlockInputs:
        windows = np.concatenate([calibration, held_out])
        size = self.options.batch_size
        counts = (len(windows), len(calibration), len(held_out))
        sizes = {len(batch) for count in counts for batch in in_batches(count, size)}
        first = self.model.blocks[0].stream_in
        return read_inputs(self.model.graph, self.directory, windows, first, self.model.shared, frozenset(sizes))

    def _take(
        self,
        block: DecoderBlock,
        groups: tuple[int, ...],
        shared: Mapping[int, Mapping[str, Tensor]],
        streams: _Streams,
        advance: Callable[[], None],
    ) -> None:
        """Tune and save one block unless it is finished, and lead both streams through it."""
        module = BlockModule(cut_block(self.model.graph, block), self.device)
        run = BlockRunner(module=module, shared=shared, batch_size=self.options.batch_size)
        originals = {site.name: read_weight(self.model.graph, site, self.device) for site in block.sites}
        wanted = run.over(streams.exact, originals)
        if not self._is_finished(groups):
            starts = tuple(weight for index in groups for weight in self.start.read_group(index).weights)
            self._save(
                groups, tune_block(run, originals, starts, *streams.pairs(wanted), self.options, advance), originals
            )
        kept = (weight for index in groups for weight in self.store.read_group(index).weights)
        tuned = originals | {weight.site.name: effective_weight(weight, self.device) for weight in kept}
        streams.exact, streams.tuned = wanted, run.over(streams.tuned, tuned)

    def _save(self, groups: tuple[int, ...], result: TunedBlock, originals: Mapping[str, Tensor]) -> None:
        weights = {weight.site.name: weight for weight in result.weights}
        for index in groups:
            solved = self.start.read_group(index)
            kept = tuple(weights[weight.site.name] for weight in solved.weights)
            self.store.write(index, self._reported(solved, kept, result, originals))

    def _reported(
        self,
        solved: SolvedGroup,
        weights: tuple[QuantizedWeight, ...],
        result: TunedBlock,
        originals: Mapping[str, Tensor],
    ) -> SolvedGroup:
        """The group with its tuned ``weights``, and what they cost."""
        stats = self.cache.read(solved.group.activation)
        calibration, held_out = (to_device(part, self.device) for part in (stats.calibration, stats.held_out))
        reports = tuple(
            replace(
                report,
                algorithm=ALGORITHM,
                loss=_relative_loss(weight, originals[weight.site.name], calibration),
                held_out_loss=_relative_loss(weight, originals[weight.site.name], held_out),
                mean_clip_ratio=None,
                block_loss_start=result.start_loss,
                block_loss=result.loss,
            )
            for weight, report in zip(weights, solved.reports, strict=True)
        )
        return SolvedGroup(group=solved.group, weights=weights, reports=reports)


def _relative_loss(weight: QuantizedWeight, original: Tensor, stats: TokenStats) -> float | None:
    """tr(D G D^T) / tr(W G W^T), as the search reports it."""
    if stats.is_silent:
        return None
    error = effective_weight(weight, original.device) - original
    signal = output_error(original, stats).double().sum().clamp_min(1e-30)
    return float(output_error(error, stats).double().sum() / signal)
