"""Check one saved weight: its numbers against the store, and its product on ONNX Runtime against float64 arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from jaxtyping import Float64, UInt8

from export.forms.dequantize_linear import RewrittenSite, dequantized, divided_scales
from export.forms.matmul_nbits import stored_block_size, unpacked_codes, unpacked_zero_points
from export.save import read_initializer, saved_bytes, saved_tensor
from export.verify.isolated import IsolatedModel, relative_error, run_isolated
from stages.commands.options import AccuracyLevel
from stages.errors import GraphError
from stages.quantization.search.affine import split
from stages.quantization.weights.bitpack import signed_4bit, slices, turned
from stages.quantization.weights.byte_scales import in_bytes
from stages.records.formats import FLOAT_TYPES, QuantSpec, WeightForm, onnx_float
from stages.records.results import QuantizedWeight

Matrix = np.ndarray[tuple[int, int], np.dtype[Any]]
_TOKENS = 8
_NUMBERS = 1 << 18
"""Of a weight that are looked at together: about what a core's own cache holds in float32."""
_INPUTS = 256
_LARGEST_WIDENED = 1 << 23
"""INT8 numbers of a weight that run at level 1 at once."""


def check_site(
    folder: Path, node: ir.Node, site: RewrittenSite, levels: Sequence[AccuracyLevel | None], threads: int | None = None
) -> tuple[float, ...]:
    """Check a saved weight, which is read once, a few output channels at a time.

    Args:
        folder: holds the saved data file.
        node: the saved MatMul, Gemm or MatMulNBits.
        site: what was written there.
        levels: accuracy levels of the products that are measured; None: the runtime's default.
        threads: of ONNX Runtime; None: as many as it is granted.

    Returns:
        max |y - y_ref| / max |y_ref| over 8 random tokens, at each level.

    Raises:
        GraphError: saved codes differ from the store's, or scales after the one rounding of a fold; or ONNX Runtime
            refuses the weight.
    """
    source = site.source
    weight = source.read()
    for channels, inputs, matrix in _saved_matrix(node, site):
        _refuse_other(matrix, _wanted_matrix(weight, site, channels, inputs), site.weight, site)
    parameters = _saved_parameters(node, site)
    _check_parameters(parameters, weight, site)
    if not levels:
        return ()
    x = np.random.default_rng(0).standard_normal((_TOKENS, source.site.in_features))
    x = x.astype(FLOAT_TYPES[source.site.dtype].numpy)
    reference = np.empty((_TOKENS, source.site.out_features))
    for channels in slices(source.site.out_features, max(1, _NUMBERS // source.site.in_features)):
        # The file's own numbers: they were found to be equal.
        matrix = _wanted_matrix(weight, site, channels, slice(None))
        reference[:, channels] = _product(x, matrix, parameters, channels, site)
    products = (_run(folder, node, site, level, x, threads) for level in levels)
    return tuple(relative_error(product, reference) for product in products)


def _run(
    folder: Path, node: ir.Node, site: RewrittenSite, level: AccuracyLevel | None, x: Matrix, threads: int | None
) -> Matrix:
    """Return what ONNX Runtime computes of x [T, K].

    At level 1 INT8 has no kernel of its own: the runtime makes float32 of the whole weight, so large ones run in parts.
    """
    place = site.source.site
    whole = place.in_features * place.out_features
    if level != 1 or site.source.spec.bits == 4 or whole <= _LARGEST_WIDENED:
        return run_isolated(_isolated(node, site, level), x, folder, level, threads)
    found = []
    for channels in slices(place.out_features, max(1, _LARGEST_WIDENED // place.in_features)):
        model = _narrowed(_isolated(node, site, level), site, channels)
        found.append(run_isolated(model, x, folder, level, threads))
        for value in model.graph.initializers.values():
            value.const_value = None  # graphs refer to themselves: it would wait for the garbage collector
    return np.concatenate(found, axis=1)


def _narrowed(model: ir.Model, site: RewrittenSite, channels: slice) -> ir.Model:
    """Let an isolated model compute only some output channels, whose numbers are copied from the file."""
    size, channels_last = site.source.site.out_features, site.form in (WeightForm.DQ, WeightForm.QDQ)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        numbers = tensor.numpy()
        if numbers.dtype == np.int64:  # a shape
            numbers = np.array([channels.stop - channels.start, *numbers[1:]])
        elif numbers.shape[-1 if channels_last else 0] == size:
            numbers = np.array(numbers[..., channels] if channels_last else numbers[channels], order="C")
        value.const_value = ir.tensor(numbers, name=value.name)
        value.shape = ir.Shape(numbers.shape)
        if isinstance(tensor, ir.ExternalTensor):
            tensor.release()
    for node in model.graph:
        if "N" in node.attributes:
            node.attributes["N"] = ir.AttrInt64("N", channels.stop - channels.start)
        for value in node.outputs:
            value.shape = None
    return model


def _isolated(node: ir.Node, site: RewrittenSite, level: AccuracyLevel | None) -> ir.Model:
    """Return x [8, K] -> MatMul behind its own [QuantizeLinear and] DequantizeLinear, or the MatMulNBits that it is.

    ``level`` is written into MatMulNBits, which session options don't reach; None leaves what the node says.
    """
    source, dtype = site.source, onnx_float(site.source.site.dtype)
    x = ir.Value(name="x", shape=ir.Shape((_TOKENS, source.site.in_features)), type=ir.TensorType(dtype))
    y = ir.Value(name="y", shape=ir.Shape((_TOKENS, source.site.out_features)), type=ir.TensorType(dtype))
    model, graph = IsolatedModel(), node.graph
    assert isinstance(graph, ir.Graph)
    if site.form is not WeightForm.MATMUL_NBITS:
        weight = node.inputs[1]
        assert weight is not None
        return model.ending_in(ir.node("MatMul", [x, model.copy(weight)], outputs=[y], name="MatMul"), x, graph)
    weights = [model.copy(value) for value in node.inputs[1:] if value is not None]
    attributes = dict(node.attributes)
    if level is not None:
        attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
    last = ir.Node(node.domain, node.op_type, [x, *weights], list(attributes.values()), outputs=[y])
    return model.ending_in(last, x, graph)


# --------------------------------------------------------------------------- numbers as the file has them


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parameters:
    """What the file has besides a weight's matrix."""

    scales: Matrix
    """[N, nB], one for each ``_block_size`` inputs."""
    zero_points: Matrix | None
    """[N, nB] in float32, or None where none is stored."""


def _saved_matrix(node: ir.Node, site: RewrittenSite) -> Iterator[tuple[slice, slice, Matrix]]:
    """Yield output channels, inputs, and what the file has for them, [n, k]; as much as a processor's cache holds.

    That is codes as the store has them, or the floating-point weight of the QDQ form.
    """
    source, every = site.source, slice(None)
    place = source.site
    content = saved_bytes(saved_tensor(node, site.weight))
    rows = max(1, _NUMBERS // place.in_features)
    match site.form:
        case WeightForm.QDQ:
            matrix = content.view(FLOAT_TYPES[place.dtype].numpy).reshape(place.in_features, -1).T
            yield from ((channels, every, matrix[channels]) for channels in slices(place.out_features, rows))
        case WeightForm.DQ if source.spec.bits == 8 or place.out_features % 2 == 0:
            yield from _turned_codes(content.reshape(place.in_features, -1), source.spec)
        case WeightForm.DQ:
            yield every, every, read_initializer(node, site.weight).T
        case WeightForm.DQ_COLUMN_MAJOR:
            yield every, every, read_initializer(node, site.weight)
        case WeightForm.MATMUL_NBITS:
            packed = content.reshape(place.out_features, -1)
            for channels in slices(place.out_features, rows):
                yield channels, every, unpacked_codes(packed[channels], place, source.spec)


def _turned_codes(rows: UInt8[np.ndarray, "K bytes"], spec: QuantSpec) -> Iterator[tuple[slice, slice, Matrix]]:
    """Yield codes that lie inputs first: of INT4 the even output channels, then the odd ones."""
    for inputs in slices(len(rows), _INPUTS):
        columns = turned(rows[inputs])
        if spec.bits == 8:
            yield slice(None), inputs, columns.view(np.int8 if spec.symmetric else np.uint8)
            continue
        for half, nibbles in enumerate((columns & 0x0F, columns >> 4)):
            yield slice(half, None, 2), inputs, signed_4bit(nibbles) if spec.symmetric else nibbles


def _saved_parameters(node: ir.Node, site: RewrittenSite) -> _Parameters:
    source = site.source
    scales = _outputs_first(read_initializer(node, site.scales), site)
    if site.steps is not None:
        scales = scales.astype(np.float32) * read_initializer(node, site.steps).reshape(-1, 1)
    zero_points = None if site.zero_points is None else read_initializer(node, site.zero_points)
    if zero_points is not None and site.form is WeightForm.MATMUL_NBITS:
        zero_points = unpacked_zero_points(zero_points, source.site, source.spec)
    elif zero_points is not None:
        zero_points = _outputs_first(zero_points, site)
    return _Parameters(
        scales=scales, zero_points=None if zero_points is None else np.array(zero_points, np.float32, order="C")
    )


def _outputs_first(saved: np.ndarray, site: RewrittenSite) -> Matrix:
    """Return [N, columns], a view."""
    channels = site.source.site.out_features
    if site.form in (WeightForm.DQ_COLUMN_MAJOR, WeightForm.MATMUL_NBITS):
        return saved.reshape(channels, -1)
    return saved.reshape(-1, channels).T


def _block_size(site: RewrittenSite) -> int:
    """Return how many inputs share one of the saved scales."""
    source = site.source
    if site.form is WeightForm.MATMUL_NBITS:
        return stored_block_size(source.site, source.spec)
    return source.spec.block_size(source.site.in_features)


# --------------------------------------------------------------------------- what they have to be


def _wanted_matrix(weight: QuantizedWeight, site: RewrittenSite, channels: slice, inputs: slice) -> Matrix:
    """Return what the file has to hold for some output channels and inputs."""
    codes = weight.codes[channels, inputs]
    if site.form is not WeightForm.QDQ:
        return codes.numpy()
    divisor = site.source.row_divisor
    part = replace(
        weight,
        codes=codes,
        scales=weight.scales[channels],
        zero_points=None if weight.zero_points is None else weight.zero_points[channels],
    )
    floats: Matrix = dequantized(part, None if divisor is None else divisor[channels]).float().numpy()
    return floats


def _check_parameters(saved: _Parameters, weight: QuantizedWeight, site: RewrittenSite) -> None:
    scales = divided_scales(weight.scales, site.source.row_divisor)
    if site.steps is not None:
        scales = in_bytes(scales).scales
    # MatMulNBits has what a channel shares in every block.
    _refuse_other(saved.scales, scales.expand(saved.scales.shape).float().numpy(), site.scales, site)
    if weight.zero_points is not None:
        assert saved.zero_points is not None
        assert site.zero_points is not None
        zero_points = weight.zero_points.expand(saved.zero_points.shape)
        _refuse_other(saved.zero_points, zero_points.numpy(), site.zero_points, site)


def _refuse_other(found: Matrix, expected: Matrix, name: str, site: RewrittenSite) -> None:
    if not np.array_equal(found if found.dtype == expected.dtype else found.astype(expected.dtype), expected):
        raise GraphError(
            f"What was saved as '{name}' differs from the quantized weight of '{site.source.site.name}'; check the "
            "disk and export again."
        )


def _product(
    x: Matrix, matrix: Matrix, parameters: _Parameters, channels: slice, site: RewrittenSite
) -> Float64[np.ndarray, "T n"]:
    """Return x [T, K] times what the numbers stand for: within blocks in float32, their sums in float64."""
    block_size = _block_size(site)
    blocks, weight = (split(torch.from_numpy(each.astype(np.float32, order="C")), block_size) for each in (x, matrix))
    if parameters.zero_points is not None and site.form is not WeightForm.QDQ:
        weight -= torch.from_numpy(parameters.zero_points[channels, :, None])
    sums = torch.bmm(blocks.transpose(0, 1), weight.permute(1, 2, 0)).double()
    if site.form is not WeightForm.QDQ:
        sums *= torch.from_numpy(parameters.scales[channels].T.astype(np.float64))[:, None, :]
    y: Float64[np.ndarray, "T n"] = sums.sum(dim=0).numpy()
    return y
