"""Write the stored matrices of experts as com.microsoft QMoE, in the place of the MoE node that they are from.

The operator reads rows of codes as the store has them: [experts, N, K], unsigned, low nibble first, with 2^(bits - 1)
as zero point where none is stored. Scales are [experts, N, nB], or [experts, N] where the node has no block_size, of
one type in a node; each row's zero points begin with a new byte, and those per channel lie in one row. (Found by
running the CPU's operator of ONNX Runtime 1.23 to 1.32.) The CPU's weighs a token's experts by softmax over the chosen
ones whatever the node says, unless it reads the weights: where MoE takes softmax over all, QMoE gets a Softmax of the
scores as router_weights.

Requires a MoE node as it was found. Ensures that the node keeps its name, output, router, biases and activation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from jaxtyping import Int16, Shaped, UInt8
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from export.forms.dequantize_linear import StoredSite
from export.forms.matmul_nbits import implied_zero_point
from export.graph_edit import GraphEditor, import_microsoft
from stages.model.form.insert import replace_inputs
from stages.model.patterns import name_of
from stages.quantization.weights.bitpack import pack_4bit, unpack_4bit
from stages.records.experts import ExpertLayer
from stages.records.formats import PerBlock, PerChannel, QuantSpec, onnx_float, torch_float
from stages.records.sites import FloatName

ROUTER_WEIGHTS = 14
"""The operator's input for weights that are no softmax over the chosen scores."""
RAW = "weights_prepacked"
"""The attribute that says, where it is 0, that codes are in the operator's own order; the CPU reads no other."""
_NO_FC3 = (None, None, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTable:
    """The matrices of one projection of all experts: where they are stored, and the initializers that hold them."""

    sources: tuple[StoredSite, ...]
    """By expert."""
    codes: str
    scales: str
    zero_points: str | None

    @property
    def spec(self) -> QuantSpec:
        """Return the format of their codes and zero points, which all of them share."""
        return self.sources[0].spec


@dataclass(frozen=True, slots=True, kw_only=True)
class RewrittenExperts:
    """A QMoE node and what it was made from."""

    layer: ExpertLayer
    fc1: ExpertTable
    fc2: ExpertTable


# --------------------------------------------------------------------------- bytes


def packed_rows(values: Shaped[Tensor, "N K"], spec: QuantSpec) -> UInt8[np.ndarray, "N bytes"]:
    """Return codes or zero points as the operator reads them, each row from a new byte on.

    Args:
        values: as the store has them.
        spec: how many bits they have, and whether they are signed.
    """
    unsigned = values.to(torch.int16) + (implied_zero_point(spec) if values.dtype == torch.int8 else 0)
    rows = unsigned.to(torch.uint8)
    if spec.bits == 8:
        return rows.numpy()
    even = torch.nn.functional.pad(rows, (0, rows.shape[1] % 2))
    return pack_4bit(even).reshape(even.shape[0], even.shape[1] // 2)


def unpacked_rows(packed: UInt8[np.ndarray, "N bytes"], columns: int, spec: QuantSpec) -> Int16[np.ndarray, "N K"]:
    """Return unsigned numbers: the inverse of ``packed_rows``.

    Args:
        packed: as the operator reads them.
        columns: numbers in a row.
        spec: how many bits they have.
    """
    if spec.bits == 8:
        return packed.astype(np.int16)
    shape = (packed.shape[0], 2 * packed.shape[1])
    return unpack_4bit(packed.reshape(-1), shape, np.dtype(np.uint8))[:, :columns].astype(np.int16)


# --------------------------------------------------------------------------- nodes


def insert_qmoe(
    editor: GraphEditor, layer: ExpertLayer, sources: Sequence[StoredSite], attributes: Mapping[str, int]
) -> RewrittenExperts:
    """Turn a MoE node into QMoE.

    Args:
        editor: of the graph that holds the node.
        layer: the node.
        sources: the stored matrices of all its experts.
        attributes: those that the target's release has or needs besides those of the format.
    """
    node = editor.producer(layer.output)
    tokens, scores, _, fc1_bias, _, fc2_bias = (*node.inputs, None, None)[:6]
    assert scores is not None
    scales = _widest_scales(sources)
    fc1, fc2 = (_insert_table(editor, node, table, scales) for table in _by_projection(sources))
    weights = [] if layer.routing.over_chosen else [_softmax(editor, node, scores)]
    inputs = [
        *(tokens, scores, fc1.values[0], fc1.values[1], fc1_bias, fc2.values[0], fc2.values[1], fc2_bias),
        *_NO_FC3,
        *(fc1.values[2], fc2.values[2], None),
        *weights,
    ]
    while inputs[-1] is None:
        inputs.pop()
    node.op_type = "QMoE"
    replace_inputs(node, inputs)
    for name, number in {**_attributes(fc1.table.spec), **attributes}.items():
        node.attributes[name] = ir.AttrInt64(name, number)
    import_microsoft(node)
    return RewrittenExperts(layer=layer, fc1=fc1.table, fc2=fc2.table)


def _attributes(spec: QuantSpec) -> dict[str, int]:
    match spec.granularity:
        case PerBlock(block_size=size):
            return {"expert_weight_bits": spec.bits, "block_size": size}
        case PerChannel():
            return {"expert_weight_bits": spec.bits}


def _softmax(editor: GraphEditor, node: ir.Node, scores: ir.Value) -> ir.Value:
    name = f"{node.name or name_of(node.outputs[0])}/Softmax"
    return editor.insert_before(node, "Softmax", [scores], name, {"axis": -1}, shape=scores.shape, kind=scores.type)


def _widest_scales(sources: Sequence[StoredSite]) -> FloatName:
    """Return the type that holds the scales of all: a search keeps them wide where a matrix's numbers need it."""
    return max((source.spec.scale_dtype for source in sources), key=lambda name: torch_float(name).itemsize)


def _by_projection(sources: Sequence[StoredSite]) -> tuple[tuple[StoredSite, ...], tuple[StoredSite, ...]]:
    places = [(source.site.expert, source) for source in sources]
    fc1, fc2 = (
        tuple(source for place, source in places if place is not None and place.projection == projection)
        for projection in ("fc1", "fc2")
    )
    return fc1, fc2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inserted:
    table: ExpertTable
    values: tuple[ir.Value, ir.Value, ir.Value | None]
    """Codes, scales, zero points."""


def _insert_table(
    editor: GraphEditor, node: ir.Node, sources: tuple[StoredSite, ...], scale_dtype: FloatName
) -> _Inserted:
    stem = sources[0].site.weight
    codes = editor.add_initializer(node, f"{stem}/codes", _lazy_codes(sources))
    scales = editor.add_initializer(node, f"{stem}/scales", _lazy_scales(sources, scale_dtype))
    zero_points = None
    if not sources[0].spec.symmetric:
        zero_points = editor.add_initializer(node, f"{stem}/zero_points", _lazy_zero_points(sources))
    table = ExpertTable(
        sources=sources,
        codes=name_of(codes),
        scales=name_of(scales),
        zero_points=None if zero_points is None else name_of(zero_points),
    )
    return _Inserted(table=table, values=(codes, scales, zero_points))


# --------------------------------------------------------------------------- tensors that are read when written


def _lazy_codes(sources: tuple[StoredSite, ...]) -> ir.LazyTensor:
    site, spec = sources[0].site, sources[0].spec
    shape = (len(sources), site.out_features, -(-site.in_features * spec.bits // 8))
    return _lazy_bytes(shape, lambda index: packed_rows(sources[index].codes(), spec))


def _lazy_zero_points(sources: tuple[StoredSite, ...]) -> ir.LazyTensor:
    site, spec = sources[0].site, sources[0].spec
    per_channel = isinstance(spec.granularity, PerChannel)
    columns = site.out_features if per_channel else spec.num_blocks(site.in_features)
    width = -(-columns * spec.bits // 8)

    def read(index: int) -> np.ndarray:
        zero_points = sources[index].zero_points()
        assert zero_points is not None
        return packed_rows(zero_points.T.contiguous(), spec)[0] if per_channel else packed_rows(zero_points, spec)

    rows = () if per_channel else (site.out_features,)
    return _lazy_bytes((len(sources), *rows, width), read)


def _lazy_bytes(shape: tuple[int, ...], read: Callable[[int], np.ndarray]) -> ir.LazyTensor:
    def read_all() -> ir.TensorProtocol:
        whole = np.empty(shape, np.uint8)
        for index in range(len(whole)):
            whole[index] = read(index)
        return ir.tensor(whole)

    return ir.LazyTensor(read_all, dtype=ir.DataType.UINT8, shape=ir.Shape(shape))


def _lazy_scales(sources: tuple[StoredSite, ...], dtype: FloatName) -> ir.LazyTensor:
    site, spec = sources[0].site, sources[0].spec
    blocks = () if isinstance(spec.granularity, PerChannel) else (spec.num_blocks(site.in_features),)
    shape = (len(sources), site.out_features, *blocks)

    def read() -> ir.TensorProtocol:
        scales = torch.stack([source.scales().to(torch_float(dtype)) for source in sources])
        return TorchTensor(scales.reshape(shape))

    return ir.LazyTensor(read, dtype=onnx_float(dtype), shape=ir.Shape(shape))
