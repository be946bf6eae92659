"""A whole model as a chain of torch modules: what computes the first stream runs in ONNX Runtime, all else in torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from stages.model.weights import read_weight
from stages.records.sites import ActivationGroup
from stages.runtime.blocks.cut import DecoderBlock, cut_block, find_head
from stages.runtime.blocks.decoder import open_blocks
from stages.runtime.blocks.module import BlockModule


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """The decoder blocks in order, the head last, of a graph whose residual norms are Add and norm.

    ``shared`` names the values that they read beside the stream.
    """

    graph: ir.Model
    links: tuple[DecoderBlock, ...]
    shared: tuple[str, ...]

    def module(self, link: DecoderBlock, device: torch.device) -> BlockModule:
        """Return one link as a torch module on ``device``."""
        return BlockModule(cut_block(self.graph, link), device)

    def weights(self, link: DecoderBlock, device: torch.device) -> dict[str, Tensor]:
        """Return the float32 weights [N, K] of one link's sites by name, on ``device``."""
        return {site.name: read_weight(self.graph, site, device) for site in link.sites}


def open_chain(model: ir.Model, groups: Sequence[ActivationGroup]) -> Chain:
    """Find the links of ``model`` and check that each can become a torch module; ``model`` is left as it was.

    Raises:
        GraphError: the layers aren't joined by one stream, or hold an operator without a converter.
    """
    decoder = open_blocks(model, groups)
    head = find_head(decoder.graph, decoder.blocks[-1])
    cut = cut_block(decoder.graph, head)
    BlockModule(cut, torch.device("cpu"))
    return Chain(
        graph=decoder.graph,
        links=(*decoder.blocks, head),
        shared=tuple(dict.fromkeys((*decoder.shared, *cut.shared))),
    )
