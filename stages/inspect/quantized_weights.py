"""Find the quantized weights of a graph, by any quantizer: their operators, formats and bytes.

Only types, shapes and attributes are read, no weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import onnx_ir as ir

from stages.model.patterns import input_of

Grouping = Literal["block", "channel", "tensor"]
"""What shares a scale: a block of inputs, an output channel, or the whole weight."""
Activations = Literal["float", "int8, scales per run", "int8, fixed scales"]

_BITS = {
    ir.DataType.INT4: 4,
    ir.DataType.UINT4: 4,
    ir.DataType.INT8: 8,
    ir.DataType.UINT8: 8,
    ir.DataType.INT2: 2,
    ir.DataType.UINT2: 2,
    ir.DataType.FLOAT4E2M1: 4,
    ir.DataType.FLOAT8E4M3FN: 8,
    ir.DataType.FLOAT8E4M3FNUZ: 8,
    ir.DataType.FLOAT8E5M2: 8,
    ir.DataType.FLOAT8E5M2FNUZ: 8,
    ir.DataType.INT16: 16,
    ir.DataType.UINT16: 16,
    ir.DataType.INT32: 32,
}
PASSED_THROUGH = frozenset({"Transpose", "Cast", "Identity", "Reshape"})
"""Operators that change only the shape or type of a weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight:
    """One quantized weight as one node reads it."""

    node: str
    """The node that multiplies with it or looks it up."""
    operators: tuple[str, ...]
    """From the file to the node: DequantizeLinear, Transpose, MatMul."""
    form: str = field(init=False)
    """The operators as text, for programs that read --json: DequantizeLinear -> Transpose -> MatMul."""
    initializers: tuple[str, ...]
    """Codes (or the numbers that a QuantizeLinear turns into codes), scales, zero points."""
    codes: str
    """Type of the codes, such as INT4, UINT8, FLOAT8E4M3FN; where they are packed in bytes, their bits."""
    bits: int
    grouping: Grouping
    block_size: int | None
    """Inputs that share a scale, where they are blocks."""
    zero_point: bool
    """Whether zero points are stored."""
    scales: str
    """Type of the stored scales."""
    computed: str
    """Type in which the operator reads them: a Cast may widen them when the model is loaded."""
    shape: tuple[int, ...]
    """Of the unpacked weight: a MatMul's [K, N], a table's [V, D], experts' [E, N, K]."""
    bytes: int
    """Of codes, scales and zero points in the file."""
    activations: Activations = "float"
    accuracy_level: int | None = None
    """The node's attribute; None where it has none."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "form", " -> ".join(self.operators))

    @property
    def weights(self) -> int:
        """Return how many numbers the weight has."""
        return prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Return the bits of a number, with its part of scales and zero points."""
        return 8 * self.bytes / max(self.weights, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DequantizedWeight:
    """A weight of a DequantizeLinear, with the nodes that decide whether ONNX Runtime fuses them."""

    stored: StoredWeight
    dequantize: ir.Node
    reader: ir.Node


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundWeights:
    """Every quantized weight of a model, in graph order."""

    stored: tuple[StoredWeight, ...]
    dequantized: tuple[DequantizedWeight, ...]
    """Those of ``stored`` that a MatMul or Gemm reads through a DequantizeLinear."""


def find_quantized(model: ir.Model) -> FoundWeights:
    """Return the quantized weights of ``model``, those of subgraphs included."""
    stored: list[StoredWeight] = []
    dequantized: list[DequantizedWeight] = []
    for node in model.graph.all_nodes():
        if node.op_type == "DequantizeLinear":
            found = list(_dequantized(node))
            stored += [each.stored for each in found] or list(_looked_up(node))
            dequantized += [each for each in found if each.reader.op_type in ("MatMul", "Gemm")]
        elif node.op_type in _OPERATORS:
            stored += _OPERATORS[node.op_type](node)
    return FoundWeights(stored=tuple(stored), dequantized=tuple(dequantized))


def _dequantized(node: ir.Node) -> Iterator[DequantizedWeight]:
    """Yield the weight of a DequantizeLinear once for each reader; nothing where it dequantizes activations."""
    source = input_of(node, 0)
    quantize = None if source is None else source.producer()
    constant = source
    if quantize is not None and quantize.op_type == "QuantizeLinear":
        constant = input_of(quantize, 0)
    if constant is None or not _is_constant(constant) or constant.shape is None or len(constant.shape) < 2:
        return
    codes = _code_type(node, quantize)
    if codes is None or codes not in _BITS:
        return
    parts = (constant, _stored_input(node, 1), input_of(node, 2))
    for reader, between in _readers(node.outputs[0]):
        quantized = () if constant is source else ("QuantizeLinear",)
        yield DequantizedWeight(
            stored=StoredWeight(
                node=node_name(reader),
                operators=(*quantized, "DequantizeLinear", *between, reader.op_type),
                initializers=_names(parts),
                codes=codes.name,
                bits=_BITS[codes],
                grouping=_grouping(node),
                block_size=node.attributes.get_int("block_size", 0) or None,
                zero_point=input_of(node, 2) is not None,
                scales=_type_name(parts[1]),
                computed=_type_name(input_of(node, 1)),
                shape=_product_shape(reader, constant, between),
                bytes=sum(map(num_bytes, parts)),
                activations=_activations(reader),
            ),
            dequantize=node,
            reader=reader,
        )


def _looked_up(node: ir.Node) -> Iterator[StoredWeight]:
    """Yield a table of codes whose rows are dequantized after the Gather."""
    source = input_of(node, 0)
    gather = None if source is None else source.producer()
    table = input_of(gather, 0) if gather is not None and gather.op_type == "Gather" else None
    if gather is None or table is None or not _is_constant(table) or table.dtype not in _BITS:
        return
    parts = (table, _stored_input(node, 1), input_of(node, 2))
    yield StoredWeight(
        node=node_name(gather),
        operators=("Gather", "DequantizeLinear"),
        initializers=_names(parts),
        codes=table.dtype.name,
        bits=_BITS[table.dtype],
        grouping=_grouping(node),
        block_size=None,
        zero_point=parts[2] is not None,
        scales=_type_name(parts[1]),
        computed=_type_name(input_of(node, 1)),
        shape=_shape(table),
        bytes=sum(map(num_bytes, parts)),
    )


def _code_type(node: ir.Node, quantize: ir.Node | None) -> ir.DataType | None:
    """Return the type of what is dequantized, or of what a QuantizeLinear before it makes."""
    source = input_of(node, 0)
    if quantize is None:
        return None if source is None else source.dtype
    zero_point = input_of(quantize, 2)
    if zero_point is not None:
        return zero_point.dtype
    named = quantize.attributes.get_int("output_dtype", 0)
    return ir.DataType(named) if named else ir.DataType.UINT8


def _grouping(node: ir.Node) -> Grouping:
    if node.attributes.get_int("block_size", 0):
        return "block"
    scale = input_of(node, 1)
    return "tensor" if scale is None or scale.shape is None or len(scale.shape) == 0 else "channel"


def _readers(value: ir.Value) -> Iterator[tuple[ir.Node, tuple[str, ...]]]:
    """Yield the nodes that compute with ``value``, and the operators on the way, which change only shape or type."""
    for node in dict.fromkeys(value.consumers()):
        if node.op_type in PASSED_THROUGH:
            for reader, between in _readers(node.outputs[0]):
                yield reader, (node.op_type, *between)
        else:
            yield node, ()


def _product_shape(reader: ir.Node, weight: ir.Value, between: tuple[str, ...]) -> tuple[int, ...]:
    """Return [K, N] where a MatMul or Gemm reads the weight, however it is stored; else its own shape."""
    shape = _shape(weight)
    swapped = "Transpose" in between or reader.attributes.get_int("transB", 0) == 1
    return shape[::-1] if reader.op_type in ("MatMul", "Gemm") and swapped and len(shape) == 2 else shape


def _activations(reader: ir.Node) -> Activations:
    """Return what the other factor is: dequantized too, or floating point."""
    first = input_of(reader, 0)
    maker = None if first is None else first.producer()
    both = reader.op_type in ("MatMul", "Gemm", "Conv") and maker is not None and maker.op_type == "DequantizeLinear"
    return "int8, fixed scales" if both else "float"


def _matmul_nbits(node: ir.Node) -> Iterator[StoredWeight]:
    yield _packed(
        node,
        (1, 2, 3),
        bits=node.attributes.get_int("bits", 4),
        block_size=node.attributes.get_int("block_size", 0),
        shape=(node.attributes.get_int("K", 0), node.attributes.get_int("N", 0)),
    )


def _bnb4(node: ir.Node) -> Iterator[StoredWeight]:
    yield _packed(
        node,
        (1, 2, None),
        bits=4,
        block_size=node.attributes.get_int("block_size", 0),
        shape=(node.attributes.get_int("K", 0), node.attributes.get_int("N", 0)),
        codes="NF4" if node.attributes.get_int("quant_type", 0) == 1 else "FP4",
    )


def _gather(node: ir.Node) -> Iterator[StoredWeight]:
    data = _stored_input(node, 0)
    if data is None or not _is_constant(data):
        return
    bits = node.attributes.get_int("bits", 4)
    per_byte = 8 // bits if data.dtype is ir.DataType.UINT8 else 1
    rows, *width = _shape(data)  # the blocks of an lm_head's MatMulNBits where it shares them
    size = node.attributes.get_int("block_size", 128)
    yield _packed(node, (0, 2, 3), bits=bits, block_size=size, shape=(rows, prod(width) * per_byte))


def _experts(node: ir.Node) -> Iterator[StoredWeight]:
    """Yield the weights of the experts' first, second and third layer."""
    for index, (weight, scale, zero_point) in enumerate(((2, 3, 11), (5, 6, 12), (8, 9, 13)), start=1):
        value = input_of(node, weight)
        if value is None or not _is_constant(value):
            continue
        own = node.attributes.get_int(f"fc{index}_expert_weight_bits", 0)
        bits = own or node.attributes.get_int("expert_weight_bits", 4)
        *rows, width = _shape(value)
        size = node.attributes.get_int("block_size", 0)
        yield _packed(node, (weight, scale, zero_point), bits=bits, block_size=size, shape=(*rows, width * 8 // bits))


def _packed(
    node: ir.Node,
    places: tuple[int, int, int | None],
    *,
    bits: int,
    block_size: int,
    shape: tuple[int, ...],
    codes: str | None = None,
) -> StoredWeight:
    """Return a weight whose codes are packed in bytes.

    Args:
        node: the node that reads it.
        places: indices of the inputs that hold codes, scales and zero points.
        bits: of a code.
        block_size: numbers that share a scale; 0 for a scale per channel.
        shape: of the unpacked weight.
        codes: name of the codes' type, where it isn't an integer of ``bits``.
    """
    values = [None if place is None else _stored_input(node, place) for place in places]
    level = node.attributes.get_int("accuracy_level", 0)
    return StoredWeight(
        node=node_name(node),
        operators=(node.op_type,),
        initializers=_names(values),
        codes=codes or f"{bits} bits",
        bits=bits,
        grouping="block" if block_size else "channel",
        block_size=block_size or None,
        zero_point=values[2] is not None,
        scales=_type_name(values[1]),
        computed=_type_name(input_of(node, places[1])),
        shape=shape,
        bytes=sum(map(num_bytes, values)),
        accuracy_level=level or None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _IntegerProduct:
    """Indices of the inputs of an operator on 8-bit integers; without a scale, a later Mul applies it."""

    weight: int
    scale: int | None
    zero_point: int
    activations: Activations

    def __call__(self, node: ir.Node) -> Iterator[StoredWeight]:
        weight = input_of(node, self.weight)
        if weight is None or not _is_constant(weight) or weight.dtype not in _BITS:
            return
        scale = _later_scale(node) if self.scale is None else input_of(node, self.scale)
        zero_point = input_of(node, self.zero_point)
        per_channel = any(_shape(value) not in ((), (1,)) for value in (scale, zero_point) if value is not None)
        yield StoredWeight(
            node=node_name(node),
            operators=(node.op_type,),
            initializers=_names((weight, scale, zero_point)),
            codes=weight.dtype.name,
            bits=_BITS[weight.dtype],
            grouping="channel" if per_channel else "tensor",
            block_size=None,
            zero_point=zero_point is not None,
            scales=_type_name(scale),
            computed=_type_name(scale),
            shape=_shape(weight),
            bytes=sum(map(num_bytes, (weight, scale, zero_point))),
            activations=self.activations,
        )


def _later_scale(node: ir.Node) -> ir.Value | None:
    """Return the weight's scale after MatMulInteger: a Mul with the product of both scales applies it."""
    for reader, _ in _readers(node.outputs[0]):
        for value in reader.inputs if reader.op_type == "Mul" else ():
            maker = None if value is None else value.producer()
            if maker is not None and maker.op_type == "Mul":
                return next((each for each in maker.inputs if each is not None and _is_constant(each)), None)
    return None


_PER_RUN: Activations = "int8, scales per run"
_FIXED: Activations = "int8, fixed scales"
_OPERATORS: Mapping[str, Callable[[ir.Node], Iterator[StoredWeight]]] = {
    "MatMulNBits": _matmul_nbits,
    "MatMulBnb4": _bnb4,
    "GatherBlockQuantized": _gather,
    "QMoE": _experts,
    "MatMulInteger": _IntegerProduct(weight=1, scale=None, zero_point=3, activations=_PER_RUN),
    "ConvInteger": _IntegerProduct(weight=1, scale=None, zero_point=3, activations=_PER_RUN),
    "DynamicQuantizeMatMul": _IntegerProduct(weight=1, scale=2, zero_point=3, activations=_PER_RUN),
    "MatMulIntegerToFloat": _IntegerProduct(weight=1, scale=3, zero_point=5, activations=_PER_RUN),
    "QAttention": _IntegerProduct(weight=1, scale=4, zero_point=7, activations=_PER_RUN),
    "QLinearMatMul": _IntegerProduct(weight=3, scale=4, zero_point=5, activations=_FIXED),
    "QLinearConv": _IntegerProduct(weight=3, scale=4, zero_point=5, activations=_FIXED),
    "QGemm": _IntegerProduct(weight=3, scale=4, zero_point=5, activations=_FIXED),
}


def _stored_input(node: ir.Node, index: int) -> ir.Value | None:
    """Return the initializer behind an input.

    A Reshape of codes stands where embedding and lm_head share them, a Cast where scales are stored in a smaller type,
    and a Mul behind that where they are multiples of a step.
    """
    value = input_of(node, index)
    maker = None if value is None else value.producer()
    while maker is not None and maker.op_type in ("Reshape", "Cast", "Mul"):
        value = input_of(maker, 0)
        maker = None if value is None else value.producer()
    return value


def _is_constant(value: ir.Value) -> bool:
    """Return whether the file holds its numbers: an initializer, or the output of a Constant node."""
    return value.const_value is not None or ir.convenience.get_const_tensor(value) is not None


def _names(values: Sequence[ir.Value | None]) -> tuple[str, ...]:
    return tuple(str(value.name) for value in values if value is not None)


def num_bytes(value: ir.Value | None) -> int:
    """Return the bytes of a constant in the file; 0 for any other value."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return 0 if tensor is None else tensor.nbytes


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return () if tensor is None else tuple(tensor.shape.numpy())


def _type_name(value: ir.Value | None) -> str:
    return "" if value is None or value.dtype is None else value.dtype.name


def node_name(node: ir.Node) -> str:
    """Return a node's name, or its output's where it has none."""
    return str(node.name or node.outputs[0].name)
