"""Check one saved weight: its numbers against the store, and its product on ONNX Runtime against float64 arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from jaxtyping import Float64, Shaped
from torch import Tensor

from export.forms.dequantize_linear import RewrittenSite, dequantized, divided_scales
from export.forms.matmul_nbits import stored_block_size, unpacked_codes, unpacked_zero_points
from export.save import read_initializer
from export.verify.isolated import IsolatedModel, relative_error, run_isolated
from stages.commands.options import AccuracyLevel
from stages.errors import GraphError
from stages.quantization.weights.byte_scales import in_bytes
from stages.records.formats import FLOAT_TYPES, WeightForm, onnx_float
from stages.records.results import QuantizedWeight

Matrix = np.ndarray[tuple[int, int], np.dtype[Any]]
_TOKENS = 8
_NUMBERS = 1 << 19
"""Of a weight that are looked at together: a few megabytes in any type."""


def check_site(
    folder: Path, node: ir.Node, site: RewrittenSite, levels: Sequence[AccuracyLevel | None]
) -> tuple[float, ...]:
    """Check a saved weight, which is read once, a few output channels at a time.

    Args:
        folder: holds the saved data file.
        node: the saved MatMul, Gemm or MatMulNBits.
        site: what was written there.
        levels: accuracy levels of the products that are measured; None: the runtime's default.

    Returns:
        max |y - y_ref| / max |y_ref| over 8 random tokens, at each level.

    Raises:
        GraphError: saved codes differ from the store's, or scales after the one rounding of a fold; or ONNX Runtime
            refuses the weight.
    """
    source = site.source
    x = np.random.default_rng(0).standard_normal((_TOKENS, source.site.in_features))
    x = x.astype(FLOAT_TYPES[source.site.dtype].numpy)
    reference = np.empty((_TOKENS, source.site.out_features))
    weight = source.read()
    for saved in _saved_channels(node, site):
        _check_equal(saved, weight, site)
        if levels:
            reference[:, saved.channels] = _product(x, saved, site)
    products = (run_isolated(_isolated(node, site, level), x, folder, level) for level in levels)
    return tuple(relative_error(product, reference) for product in products)


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
class _Channels:
    """What the file has for n of a weight's output channels."""

    channels: slice
    matrix: Matrix
    """[n, K]: codes as the store has them, or the floating-point weight of the QDQ form."""
    scales: Matrix
    """[n, nB], one for each ``_block_size`` inputs."""
    zero_points: Matrix | None
    """[n, nB], or None where none is stored."""


def _saved_channels(node: ir.Node, site: RewrittenSite) -> Iterator[_Channels]:
    """Yield a saved weight, as much of it at a time as a processor's cache holds."""
    source, packed = site.source, site.form is WeightForm.MATMUL_NBITS
    in_features, num_blocks = source.site.in_features, -(-source.site.in_features // _block_size(site))
    matrix = read_initializer(node, site.weight)
    if not packed:
        matrix = _outputs_first(matrix, site, in_features)
    scales = _outputs_first(read_initializer(node, site.scales), site, num_blocks)
    if site.steps is not None:
        scales = scales.astype(np.float32) * read_initializer(node, site.steps).reshape(-1, 1)
    zero_points = None if site.zero_points is None else read_initializer(node, site.zero_points)
    if zero_points is not None and packed:
        zero_points = unpacked_zero_points(zero_points, source.site, source.spec)
    elif zero_points is not None:
        zero_points = _outputs_first(zero_points, site, num_blocks)
    for start in range(0, source.site.out_features, step := max(1, _NUMBERS // in_features)):
        channels = slice(start, start + step)
        yield _Channels(
            channels=channels,
            matrix=unpacked_codes(matrix[channels], source.site, source.spec) if packed else matrix[channels],
            scales=scales[channels],
            zero_points=None if zero_points is None else zero_points[channels],
        )


def _outputs_first(saved: np.ndarray, site: RewrittenSite, columns: int) -> Matrix:
    """Return [N, columns], a view."""
    if site.form in (WeightForm.DQ_COLUMN_MAJOR, WeightForm.MATMUL_NBITS):
        return saved.reshape(-1, columns)
    return saved.reshape(columns, -1).T


def _block_size(site: RewrittenSite) -> int:
    """Return how many inputs share one of the saved scales."""
    source = site.source
    if site.form is WeightForm.MATMUL_NBITS:
        return stored_block_size(source.site, source.spec)
    return source.spec.block_size(source.site.in_features)


# --------------------------------------------------------------------------- what they have to be


def _check_equal(saved: _Channels, weight: QuantizedWeight, site: RewrittenSite) -> None:
    channels, divisor = saved.channels, site.source.row_divisor
    wanted = replace(
        weight,
        codes=weight.codes[channels],
        scales=weight.scales[channels],
        zero_points=None if weight.zero_points is None else weight.zero_points[channels],
    )
    divisor = None if divisor is None else divisor[channels]
    matrix = dequantized(wanted, divisor) if site.form is WeightForm.QDQ else wanted.codes
    _refuse_other(saved.matrix, matrix, site.weight, site)
    scales = divided_scales(wanted.scales, divisor)
    if site.steps is not None:
        scales = in_bytes(scales).scales
    # MatMulNBits has what a channel shares in every block.
    _refuse_other(saved.scales, scales.expand(saved.scales.shape), site.scales, site)
    if wanted.zero_points is not None:
        assert saved.zero_points is not None
        assert site.zero_points is not None
        zero_points = wanted.zero_points.expand(saved.zero_points.shape)
        _refuse_other(saved.zero_points, zero_points, site.zero_points, site)


def _refuse_other(found: Matrix, expected: Shaped[Tensor, "n columns"], name: str, site: RewrittenSite) -> None:
    if not np.array_equal(found.astype(np.float32), expected.float().numpy()):
        raise GraphError(
            f"What was saved as '{name}' differs from the quantized weight of '{site.source.site.name}'; check the "
            "disk and export again."
        )


def _product(x: Matrix, saved: _Channels, site: RewrittenSite) -> Float64[np.ndarray, "T n"]:
    """Return x [T, K] times what the numbers stand for: within blocks in float32, their sums in float64."""
    block_size = _block_size(site)
    padding = ((0, 0), (0, -x.shape[1] % block_size))
    blocks, weight = (
        np.pad(numbers.astype(np.float32), padding).reshape(len(numbers), -1, block_size)
        for numbers in (x, saved.matrix)
    )
    if saved.zero_points is not None and site.form is not WeightForm.QDQ:
        weight -= saved.zero_points.astype(np.float32)[:, :, None]
    sums = (blocks.transpose(1, 0, 2) @ weight.transpose(1, 2, 0)).astype(np.float64)
    if site.form is not WeightForm.QDQ:
        sums *= saved.scales.T.astype(np.float64)[:, None, :]
    y: Float64[np.ndarray, "T n"] = sums.sum(axis=0)
    return y
