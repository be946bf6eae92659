"""One decoder block while it is tuned: its float weights, the quantization that it starts with, and its windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stages.quantization.blocks.learnable_weight import effective_weight
from stages.quantization.blocks.signround import StreamPair, block_loss
from stages.quantization.search.choices import joint_energies, output_energies
from stages.quantization.search.objective import search_to_device
from stages.records.results import QuantizedWeight, SearchStats, SolvedGroup, TokenStats
from stages.runtime.blocks.stream import BlockRunner


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockContext:
    """One block, the quantization that it starts with, and the windows in front of it."""

    run: BlockRunner
    originals: Mapping[str, Tensor]
    """Float32 weights [N, K] of all the block's sites by name, on the device where it is solved."""
    starts: tuple[SolvedGroup, ...]
    calibration: StreamPair
    held_out: StreamPair
    searched: Mapping[str, SearchStats]
    """By activation: how much tokens and output channels count; those of experts are too large to hold together."""

    @property
    def stored(self) -> dict[str, QuantizedWeight]:
        """Return the weights that the block starts with, by site."""
        return {weight.site.name: weight for group in self.starts for weight in group.weights}

    def effective(self, stored: Mapping[str, QuantizedWeight]) -> dict[str, Tensor]:
        """Return the weights that the block computes with when its sites hold ``stored``."""
        device = next(iter(self.originals.values())).device
        return dict(self.originals) | {name: effective_weight(weight, device) for name, weight in stored.items()}

    @torch.no_grad()
    def held_out_loss(self, stored: Mapping[str, QuantizedWeight]) -> float:
        """Return the loss of the block with ``stored``, against the float block, on held-out windows."""
        behind = self.run.over(self.held_out.quantized, self.effective(stored))
        return float(block_loss(behind, self.held_out.wanted))


def reported(
    solved: SolvedGroup,
    weights: Mapping[str, QuantizedWeight],
    originals: Mapping[str, Tensor],
    searched: SearchStats,
    algorithm: str,
) -> SolvedGroup:
    """Return the group with other weights, and with reports of their errors on the search's statistics.

    Args:
        solved: the group as it was searched.
        weights: the new ones, by site.
        originals: float32 weights [N, K] by site, on the device where errors are computed.
        searched: the statistics of the group's activation.
        algorithm: what made the new weights, for reports.
    """
    names = [site.name for site in solved.group.sites]
    here = search_to_device(searched, originals[names[0]].device)
    stats = (here.tokens.calibration, here.tokens.held_out)
    losses = [_relative_losses(weights[name], originals[name], here.output_grams.get(name), stats) for name in names]
    reports = tuple(
        replace(report, algorithm=algorithm, loss=loss, held_out_loss=held_out_loss, mean_clip_ratio=None)
        for (loss, held_out_loss), report in zip(losses, solved.reports, strict=True)
    )
    return SolvedGroup(group=solved.group, weights=tuple(weights[name] for name in names), reports=reports)


def _relative_losses(
    weight: QuantizedWeight, original: Tensor, output_gram: Tensor | None, stats: tuple[TokenStats, ...]
) -> list[float | None]:
    """Return the error relative to the output's energy over each of ``stats``, as the search reports it."""
    errors = joint_energies(effective_weight(weight, original.device) - original, output_gram, stats)
    energies = output_energies(original, output_gram, stats)
    return [None if energy is None else error / energy for error, energy in zip(errors, energies, strict=True)]
