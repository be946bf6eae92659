"""What a step that improves blocks is given: one decoder block and the windows in front of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.block.stream import BlockRunner
from stages.records import QuantizedWeight, SolvedGroup
from stages.solve.rounding import effective_weight
from stages.solve.signround import StreamPair, block_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockInHand:
    """One block, the quantization that it starts with, and the windows in front of it."""

    run: BlockRunner
    originals: Mapping[str, Tensor]
    """Float32 weights [N, K] of all the block's sites by name, on the device where it is solved."""
    starts: tuple[SolvedGroup, ...]
    calibration: StreamPair
    held_out: StreamPair

    @property
    def stored(self) -> dict[str, QuantizedWeight]:
        """The weights that the block starts with, by site."""
        return {weight.site.name: weight for group in self.starts for weight in group.weights}

    def effective(self, stored: Mapping[str, QuantizedWeight]) -> dict[str, Tensor]:
        """What the block computes with when it holds ``stored``."""
        device = next(iter(self.originals.values())).device
        return dict(self.originals) | {name: effective_weight(weight, device) for name, weight in stored.items()}

    @torch.no_grad()
    def held_out_loss(self, stored: Mapping[str, QuantizedWeight]) -> float:
        """How far from the float block the block with ``stored`` is on windows that nothing is searched on."""
        behind = self.run.over(self.held_out.quantized, self.effective(stored))
        return float(block_loss(behind, self.held_out.wanted))
