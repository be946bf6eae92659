"""Open a model as decoder blocks: residual norms split up, blocks found, and each checked to run as a torch module.

A fused SkipSimplifiedLayerNormalization hands the next block two tensors, the sum and the sum normalized. Written as
Add and norm, one tensor leads from block to block: the residual stream, which a block's loss is measured on. The norm
belongs to the block that reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch

from stages.model.patterns import input_of
from stages.records.sites import ActivationGroup
from stages.runtime.blocks.cut import DecoderBlock, cut_block, find_blocks
from stages.runtime.blocks.module import BlockModule

_NORMS = {
    "SkipSimplifiedLayerNormalization": "SimplifiedLayerNormalization",
    "SkipLayerNormalization": "LayerNormalization",
}
_SUM = 3
"""Index of the output that holds the sum."""


def write_out_residuals(model: ir.Model) -> ir.Model:
    """Return a copy of ``model`` whose skip norms are Add and norm nodes; ``model`` is left as it was.

    Ensures: the values keep their names, and every sum has one.
    """
    copy = model.clone()
    for node in tuple(copy.graph):
        if node.op_type in _NORMS:
            _write_out(copy.graph, node)
    return copy


def _write_out(graph: ir.Graph, node: ir.Node) -> None:
    total = _add(graph, node, node.inputs[0], node.inputs[1], f"{node.name}/sum")
    if (bias := input_of(node, _bias_index(node))) is not None:
        total = _add(graph, node, total, bias, f"{node.name}/sum_with_bias")
    parameters = [value for value in node.inputs[2 : _bias_index(node)] if value is not None]
    norm = ir.node(_NORMS[node.op_type], [total, *parameters], attributes=node.attributes, name=f"{node.name}/norm")
    graph.insert_before(node, norm)
    _replace(node.outputs[0], norm.outputs[0])
    if len(node.outputs) > _SUM and node.outputs[_SUM].name:
        _replace(node.outputs[_SUM], total)
    graph.remove(node, safe=True)


def _add(graph: ir.Graph, before: ir.Node, left: ir.Value | None, right: ir.Value | None, name: str) -> ir.Value:
    assert left is not None
    added = ir.node("Add", [left, right], name=name)
    added.outputs[0].name, added.outputs[0].type = name, left.type
    graph.insert_before(before, added)
    return added.outputs[0]


def _bias_index(node: ir.Node) -> int:
    """Return the place of the bias that is added to the sum; SkipLayerNormalization has the norm's own before it."""
    return 4 if node.op_type == "SkipLayerNormalization" else 3


def _replace(old: ir.Value, new: ir.Value) -> None:
    name, new.type, new.shape = old.name, old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    old.name = None
    new.name = name


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderBlocks:
    """A graph whose residual norms are Add and norm, its blocks, and the groups that are quantized inside each.

    ``groups`` holds, for each block, indices into the recipe's groups; ``others`` are those that lie in no block;
    ``shared`` names the values that blocks read beside the stream.
    """

    graph: ir.Model
    blocks: tuple[DecoderBlock, ...]
    groups: tuple[tuple[int, ...], ...]
    others: tuple[int, ...]
    shared: tuple[str, ...]


def open_blocks(model: ir.Model, groups: Sequence[ActivationGroup]) -> DecoderBlocks:
    """Find the blocks of ``model`` and check that each can become a torch module; ``model`` is left as it was.

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
    return DecoderBlocks(
        graph=graph,
        blocks=blocks,
        groups=inside,
        others=tuple(index for index in range(len(groups)) if index not in found),
        shared=_shared(graph, blocks),
    )


def _shared(graph: ir.Model, blocks: Iterable[DecoderBlock]) -> tuple[str, ...]:
    """Return what the blocks share; one of each kind is converted, to fail before anything is computed."""
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
