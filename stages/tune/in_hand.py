"""What a step that improves blocks is given: one decoder block and the windows in front of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from stages.block.stream import BlockRunner
from stages.records import SolvedGroup
from stages.solve.signround import StreamPair


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockInHand:
    """One block, the quantization that it starts with, and the windows in front of it."""

    run: BlockRunner
    originals: Mapping[str, Tensor]
    """Float32 weights [N, K] of all the block's sites by name, on the device where it is solved."""
    starts: tuple[SolvedGroup, ...]
    calibration: StreamPair
    held_out: StreamPair
