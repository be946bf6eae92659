"""Error feedback inside a block: each activation's sites are solved anew for what really reaches them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stages.block.stream import in_batches
from stages.records import QuantizedWeight, SolvedGroup
from stages.solve.feedback import DriftAccumulator, DriftStats, refine
from stages.solve.problem import GroupProblem, SearchOptions
from stages.solve.signround import StreamPair, TunedBlock
from stages.tune.in_hand import BlockInHand


@dataclass(frozen=True, slots=True)
class Refiner:
    """Solves a block's groups one after another, in graph order."""

    hand: BlockInHand
    options: SearchOptions

    def refine_block(self, advance: Callable[[], None]) -> TunedBlock:
        """The block's sites with errors fed back, or as they start where held-out windows come out no nearer.

        ``advance`` is called behind each group. Both models' blocks are run once a group, as far as its activation.
        """
        begun = self.hand.stored
        stored = dict(begun)
        for group in self.hand.starts:
            stored |= {weight.site.name: weight for weight in self._refine_group(group, stored)}
            advance()
        losses = [self.hand.held_out_loss(weights) for weights in (begun, stored)]
        kept = stored if losses[1] < losses[0] else begun
        return TunedBlock(weights=tuple(kept.values()), start_loss=losses[0], loss=min(losses))

    def _refine_group(self, solved: SolvedGroup, stored: Mapping[str, QuantizedWeight]) -> Iterator[QuantizedWeight]:
        names = [weight.site.name for weight in solved.weights]
        weights = self.hand.effective(stored)
        calibration, held_out = (
            self._drift(pair, names[0], weights) for pair in (self.hand.calibration, self.hand.held_out)
        )
        for starts in _sharing_a_scale(tuple(stored[name] for name in names)):
            problem = GroupProblem(
                group=replace(solved.group, sites=tuple(start.site for start in starts)),
                weights=tuple(self.hand.originals[start.site.name] for start in starts),
                specs=tuple(start.spec for start in starts),
                stats=None,
                head_sharing=None,
            )
            yield from refine(problem, self.options, starts, calibration, held_out)

    def _drift(self, pair: StreamPair, site: str, weights: Mapping[str, Tensor]) -> DriftStats:
        """Statistics of what ``site`` reads in both models."""
        original = self.hand.originals[site]
        accumulator = DriftAccumulator(original.shape[1], original.device)
        for batch in in_batches(len(pair.wanted), self.hand.run.batch_size):
            exact, quantized = (
                self.hand.run.read(stream[batch].to(original.device), used, site)
                for stream, used in ((pair.exact, self.hand.originals), (pair.quantized, weights))
            )
            accumulator.add(quantized, exact)
        return accumulator.finish()


def _sharing_a_scale(starts: tuple[QuantizedWeight, ...]) -> list[tuple[QuantizedWeight, ...]]:
    """All together where they have one input scale, else each alone."""
    scales = [start.input_scale for start in starts]
    found = [scale for scale in scales if scale is not None]
    alike = not found or (len(found) == len(scales) and all(torch.equal(scale, found[0]) for scale in found))
    return [starts] if alike else [(start,) for start in starts]
