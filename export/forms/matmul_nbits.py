"""Write stored codes as com.microsoft MatMulNBits, which ONNX Runtime otherwise makes of DequantizeLinear and MatMul.

The store's rows, [N, K], are cut into blocks along K, each a run of bytes: a weight is [N, nB, bytes], and a row's last
block is filled up. Codes are unsigned: where no zero point is stored the operator takes 2^(bits - 1), and signed codes
move up by that. It knows no scale per channel: such a scale is repeated over blocks, which changes no number.

Requires a site's MatMul or Gemm in place, with input scales folded. Ensures that MatMulNBits has the site's name, and
that the site's output keeps its own. A Gemm's bias becomes an Add: not every execution provider takes it inside.

A weight that lookups of an embedding share is stored as rows of bytes, [N, bytes], which GatherBlockQuantized reads as
they lie in the file, and MatMulNBits through a Reshape. ONNX Runtime folds the Reshape when it loads, packs what comes
out for the product, and frees it: the model takes no more memory than the product alone. With the Reshape before the
lookup, as onnxruntime-genai's builder has it, the folded copy stays (measured with 1.31.1 on the CPU).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch
from jaxtyping import Int8, Shaped, UInt8
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from export.forms.dequantize_linear import RewrittenSite, StoredSite, add_scales, read_scales
from export.graph_edit import MICROSOFT, GraphEditor, import_microsoft, replace_op
from stages.commands.options import AccuracyLevel
from stages.errors import OptionError
from stages.model.patterns import name_of
from stages.quantization.weights.bitpack import pack_4bit, unpack_4bit
from stages.quantization.weights.byte_scales import in_bytes
from stages.records.formats import PerBlock, PerChannel, QuantSpec, WeightForm, channel_block_size, onnx_float
from stages.records.sites import MatMulSite

_SMALLEST_BLOCK = 16
_BIAS_INPUT = 2


def stored_block_size(site: MatMulSite, spec: QuantSpec) -> int:
    """Return the inputs in a block of the operator; scales per channel take the largest size that fills up least.

    Raises:
        OptionError: the operator knows no such block size.
    """
    match spec.granularity:
        case PerChannel():
            return channel_block_size(site.in_features)
        case PerBlock(block_size=size):
            if size < _SMALLEST_BLOCK or size & (size - 1):
                raise OptionError(
                    f"'{site.name}' has blocks of {size}, but MatMulNBits takes powers of two from {_SMALLEST_BLOCK}; "
                    "quantize with another --block_size or --weight_operator dq."
                )
            return size


def implied_zero_point(spec: QuantSpec) -> int:
    """Return the zero point that the operator takes where none is stored."""
    return 1 << (spec.bits - 1)


# --------------------------------------------------------------------------- bytes


def packed_codes(
    codes: Shaped[Tensor, "N K"], zero_points: UInt8[Tensor, "N nB"] | None, site: MatMulSite, spec: QuantSpec
) -> UInt8[np.ndarray, "N blocks bytes"]:
    """Return codes as the operator reads them; what fills up a row's last block dequantizes to 0.

    Args:
        codes: as the store has them.
        zero_points: likewise; None where the format has none.
        site: the site that they are of.
        spec: how they are stored.
    """
    rows, columns = codes.shape
    width = stored_block_size(site, spec)
    blocks = -(-columns // width)
    # Bytes wrap around: as good as a wider type.
    unsigned = codes if zero_points is not None else codes.view(torch.uint8) + implied_zero_point(spec)
    if blocks * width > columns:
        whole = torch.full((rows, blocks * width), implied_zero_point(spec), dtype=torch.uint8)
        if zero_points is not None:
            whole[:] = zero_points[:, -1:]
        whole[:, :columns] = unsigned
        unsigned = whole
    packed = unsigned.numpy() if spec.bits == 8 else pack_4bit(unsigned)
    return packed.reshape(rows, blocks, width * spec.bits // 8)


def unpacked_codes(
    packed: UInt8[np.ndarray, "N ..."], site: MatMulSite, spec: QuantSpec
) -> Int8[np.ndarray, "N K"] | UInt8[np.ndarray, "N K"]:
    """Return codes as the store has them, signed where symmetric: the inverse of ``packed_codes``.

    Args:
        packed: as the operator reads them.
        site: the site that they are of.
        spec: how they are stored.
    """
    rows = packed.shape[0]
    codes = packed.reshape(rows, -1)
    if spec.bits == 4:
        codes = unpack_4bit(codes.reshape(-1), (rows, 2 * codes.shape[1]), np.dtype(np.uint8))
    codes = codes[:, : site.in_features]
    return (codes - np.uint8(implied_zero_point(spec))).view(np.int8) if spec.symmetric else codes


def packed_zero_points(
    zero_points: UInt8[Tensor, "N nB"], site: MatMulSite, spec: QuantSpec
) -> UInt8[np.ndarray, "N bytes"]:
    """Return zero points as the operator reads them: each row begins with a new byte.

    Args:
        zero_points: as the store has them.
        site: the site that they are of.
        spec: how they are stored.
    """
    per_block = _per_stored_block(zero_points, site, spec)
    if spec.bits == 8:
        return per_block.numpy()
    even = torch.nn.functional.pad(per_block, (0, per_block.shape[1] % 2))
    return pack_4bit(even).reshape(even.shape[0], even.shape[1] // 2)


def unpacked_zero_points(
    packed: UInt8[np.ndarray, "N bytes"], site: MatMulSite, spec: QuantSpec
) -> UInt8[np.ndarray, "N nB"]:
    """Return zero points of the operator's blocks: the inverse of ``packed_zero_points``.

    Args:
        packed: as the operator reads them.
        site: the site that they are of.
        spec: how they are stored.
    """
    if spec.bits == 8:
        return packed
    codes = unpack_4bit(packed.reshape(-1), (packed.shape[0], 2 * packed.shape[1]), np.dtype(np.uint8))
    return codes[:, : _num_blocks(site, spec)]


def _num_blocks(site: MatMulSite, spec: QuantSpec) -> int:
    return -(-site.in_features // stored_block_size(site, spec))


def _per_stored_block(per_block: Tensor, site: MatMulSite, spec: QuantSpec) -> Tensor:
    """Repeat [N, 1] over the operator's blocks where scales are per channel; return [N, nB] as it is."""
    match spec.granularity:
        case PerChannel():
            return per_block.expand(-1, _num_blocks(site, spec)).contiguous()
        case PerBlock():
            return per_block.contiguous()


