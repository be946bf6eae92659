"""Count the bytes of a model's files, whole and by what they hold: codes, scales, embeddings, floats, the graph."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import onnx_ir as ir

from stages.model.directory import ModelDirectory
from stages.model.load import external_files, load_graph

CODES = {4: "INT4 codes", 8: "INT8 codes"}
SCALES, ZERO_POINTS = "scales", "zero points"
EMBEDDING = "embedding"
TIED = "embedding, lm_head too"
MATRICES = "matrices as in the base"
REST = "norms, biases, tables"
GRAPH = "graph and padding"
CATEGORIES = (*CODES.values(), SCALES, ZERO_POINTS, EMBEDDING, TIED, MATRICES, REST, GRAPH)
"""In the order in which they are shown."""
_LOOKUPS = frozenset({"Gather", "GatherBlockQuantized"})
_PRODUCTS = frozenset({"MatMul", "Gemm", "MatMulNBits"})
_PLACES = {
    "DequantizeLinear": {0: "codes", 1: SCALES, 2: ZERO_POINTS},
    "MatMulNBits": {1: "codes", 2: SCALES, 3: ZERO_POINTS},
    "QMoE": {
        **dict.fromkeys((2, 5, 8), "codes"),
        **dict.fromkeys((3, 6, 9), SCALES),
        **dict.fromkeys((11, 12, 13), ZERO_POINTS),
    },
}
"""What inputs of nodes that dequantize hold, by their place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SizePart:
    """One category's bytes in the base model and in the quantized one."""

    name: str
    before: int
    after: int


def size_parts(
    base: ModelDirectory, quantized: ModelDirectory, base_graph: ir.Model | None = None
) -> tuple[SizePart, ...]:
    """Return the bytes of every category that either model has.

    Ensures: each model's parts add up to the bytes of its .onnx file and external data.

    Args:
        base: where the base model lies.
        quantized: where the quantized model lies.
        base_graph: what ``load_graph`` gave for the base; None parses the file here.

    Raises:
        GraphError: a model can't be read.
    """
    before = _bytes_by_category(base, load_graph(base) if base_graph is None else base_graph)
    after = _bytes_by_category(quantized, load_graph(quantized))
    return tuple(
        SizePart(name=name, before=before[name], after=after[name])
        for name in CATEGORIES
        if before[name] or after[name]
    )


def model_bytes(directory: ModelDirectory) -> int:
    """Return the bytes of the .onnx file and of every file of external data that it refers to.

    Raises:
        GraphError: the model can't be read, or isn't whole.
    """
    return _file_bytes(directory, load_graph(directory))


def _bytes_by_category(directory: ModelDirectory, model: ir.Model) -> Counter[str]:
    counted: Counter[str] = Counter()
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            counted[_category(value)] += value.const_value.nbytes
    counted[GRAPH] = _file_bytes(directory, model) - counted.total()
    return counted


def _category(value: ir.Value) -> str:
    """Return the category of an initializer by what reads it, directly or through nodes that dequantize."""
    reached = _reached(value)
    dequantizing = [(node, place) for node, place in _widened_uses(value) if node.op_type in _PLACES]
    if any(node.op_type in _LOOKUPS for node, _ in reached):
        return TIED if any(node.op_type in _PRODUCTS for node, _ in reached) else EMBEDDING
    if dequantizing:
        node, place = dequantizing[0]
        part = _PLACES[node.op_type].get(place, REST)
        return CODES[_bits(value, node)] if part == "codes" else part
    rank = len(value.shape) if value.shape is not None else 0
    return MATRICES if rank > 1 and not _is_table(reached) else REST


def _reached(value: ir.Value) -> list[tuple[ir.Node, int]]:
    """Return the (node, input) that read a value, looking through Transpose, Reshape, Cast and DequantizeLinear."""
    found: list[tuple[ir.Node, int]] = []
    for node, place in value.uses():
        found.append((node, place))
        if node.op_type in ("Transpose", "Reshape", "Cast", "DequantizeLinear", "QuantizeLinear"):
            found += _reached(node.outputs[0])
    return found


def _widened_uses(value: ir.Value) -> list[tuple[ir.Node, int]]:
    """Return the (node, input) that read a value, looking through Cast and what scales are multiplied with."""
    pairs = [_widened_uses(node.outputs[0]) if _widens(node) else [(node, place)] for node, place in value.uses()]
    return [pair for part in pairs for pair in part]


def _widens(node: ir.Node) -> bool:
    """Return whether a node only makes scales of what is stored."""
    if node.op_type != "Mul":
        return node.op_type == "Cast"
    makers = [value.producer() for value in node.inputs if value is not None]
    return any(maker is None for maker in makers) and any(
        maker is not None
        and maker.op_type == "Cast"
        and maker.inputs[0] is not None
        and maker.inputs[0].is_initializer()
        for maker in makers
    )


def _bits(value: ir.Value, node: ir.Node) -> int:
    if node.op_type == "MatMulNBits":
        return node.attributes.get_int("bits", 4)
    if node.op_type == "QMoE":
        return node.attributes.get_int("expert_weight_bits", 4)
    return 4 if value.dtype in (ir.DataType.INT4, ir.DataType.UINT4) else 8


def _is_table(reached: list[tuple[ir.Node, int]]) -> bool:
    """Return whether no layer reads it: a table of sines and cosines, or a mask."""
    return not any(
        node.op_type in ("MatMul", "Gemm", "MoE", "QMoE", "Conv", "Attention", "QuantizeLinear") for node, _ in reached
    )


def _file_bytes(directory: ModelDirectory, model: ir.Model) -> int:
    files = {directory.onnx_file.resolve(), *external_files(model)}
    return sum(file.stat().st_size for file in files)
