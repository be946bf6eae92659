"""Find the decoder blocks of an ONNX graph, and cut one out as a small graph of its own.

A block is what lies between two values of the residual stream. The graph itself tells which nodes those are: behind the
last site of layer N and before the first of layer N + 1 there is a place that exactly one value computed from the
tokens crosses. The name of a site tells its layer (layers.N).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from stages.errors import GraphError
from stages.model.genai_config import EMBEDDED, LOGITS
from stages.model.patterns import EXPERT_NODES
from stages.model.sites import expert_layer, find_expert_layers, find_sites, why_no_sites
from stages.records.experts import ExpertLayer
from stages.records.sites import MatMulSite, layer_of
from stages.runtime.cpu.upcast import SIXTEEN_BIT, upcast_model
from stages.runtime.graph_inputs import CARRY_TOKENS

OWN_DOMAIN = "genai_quant"
"""Domain of the operators that blocks/converters defines; only cut graphs have it."""
LINEAR = "Linear"
"""y = x W^T + beta * bias, with W [N, K] an input of the cut graph."""
EXPERTS = "Experts"
"""A MoE node whose matrices are inputs of the cut graph, one for each site; attributes are those of its records."""
WITHOUT_BLOCKS = "run without --algo signround, --refine and --distill, which run each block by itself."
"""The fix in messages about blocks that can't be cut out."""

