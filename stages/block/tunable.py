"""A whole graph as a row of blocks that can be tuned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch

from stages.block.cut import DecoderBlock, cut_block, find_blocks
from stages.block.residual import write_out_residuals
from stages.block.torch_module import BlockModule
from stages.records import ActivationGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class TunableModel:
    """A graph whose residual norms are written out, its blocks, and the groups that are quantized inside each.

    ``groups`` holds, for each block, indices into the recipe's groups; ``others`` are those that lie in no block;
    ``shared`` names the values that blocks read beside the stream.
    """

    graph: ir.Model
    blocks: tuple[DecoderBlock, ...]
    groups: tuple[tuple[int, ...], ...]
    others: tuple[int, ...]
    shared: tuple[str, ...]


def open_blocks(model: ir.Model, groups: Sequence[ActivationGroup]) -> TunableModel:
    """Find the blocks of ``model`` and make sure that each can become a torch module; ``model`` stays as it was.

    Raises:
        GraphError: the layers aren't joined by one stream, or hold an operator without a converter.
        UserError: onnx2torch isn't installed.
    """
    graph = write_out_residuals(model)
    blocks = find_blocks(graph)
    inside = tuple(
        tuple(index for index, group in enumerate(groups) if set(group.sites) <= set(block.sites)) for block in blocks
    )
    found = {index for members in inside for index in members}
    return TunableModel(
        graph=graph,
        blocks=blocks,
        groups=inside,
        others=tuple(index for index in range(len(groups)) if index not in found),
        shared=_shared(graph, blocks),
    )


def _shared(graph: ir.Model, blocks: Iterable[DecoderBlock]) -> tuple[str, ...]:
    """What the blocks share; one of each kind is converted, so that nothing is computed for a model that can't be."""
    seen: set[frozenset[str]] = set()
    shared: dict[str, None] = {}
    for block in blocks:
        cut = cut_block(graph, block)
        shared |= dict.fromkeys(cut.shared)
        operators = frozenset(node.op_type for node in cut.model.graph)
        if operators not in seen:
            BlockModule(cut, torch.device("cpu"))
        seen.add(operators)
    return tuple(shared)
