"""Write stored codes as DequantizeLinear: the tensors in the graph's own layout, and the nodes that read them.

The store holds rows, [N, K]; MatMul wants [K, N]. Blocks run along K, so a per-block weight has axis 0, scales
[nB, N] and an explicit block_size; a per-channel one has axis 1 and scales [N]. That is the form which ONNX Runtime
fuses into MatMulNBits when only the MatMul reads it. Column-major weights keep the store's rows: blocks lie on axis 1,
channels on axis 0, and a Transpose follows. The QDQ form stores the weight itself in floating point, and quantizes it
when it runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from jaxtyping import Float, Float32, Shaped, UInt8
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from export.graph_edit import GraphEditor
from stages.model.patterns import name_of
from stages.quantization.weights.bitpack import pack_4bit, pack_4bit_turned, turned
from stages.quantization.weights.byte_scales import has_byte_scales, in_bytes
from stages.quantization.weights.store import QuantizedStore
from stages.records.formats import PerBlock, PerChannel, QuantSpec, WeightForm, onnx_float, torch_float
from stages.records.results import QuantizedWeight
from stages.records.sites import MatMulSite

_CODE_TYPES: dict[tuple[int, bool], ir.DataType] = {
    (4, True): ir.DataType.INT4,
    (4, False): ir.DataType.UINT4,
    (8, True): ir.DataType.INT8,
    (8, False): ir.DataType.UINT8,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSite:
    """A quantized site and where its weight is stored; tensors are read when they are written."""

    store: QuantizedStore
    group_index: int
    site: MatMulSite
    spec: QuantSpec
    row_divisor: Tensor | None = None
    """[N] float32: input scales of the next layer that were folded into this one's output channels."""

    def read(self) -> QuantizedWeight:
        """Load the whole weight, with scales as the search left them."""
        return self.store.read(self.group_index, self.site)

    def codes(self) -> Shaped[Tensor, "N K"]:
        """Load the codes."""
        codes = self.store.tensor(self.group_index, self.site, "codes")
        assert codes is not None
        return codes

    def scales(self) -> Float[Tensor, "N nB"]:
        """Load the scales, divided by the row divisor."""
        scales = self.store.tensor(self.group_index, self.site, "scales")
        assert scales is not None
        return divided_scales(scales, self.row_divisor)

    def byte_scales(self, form: WeightForm) -> bool:
        """Return whether the scales are stored as bytes."""
        return self.store.recipe.byte_scales and has_byte_scales(self.site, self.spec, form)

    def zero_points(self) -> UInt8[Tensor, "N nB"] | None:
        """Load the zero points; None where the format has none."""
        return self.store.tensor(self.group_index, self.site, "zero_points")

    def input_scale(self) -> Float32[Tensor, " K"] | None:
        """Load the input scale; None where the weight has none."""
        return self.store.tensor(self.group_index, self.site, "input_scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class RewrittenSite:
    """A site in the rewritten graph: its node and the initializers that now hold its weight."""

    source: StoredSite
    form: WeightForm
    node: str
    output: str
    """What the node makes: the site's output, but where a Gemm's bias is added after it."""
    weight: str
    """Codes (DQ) or the floating-point weight (QDQ)."""
    scales: str
    zero_points: str | None
    steps: str | None = None
    """What scales that are bytes are multiples of."""


def insert_dequantize(editor: GraphEditor, node: ir.Node, source: StoredSite, form: WeightForm) -> RewrittenSite:
    """Feed ``node``'s second input from its own new [Q ->] DequantizeLinear; a shared one would never be fused.

    Args:
        editor: of the graph that holds ``node``.
        node: the site's MatMul or Gemm.
        source: the stored weight.
        form: DQ, DQ_COLUMN_MAJOR or QDQ.
    """
    site, spec = source.site, source.spec
    scales = add_scales(editor, node, source, _lazy_scales(source, form), form)
    quantization = [read_scales(editor, node, scales, onnx_float(site.dtype))]
    if not spec.symmetric:
        quantization.append(editor.add_initializer(node, f"{site.name}/zero_points", _lazy_zero_points(source, form)))
    if form is WeightForm.QDQ:
        weight = editor.add_initializer(node, f"{site.name}/weight", _lazy_floats(source))
        codes = _quantize(editor, node, source, [weight, *quantization])
    else:
        weight = codes = editor.add_initializer(node, f"{site.name}/codes", _lazy_codes(source, form))
    floats = _dequantize(editor, node, source, form, [codes, *quantization])
    node.replace_input_with(1, floats)
    return RewrittenSite(
        source=source,
        form=form,
        node=str(node.name),
        output=site.output,
        weight=name_of(weight),
        scales=name_of(scales.numbers),
        zero_points=None if spec.symmetric else name_of(quantization[1]),
        steps=None if scales.steps is None else name_of(scales.steps),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleValues:
    """The initializers of a weight's scales."""

    numbers: ir.Value
    steps: ir.Value | None
    """What they are multiples of; None where they are the scales themselves."""


def add_scales(
    editor: GraphEditor, node: ir.Node, source: StoredSite, scales: ir.LazyTensor, form: WeightForm
) -> ScaleValues:
    """Register scales, and their steps where they are bytes.

    Args:
        editor: of the graph that holds ``node``.
        node: the site's.
        source: the stored weight.
        scales: as ``form`` has them, bytes where ``source`` says so.
        form: the nodes that read them.
    """
    name = source.site.name
    numbers = editor.add_initializer(node, f"{name}/scales", scales)
    if not source.byte_scales(form):
        return ScaleValues(numbers=numbers, steps=None)
    shape = (source.site.out_features, 1)
    lazy = ir.LazyTensor(
        lambda: TorchTensor(_oriented(in_bytes(source.scales()).steps, _rows_of(form))),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(shape if form is WeightForm.MATMUL_NBITS else shape[::-1]),
    )
    return ScaleValues(numbers=numbers, steps=editor.add_initializer(node, f"{name}/scale_steps", lazy))


def read_scales(editor: GraphEditor, node: ir.Node, scales: ScaleValues, dtype: ir.DataType) -> ir.Value:
    """Return the scales in ``dtype``, behind nodes that ONNX Runtime computes when it loads the model."""
    numbers = editor.read_as(node, scales.numbers, dtype)
    if scales.steps is None:
        return numbers
    name, kind = f"{scales.numbers.name}/Mul", ir.TensorType(dtype)
    return editor.insert_before(node, "Mul", [numbers, scales.steps], name, {}, shape=numbers.shape, kind=kind)


def _rows_of(form: WeightForm) -> WeightForm:
    """Return a form that has scales in the order of ``form``: MatMulNBits has the store's rows."""
    return WeightForm.DQ_COLUMN_MAJOR if form is WeightForm.MATMUL_NBITS else form


def divided_scales(scales: Float[Tensor, "N nB"], row_divisor: Float32[Tensor, " N"] | None) -> Float[Tensor, "N nB"]:
    """Divide output channel n's scales by ``row_divisor[n]``, in float32 that is then rounded to storage."""
    return scales if row_divisor is None else (scales.float() / row_divisor[:, None]).to(scales.dtype)


def dequantized(weight: QuantizedWeight, row_divisor: Float32[Tensor, " N"] | None) -> Float[Tensor, "N K"]:
    """Return (code - zero_point) * scale in the site's type: QuantizeLinear gives exactly these codes again.

    One rounding of code * scale to the storage type moves the quotient by less than half a code, whatever the type.
    """
    width = weight.spec.block_size(weight.site.in_features)
    codes = weight.codes.float()
    if weight.zero_points is not None:
        codes -= _per_input(weight.zero_points.float(), width, codes.shape[1])
    codes *= _per_input(divided_scales(weight.scales, row_divisor).float(), width, codes.shape[1])
    return codes.to(torch_float(weight.site.dtype))


def _per_input(per_block: Float32[Tensor, "N nB"], width: int, in_features: int) -> Float32[Tensor, "N K"]:
    return per_block.repeat_interleave(width, dim=1)[:, :in_features]


# --------------------------------------------------------------------------- nodes


def _dequantize(
    editor: GraphEditor, node: ir.Node, source: StoredSite, form: WeightForm, inputs: list[ir.Value]
) -> ir.Value:
    """Insert DequantizeLinear, and the Transpose that a column-major weight needs; return the [K, N] for the MatMul."""
    site, dtype = source.site, ir.TensorType(onnx_float(source.site.dtype))
    floats = editor.insert_before(
        node,
        "DequantizeLinear",
        inputs,
        f"{site.name}/DequantizeLinear",
        _axis(source.spec, form),
        shape=_matrix_shape(site, form),
        kind=dtype,
    )
    if form is not WeightForm.DQ_COLUMN_MAJOR:
        return floats
    shape = _matrix_shape(site, WeightForm.DQ)
    perm = {"perm": [1, 0]}
    return editor.insert_before(node, "Transpose", [floats], f"{site.name}/Transpose", perm, shape=shape, kind=dtype)


def _quantize(editor: GraphEditor, node: ir.Node, source: StoredSite, inputs: list[ir.Value]) -> ir.Value:
    site, spec = source.site, source.spec
    # A zero point already says the type of the codes.
    output_type = {"output_dtype": int(_code_type(spec))} if spec.symmetric else {}
    return editor.insert_before(
        node,
        "QuantizeLinear",
        inputs,
        f"{site.name}/QuantizeLinear",
        _axis(spec, WeightForm.QDQ) | output_type,
        shape=_matrix_shape(site, WeightForm.QDQ),
        kind=ir.TensorType(_code_type(spec)),
    )


def _axis(spec: QuantSpec, form: WeightForm) -> dict[str, int]:
    """Return the attributes that say along which axis scales differ: blocks lie along K, channels along N."""
    along_k, along_n = (1, 0) if form is WeightForm.DQ_COLUMN_MAJOR else (0, 1)
    match spec.granularity:
        case PerBlock(block_size=size):
            return {"axis": along_k, "block_size": size}
        case PerChannel():
            return {"axis": along_n}


# --------------------------------------------------------------------------- tensors that are read when written


def _lazy_codes(source: StoredSite, form: WeightForm) -> ir.LazyTensor:
    return ir.LazyTensor(
        lambda: _oriented_codes(source.codes(), source.spec, form),
        dtype=_code_type(source.spec),
        shape=_matrix_shape(source.site, form),
    )


def _lazy_floats(source: StoredSite) -> ir.LazyTensor:
    return ir.LazyTensor(
        lambda: TorchTensor(_oriented(dequantized(source.read(), source.row_divisor), WeightForm.QDQ)),
        dtype=onnx_float(source.site.dtype),
        shape=_matrix_shape(source.site, WeightForm.QDQ),
    )


def _lazy_scales(source: StoredSite, form: WeightForm) -> ir.LazyTensor:
    shape = _scales_shape(source.site, source.spec, form)
    if source.byte_scales(form):
        return ir.LazyTensor(
            lambda: TorchTensor(_oriented(in_bytes(source.scales()).multiples, form)),
            dtype=ir.DataType.UINT8,
            shape=ir.Shape(shape),
        )
    return ir.LazyTensor(
        lambda: TorchTensor(_oriented(source.scales(), form).reshape(shape)),
        dtype=onnx_float(source.spec.scale_dtype),
        shape=ir.Shape(shape),
    )


def _lazy_zero_points(source: StoredSite, form: WeightForm) -> ir.LazyTensor:
    shape = _scales_shape(source.site, source.spec, form)

    def read() -> ir.TensorProtocol:
        zero_points = source.zero_points()
        assert zero_points is not None
        return _integers(_oriented(zero_points, form).reshape(shape), source.spec)

    return ir.LazyTensor(read, dtype=_code_type(source.spec), shape=ir.Shape(shape))


def _oriented_codes(codes: Shaped[Tensor, "N K"], spec: QuantSpec, form: WeightForm) -> ir.TensorProtocol:
    if form is WeightForm.DQ_COLUMN_MAJOR:
        return _integers(codes.contiguous(), spec)
    shape = ir.Shape(codes.shape[::-1])
    if spec.bits == 8:
        return ir.Tensor(turned(codes.numpy()), _code_type(spec), shape=shape)
    return ir.PackedTensor(pack_4bit_turned(codes), _code_type(spec), shape=shape)


def _integers(values: Tensor, spec: QuantSpec) -> ir.TensorProtocol:
    if spec.bits == 8:
        return TorchTensor(values)
    return ir.PackedTensor(pack_4bit(values), _code_type(spec), shape=ir.Shape(values.shape))


def _code_type(spec: QuantSpec) -> ir.DataType:
    return _CODE_TYPES[spec.bits, spec.symmetric]


def _oriented(rows: Shaped[Tensor, "N columns"], form: WeightForm) -> Shaped[Tensor, "first second"]:
    """Return the store's rows as the graph holds them: [N, columns] in column-major form, else [columns, N]."""
    return rows.contiguous() if form is WeightForm.DQ_COLUMN_MAJOR else rows.t().contiguous()


def _matrix_shape(site: MatMulSite, form: WeightForm) -> ir.Shape:
    shape = (site.in_features, site.out_features)
    return ir.Shape(shape[::-1] if form is WeightForm.DQ_COLUMN_MAJOR else shape)


def _scales_shape(site: MatMulSite, spec: QuantSpec, form: WeightForm) -> tuple[int, ...]:
    """Return the shape of scales and zero points: [nB, N] ([N, nB] in column-major form), or [N] per channel."""
    match spec.granularity:
        case PerBlock():
            shape = (spec.num_blocks(site.in_features), site.out_features)
            return shape[::-1] if form is WeightForm.DQ_COLUMN_MAJOR else shape
        case PerChannel():
            return (site.out_features,)