_STANDARD = frozenset(
    {
        "Gelu",
        "LayerNormalization",
        "LpNormalization",
        "ReduceMean",
        "RMSNormalization",
        "ScatterElements",
        "SimplifiedLayerNormalization",
        "Split",
    }
)
"""Standard operators that onnx2torch lacks, or knows only in older versions."""
_SHAPE_ONLY = frozenset({"Shape", "Size"})
_EMPTY_PAST = {
    "CausalConvWithState": (3,),
    "GroupQueryAttention": (3, 4, 5, 6, 9),
    "LinearAttention": (3,),
    "MultiHeadAttention": (6, 7, 8),
}
"""Inputs that are left out because windows are full and begin at position 0 with an empty past: the past key and value,
states, the lengths, the positions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderBlock:
    """One layer: the values of the residual stream that enter and leave it, [batch, length, hidden], and its sites.

    The head is one too, without a layer: the logits leave it.
    """

    layer: int | None
    stream_in: str
    stream_out: str
    sites: tuple[MatMulSite, ...]

    @property
    def title(self) -> str:
        """Return what messages call it: Layer 3."""
        return "The head" if self.layer is None else f"Layer {self.layer}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockGraph:
    """A block as a graph in float32.

    Its inputs are the stream, the ``shared`` values (masks, positions: they don't depend on the tokens), and for every
    site its weight [N, K]; its output is the stream behind the block.
    """

    block: DecoderBlock
    shared: tuple[str, ...]
    model: ir.Model


def find_blocks(model: ir.Model) -> tuple[DecoderBlock, ...]:
    """Return the decoder blocks in the order in which the stream passes them.

    Requires: ``model`` went through ``write_out_residuals``.

    Raises:
        GraphError: no site's name holds a layer number, or layers are joined by more than one value.
    """
    by_layer: dict[int, list[MatMulSite]] = {}
    of_experts = (site for layer in find_expert_layers(model) for site in layer.sites)
    for site in (*find_sites(model), *of_experts):
        if (layer := layer_of(site.name)) is not None:
            by_layer.setdefault(layer, []).append(site)
    if not by_layer:
        raise GraphError("No MatMul's name holds a layer number (layers.N), so the decoder blocks can't be told apart.")
    places = {output.name: index for index, node in enumerate(model.graph) for output in node.outputs}
    spans = [(layer, _span(sites, places)) for layer, sites in by_layer.items()]
    crossings = _crossings(model)
    (first_layer, (first, _)), (last_layer, (_, last)) = spans[0], spans[-1]
    stream = [_only_one(reversed(crossings[: first + 1]), f"before layer {first_layer}")]
    for (layer, (_, end)), (following, (start, _)) in pairwise(spans):
        stream.append(_only_one(crossings[end + 1 : start + 1], f"between layers {layer} and {following}"))
    stream.append(_only_one(crossings[last + 1 :], f"behind layer {last_layer}"))
    return tuple(
        DecoderBlock(layer=layer, stream_in=before, stream_out=behind, sites=tuple(by_layer[layer]))
        for (layer, _), (before, behind) in zip(spans, pairwise(stream), strict=True)
    )


def find_head(model: ir.Model, last: DecoderBlock) -> DecoderBlock:
    """Return what computes the logits from the stream behind the last block.

    Args:
        model: the graph that ``last`` is of.
        last: the last of its blocks.

    Raises:
        GraphError: the model has no logits.
    """
    logits = next((value for value in model.graph.outputs if value.name == LOGITS), None)
    if logits is None:
        raise GraphError(f"The graph has no output '{LOGITS}'.")
    needed = {output.name for node in _ancestors(logits) for output in node.outputs}
    sites = tuple(site for site in find_sites(model) if layer_of(site.name) is None and site.output in needed)
    return DecoderBlock(layer=None, stream_in=last.stream_out, stream_out=LOGITS, sites=sites)


def _span(sites: Iterable[MatMulSite], places: dict[str | None, int]) -> tuple[int, int]:
    """Return the places of a layer's first and last site in the graph's order."""
    found = [places[site.output if site.expert is None else site.expert.node] for site in sites]
    return min(found), max(found)


def _only_one(crossings: Iterable[frozenset[str]], where: str) -> str:
    """Return the value of the first place that a single value crosses."""
    for crossing in crossings:
        if len(crossing) == 1:
            return next(iter(crossing))
    raise GraphError(
        f"The graph has no single residual stream {where}, so its layers can't be tuned block by block; use another "
        "--algo."
    )


def _crossings(model: ir.Model) -> list[frozenset[str]]:
    """Return, for the place before every node and the one at the end, the values that cross it.

    Those are the values computed from the tokens that are made before and read behind it.
    """
    nodes = tuple(model.graph)
    last_read = {
        value: index
        for index, node in enumerate(nodes)
        for value in node.inputs
        if value is not None and not (value.is_graph_input() and node.op_type in _SHAPE_ONLY)
    }
    carrying = _descendants(model, _carries_tokens)
    alive = {value for value in model.graph.inputs if value.name in EMBEDDED and value in last_read}
    found = []
    for index, node in enumerate(nodes):
        alive = {value for value in alive if last_read[value] >= index}
        found.append(frozenset(str(value.name) for value in alive))
        alive |= {value for value in node.outputs if value in carrying and value in last_read}
    return [*found, frozenset(str(value.name) for value in alive if last_read[value] >= len(nodes))]


def _carries_tokens(value: ir.Value) -> bool:
    return value.is_graph_input() and value.name in CARRY_TOKENS


def _descendants(model: ir.Model, is_root: Callable[[ir.Value], bool]) -> set[ir.Value]:
    """Return the values computed from the roots' numbers, the roots included; reading only a shape doesn't count."""
    found = {value for value in model.graph.inputs if is_root(value)}
    for node in model.graph:
        if node.op_type not in _SHAPE_ONLY and any(value in found for value in node.inputs):
            found.update(node.outputs)
        found.update(output for output in node.outputs if is_root(output))
    return found


def cut_block(model: ir.Model, block: DecoderBlock) -> BlockGraph:
    """Cut a block out as a graph in float32; reads the block's small parameters and none of its sites' weights.

    Requires: ``block`` is one of ``find_blocks(model)``.

    Raises:
        GraphError: the block holds a subgraph, or reads values computed from the tokens beside the stream.
    """
    cutter = _Cutter(model, block)
    inside = cutter.nodes()
    _require_cuttable(model, block, inside)
    for node in inside:
        cutter.copy(node)
    return BlockGraph(block=block, shared=tuple(cutter.shared), model=cutter.finish())


def _require_cuttable(model: ir.Model, block: DecoderBlock, inside: list[ir.Node]) -> None:
    made = {output for node in inside for output in node.outputs}
    carrying = _descendants(model, _carries_tokens)
    for node in inside:
        if node.op_type in EXPERT_NODES and expert_layer(node) is None:  # before gigabytes of experts are copied
            reason = why_no_sites(node) if node.op_type == "MoE" else "they are quantized already"
            raise GraphError(
                f"{block.title} holds the experts of '{node.name}' and can't be run as a block: {reason}; "
                f"{WITHOUT_BLOCKS}"
            )
        if any(
            attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for attribute in node.attributes.values()
        ):
            raise GraphError(
                f"{block.title} holds the subgraph of '{node.name}' and can't be run as a block; {WITHOUT_BLOCKS}"
            )
        for value in node.inputs:
            if value in carrying and value not in made and value is not None and value.name != block.stream_in:
                raise GraphError(
                    f"{block.title} reads '{value.name}' beside the residual stream, which also depends on the "
                    f"tokens, and can't be run as a block; {WITHOUT_BLOCKS}"
                )


def domain_in_cut(node: ir.Node) -> str:
    """Return the domain that ``node`` has in the cut graph: onnx2torch can't name a module after one with a dot."""
    standard = node.domain in ("", "ai.onnx")
    return node.domain if standard and node.op_type not in _STANDARD else OWN_DOMAIN


class _Cutter:
    """Copies the nodes of one block into a graph of their own."""

    def __init__(self, model: ir.Model, block: DecoderBlock) -> None:
        self._model, self._block = model, block
        self._sites = {site.output: site for site in block.sites}
        stream = next(value for value in _values(model) if value.name == block.stream_in)
        self._stream = ir.Value(name=block.stream_in, type=stream.type)
        self._copies: dict[ir.Value, ir.Value] = {stream: self._stream}
        self._weights: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self.shared: dict[str, ir.Value] = {}
        """Values from outside that are neither constants nor the stream."""

    def nodes(self) -> list[ir.Node]:
        """Return the nodes between the two values of the stream that depend on the first, in graph order."""
        needed = _ancestors(next(value for value in _values(self._model) if value.name == self._block.stream_out))
        reached = set(self._copies)
        inside = []
        for node in self._model.graph:
            if node in needed and node.op_type not in _SHAPE_ONLY and any(value in reached for value in node.inputs):
                reached.update(node.outputs)
                inside.append(node)
        return inside

    def copy(self, node: ir.Node) -> None:
        """Copy one node; the nodes inside that its inputs come from must have been copied before."""
        site = self._sites.get(str(node.outputs[0].name))
        layer = expert_layer(node)
        if layer is not None:
            copied = self._experts(node, layer)
        else:
            copied = self._copied(node) if site is None else self._linear(node, site)
        self._nodes.append(copied)
        for old, new in zip(node.outputs, copied.outputs, strict=False):
            new.name, new.type = old.name, old.type
            self._copies[old] = new

    def _copied(self, node: ir.Node) -> ir.Node:
        unused = _EMPTY_PAST.get(node.op_type, ())
        inputs = [None if index in unused else self._input(value) for index, value in enumerate(node.inputs)]
        while inputs and inputs[-1] is None:
            inputs.pop()
        used = [
            index for index, value in enumerate(node.outputs) if value.uses() or value.name == self._block.stream_out
        ]
        return ir.Node(
            domain_in_cut(node),
            node.op_type,
            inputs,
            attributes=tuple(node.attributes.values()),
            num_outputs=max(used) + 1,
            name=node.name,
        )

    def _experts(self, node: ir.Node, layer: ExpertLayer) -> ir.Node:
        tokens, scores, _, fc1_bias, _, fc2_bias = (*node.inputs, None, None)[:6]
        inputs = [self._input(value) for value in (tokens, scores, fc1_bias, fc2_bias) if value is not None]
        weights = [self._weight(site) for site in layer.sites]
        biased = {"fc1_biased": fc1_bias is not None, "fc2_biased": fc2_bias is not None}
        attributes = {
            name: int(value) if isinstance(value, bool) else value
            for name, value in (asdict(layer.activation) | asdict(layer.routing) | biased).items()
            if value is not None
        }
        converted = ir.convenience.convert_attributes(attributes)
        return ir.Node(OWN_DOMAIN, EXPERTS, [*inputs, *weights], converted, name=node.name)

    def _weight(self, site: MatMulSite) -> ir.Value:
        weight = ir.Value(name=site.name, type=ir.TensorType(ir.DataType.FLOAT))
        self._weights.append(weight)
        return weight

    def _linear(self, node: ir.Node, site: MatMulSite) -> ir.Node:
        weight = self._weight(site)
        bias = [self._input(value) for value in node.inputs[2:]]
        beta = node.attributes.get("beta")
        attributes = [] if beta is None else [beta]
        return ir.Node(OWN_DOMAIN, LINEAR, [self._input(node.inputs[0]), weight, *bias], attributes, name=node.name)

    def _input(self, value: ir.Value | None) -> ir.Value | None:
        if value is None:
            return None
        if value not in self._copies:
            self._copies[value] = self._from_outside(value)
        return self._copies[value]

    def _from_outside(self, value: ir.Value) -> ir.Value:
        constant = ir.convenience.get_const_tensor(value)
        outside = ir.Value(name=value.name, type=value.type)
        if constant is None:
            self.shared[str(value.name)] = outside
        else:
            outside.const_value = _in_memory(constant)
        return outside

    def finish(self) -> ir.Model:
        """Return the graph of the copied nodes, every floating-point type float32."""
        constants = [value for value in self._copies.values() if value.const_value is not None]
        graph = ir.Graph(
            [self._stream, *self.shared.values(), *self._weights],
            [value for value in self._copies.values() if value.name == self._block.stream_out],
            nodes=self._nodes,
            initializers=constants,
            opset_imports={**self._model.opset_imports, OWN_DOMAIN: 1},
            name=self._block.title,
        )
        cut = ir.Model(graph, ir_version=self._model.ir_version)
        return upcast_model(cut, SIXTEEN_BIT)


def _in_memory(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """Return a copy of the numbers; the file that they were mapped from is released."""
    numbers = np.array(tensor.numpy())
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return ir.Tensor(numbers, name=tensor.name, dtype=tensor.dtype)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    for node in model.graph:
        yield from node.outputs


def _ancestors(value: ir.Value) -> set[ir.Node]:
    """Return every node that ``value`` is computed from."""
    found: set[ir.Node] = set()
    waiting = [value]
    while waiting:
        node = waiting.pop().producer()
        if node is not None and node not in found:
            found.add(node)
            waiting.extend(source for source in node.inputs if source is not None)
    return found
