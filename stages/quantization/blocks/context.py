"""One decoder block while it is tuned: its float weights, the quantization that it starts with, and its windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.quantization.blocks.learnable_weight import effective_weight
from stages.quantization.blocks.signround import StreamPair, block_loss
from stages.records.results import QuantizedWeight, SolvedGroup
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