# --------------------------------------------------------------------------- nodes


def insert_matmul_nbits(
    editor: GraphEditor,
    node: ir.Node,
    source: StoredSite,
    accuracy_level: AccuracyLevel | None,
    *,
    as_rows: bool = False,
) -> RewrittenSite:
    """Put MatMulNBits in the place of ``node``, or before the Add that a Gemm with a bias becomes.

    Args:
        editor: of the graph that holds ``node``.
        node: the site's MatMul or Gemm.
        source: the stored weight.
        accuracy_level: written as the operator's attribute, since session options don't reach it.
        as_rows: whether lookups read the codes too.

    Raises:
        OptionError: the operator knows no such block size.
    """
    site, spec, name = source.site, source.spec, str(node.name)
    codes = editor.add_initializer(node, f"{site.name}/codes", _lazy_codes(source, as_rows=as_rows))
    scales = add_scales(editor, node, source, _lazy_scales(source), WeightForm.MATMUL_NBITS)
    weights = [
        _in_blocks(editor, node, codes, site, spec) if as_rows else codes,
        read_scales(editor, node, scales, onnx_float(site.dtype)),
    ]
    if not spec.symmetric:
        weights.append(editor.add_initializer(node, f"{site.name}/zero_points", _lazy_zero_points(source)))
    attributes = _attributes(site, spec, accuracy_level)
    if _has_bias(node):
        product = _insert_before_bias(editor, node, weights, attributes, onnx_float(site.dtype))
    else:
        product = node.outputs[0]
        replace_op(node, MICROSOFT, "MatMulNBits", [node.inputs[0], *weights], attributes)
    import_microsoft(node)
    return RewrittenSite(
        source=source,
        form=WeightForm.MATMUL_NBITS,
        node=name,
        output=name_of(product),
        weight=name_of(codes),
        scales=name_of(scales.numbers),
        zero_points=None if spec.symmetric else name_of(weights[2]),
        steps=None if scales.steps is None else name_of(scales.steps),
    )


