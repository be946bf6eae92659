"""AWQ's published objective: an input scale is as good as the decoder block's output under it (Lin et al., 2023).

The layer's own output error, which the search goes by, doesn't see what attention, activation functions and the next
weights make of it. Here every candidate is rounded to nearest, as published, in a block whose other sites are what they
are so far, reading what the quantized blocks before give. The winner is then finished as the algorithm finishes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.block.stream import in_batches
from stages.records import ActivationGroup, QuantizedWeight
from stages.solve.awq import input_scale_candidates
from stages.solve.evaluate import full_ranges, stored_weight, weight_error
from stages.solve.problem import IDENTITY, Finish, GroupProblem, InputScale, SearchOptions, SiteChoice
from stages.solve.signround import TunedBlock, block_loss
from stages.tune.in_hand import BlockInHand

_WINDOWS = 8
"""Calibration windows that candidates are compared on: some thousand tokens rank two dozen scales."""


@dataclass(frozen=True, slots=True)
class BlockScaler:
    """Chooses the input scales of a block's activations one after another, in graph order.

    ``pose`` gives the problems that an activation's sites are searched as: those of one problem share a scale.
    """

    hand: BlockInHand
    options: SearchOptions
    finish: Finish
    pose: Callable[[ActivationGroup], list[GroupProblem]]

    def scale_block(self, advance: Callable[[], None]) -> TunedBlock:
        """The block under the scales that its output speaks for; an activation keeps its scale where none helps.

        ``advance`` is called behind each group.
        """
        stored, chosen = self.hand.stored, dict[str, InputScale]()
        start_loss = loss = self.hand.held_out_loss(stored)
        for group in self.hand.starts:
            for problem in self.pose(group.group):
                if problem.is_unseen:
                    continue
                scale = self._best(problem, stored)
                changed = stored | self._finished(problem, scale)
                changed_loss = self.hand.held_out_loss(changed)
                if changed_loss < loss:
                    stored, loss = changed, changed_loss
                    chosen |= {site.name: scale for site in problem.group.sites}
            advance()
        return TunedBlock(weights=tuple(stored.values()), start_loss=start_loss, loss=loss, chosen=chosen)

    def _best(self, problem: GroupProblem, stored: Mapping[str, QuantizedWeight]) -> InputScale:
        """The candidate with the smallest error of the block's output on calibration windows; the first of equals."""
        assert problem.stats is not None
        around = self.hand.effective(stored)
        candidates = (IDENTITY, *input_scale_candidates(problem, problem.stats.calibration, self.options.alpha_step))
        return min(candidates, key=lambda scale: self._calibration_loss(around | self._rounded(problem, scale)))

    def _rounded(self, problem: GroupProblem, scale: InputScale) -> dict[str, Tensor]:
        choices = full_ranges(problem, self.options.range_rule, scale)
        posed = zip(problem.group.sites, problem.weights, problem.specs, choices, strict=True)
        return {site.name: weight + weight_error(weight, spec, choice) for site, weight, spec, choice in posed}

    def _finished(self, problem: GroupProblem, scale: InputScale) -> dict[str, QuantizedWeight]:
        choices: tuple[SiteChoice, ...] = self.finish(problem, self.options, scale)
        posed = zip(problem.group.sites, problem.weights, problem.specs, choices, strict=True)
        return {site.name: stored_weight(site, weight, spec, choice) for site, weight, spec, choice in posed}

    @torch.no_grad()
    def _calibration_loss(self, weights: Mapping[str, Tensor]) -> float:
        pair, run = self.hand.calibration, self.hand.run
        device = next(iter(weights.values())).device
        total, seen = 0.0, 0
        for indices in in_batches(len(pair.wanted), run.batch_size)[: -(-_WINDOWS // run.batch_size)]:
            batch = pair.batch(indices, device)
            total += float(block_loss(run(batch.quantized, weights), batch.wanted)) * len(indices)
            seen += len(indices)
        return total / seen