def _in_blocks(editor: GraphEditor, node: ir.Node, rows: ir.Value, site: MatMulSite, spec: QuantSpec) -> ir.Value:
    """Insert a Reshape of rows of bytes to the blocks that the operator wants."""
    shape = _codes_shape(site, spec)
    wanted = editor.add_initializer(node, f"{site.name}/blocks", ir.tensor(shape, dtype=ir.DataType.INT64))
    kind = ir.TensorType(ir.DataType.UINT8)
    return editor.insert_before(
        node, "Reshape", [rows, wanted], f"{site.name}/Reshape", {}, shape=ir.Shape(shape), kind=kind
    )


def _attributes(site: MatMulSite, spec: QuantSpec, accuracy_level: AccuracyLevel | None) -> dict[str, int]:
    needed = {
        "K": site.in_features,
        "N": site.out_features,
        "bits": spec.bits,
        "block_size": stored_block_size(site, spec),
    }
    return needed if accuracy_level is None else needed | {"accuracy_level": accuracy_level}


def _has_bias(node: ir.Node) -> bool:
    bias = node.inputs[_BIAS_INPUT] if len(node.inputs) > _BIAS_INPUT else None
    return node.op_type == "Gemm" and bias is not None and node.attributes.get_float("beta", 1.0) != 0


def _insert_before_bias(
    editor: GraphEditor, node: ir.Node, weights: list[ir.Value], attributes: Mapping[str, int], dtype: ir.DataType
) -> ir.Value:
    """Insert MatMulNBits before the Gemm, which becomes the Add of its (scaled) bias and gives up its name."""
    activation, bias, y = node.inputs[0], node.inputs[_BIAS_INPUT], node.outputs[0]
    assert activation is not None
    assert bias is not None
    name, node.name = str(node.name), f"{node.name}/Add"
    product = editor.insert_before(
        node,
        "MatMulNBits",
        [activation, *weights],
        name,
        attributes,
        shape=y.shape,
        kind=y.type,
        domain=MICROSOFT,
    )
    replace_op(node, "", "Add", [product, _times_beta(editor, node, bias, dtype)], {})
    return product


def _times_beta(editor: GraphEditor, gemm: ir.Node, bias: ir.Value, dtype: ir.DataType) -> ir.Value:
    beta = gemm.attributes.get_float("beta", 1.0)
    if beta == 1:
        return bias
    factor = editor.add_initializer(gemm, f"{gemm.name}/beta", ir.tensor(beta, dtype=dtype))
    kind = ir.TensorType(dtype)
    return editor.insert_before(gemm, "Mul", [bias, factor], f"{gemm.name}/Mul", {}, shape=bias.shape, kind=kind)


# --------------------------------------------------------------------------- tensors that are read when written


def _codes_shape(site: MatMulSite, spec: QuantSpec) -> tuple[int, int, int]:
    return site.out_features, _num_blocks(site, spec), stored_block_size(site, spec) * spec.bits // 8


def _lazy_codes(source: StoredSite, *, as_rows: bool) -> ir.LazyTensor:
    site, spec = source.site, source.spec
    rows, blocks, width = _codes_shape(site, spec)
    shape = (rows, blocks * width) if as_rows else (rows, blocks, width)

    def read() -> ir.TensorProtocol:
        return ir.tensor(packed_codes(source.codes(), source.zero_points(), site, spec).reshape(shape))

    return ir.LazyTensor(read, dtype=ir.DataType.UINT8, shape=ir.Shape(shape))


def _lazy_scales(source: StoredSite) -> ir.LazyTensor:
    site, spec = source.site, source.spec

    in_steps = source.byte_scales(WeightForm.MATMUL_NBITS)

    def read() -> ir.TensorProtocol:
        scales = _per_stored_block(source.scales(), site, spec)
        return TorchTensor(in_bytes(scales).multiples if in_steps else scales)

    shape = ir.Shape((site.out_features, _num_blocks(site, spec)))
    return ir.LazyTensor(read, dtype=ir.DataType.UINT8 if in_steps else onnx_float(spec.scale_dtype), shape=shape)


def _lazy_zero_points(source: StoredSite) -> ir.LazyTensor:
    site, spec = source.site, source.spec
    shape = ir.Shape((site.out_features, -(-_num_blocks(site, spec) * spec.bits // 8)))

    def read() -> ir.TensorProtocol:
        zero_points = source.zero_points()
        assert zero_points is not None
        return ir.tensor(packed_zero_points(zero_points, site, spec))

    return ir.LazyTensor(read, dtype=ir.DataType.UINT8, shape=shape)
