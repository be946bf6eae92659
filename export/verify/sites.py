"""Check one saved weight: its numbers against the store, and its product on ONNX Runtime against float64 arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
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
from stages.records.results import SiteError

Matrix = np.ndarray[tuple[int, int], np.dtype[Any]]
_TOKENS = 8
_ROWS = 256


def check_stored_site(node: ir.Node, site: RewrittenSite) -> None:
    """Raise GraphError unless saved codes equal the store's, and scales too after the one rounding of a fold."""
    weight, divisor = site.source.read(), site.source.row_divisor
    matrix = dequantized(weight, divisor) if site.form is WeightForm.QDQ else weight.codes
    _check_equal(site, site.weight, _stored_matrix(node, site), matrix)
    scales = divided_scales(weight.scales, divisor)
    wanted = scales if site.steps is None else in_bytes(scales).scales
    _check_equal(site, site.scales, _stored_scales(node, site), wanted)
    found = _stored_zero_points(node, site)
    if weight.zero_points is not None:
        assert found is not None
        assert site.zero_points is not None
        _check_equal(site, site.zero_points, found, weight.zero_points)


def measure_site(folder: Path, node: ir.Node, site: RewrittenSite) -> SiteError:
    """Measure the errors of a saved weight's product, at accuracy level 1 and at the runtime's default.

    Args:
        folder: holds the saved data file.
        node: the saved MatMul, Gemm or MatMulNBits.
        site: what was written there.

    Raises:
        GraphError: ONNX Runtime refuses the weight.
    """
    source = site.source
    x = np.random.default_rng(0).standard_normal((_TOKENS, source.site.in_features))
    x = x.astype(FLOAT_TYPES[source.site.dtype].numpy)
    reference = _reference(x.astype(np.float64), node, site)
    exact, default = (
        relative_error(run_isolated(_isolated(node, site, level), x, folder, level), reference) for level in (1, None)
    )
    return SiteError(site=source.site.name, exact=exact, default=default)


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


def _check_equal(site: RewrittenSite, name: str, found: np.ndarray, expected: Shaped[Tensor, "N columns"]) -> None:
    wanted = expected.float().t().numpy()
    if site.form is WeightForm.MATMUL_NBITS and len(wanted) == 1:
        # One scale per channel stands in every block.
        wanted = np.broadcast_to(wanted, found.shape)
    if not np.array_equal(found.astype(np.float32), wanted):
        raise GraphError(
            f"What was saved as '{name}' differs from the quantized weight of '{site.source.site.name}'; check the "
            "disk and export again."
        )


# --------------------------------------------------------------------------- float64 arithmetic on the saved numbers


def _reference(x: Float64[np.ndarray, "T K"], node: ir.Node, site: RewrittenSite) -> Float64[np.ndarray, "T N"]:
    """Return x @ W with W = (code - zero_point) * scale from the file, a few rows at a time: memory stays small."""
    y = np.zeros((x.shape[0], site.source.site.out_features))
    for rows, weight in _dequantized_rows(node, site):
        y += x[:, rows] @ weight
    return y


def _dequantized_rows(node: ir.Node, site: RewrittenSite) -> Iterator[tuple[slice, Float64[np.ndarray, "rows N"]]]:
    matrix, scales = _stored_matrix(node, site), _stored_scales(node, site)
    zero_points = _stored_zero_points(node, site)
    for start in range(0, len(matrix), _ROWS):
        rows = slice(start, min(start + _ROWS, len(matrix)))
        weight = matrix[rows].astype(np.float64)
        if site.form is not WeightForm.QDQ:
            blocks = np.arange(rows.start, rows.stop) // _block_size(site)
            if zero_points is not None:
                weight -= zero_points[blocks].astype(np.float64)
            weight *= scales[blocks].astype(np.float64)
        yield rows, weight


# --------------------------------------------------------------------------- numbers as the file has them


def _stored_matrix(node: ir.Node, site: RewrittenSite) -> Matrix:
    """Return [K, N]: codes as the store has them, or the floating-point weight of the QDQ form."""
    source, found = site.source, read_initializer(node, site.weight)
    if site.form is WeightForm.MATMUL_NBITS:
        return unpacked_codes(found, source.site, source.spec).T
    return _inputs_first(found, site, source.site.in_features)


def _stored_scales(node: ir.Node, site: RewrittenSite) -> Matrix:
    """Return [nB, N], one row for each ``_block_size`` inputs."""
    scales = _inputs_first(read_initializer(node, site.scales), site, _num_blocks(site))
    if site.steps is None:
        return scales
    wide: Matrix = scales.astype(np.float32) * read_initializer(node, site.steps).reshape(1, -1)
    return wide


def _stored_zero_points(node: ir.Node, site: RewrittenSite) -> Matrix | None:
    """Return [nB, N], or None where no zero point is stored."""
    if site.zero_points is None:
        return None
    found = read_initializer(node, site.zero_points)
    if site.form is WeightForm.MATMUL_NBITS:
        return unpacked_zero_points(found, site.source.site, site.source.spec).T
    return _inputs_first(found, site, _num_blocks(site))


def _block_size(site: RewrittenSite) -> int:
    """Return how many inputs share one of the saved scales."""
    source = site.source
    if site.form is WeightForm.MATMUL_NBITS:
        return stored_block_size(source.site, source.spec)
    return source.spec.block_size(source.site.in_features)


def _num_blocks(site: RewrittenSite) -> int:
    return -(-site.source.site.in_features // _block_size(site))


def _inputs_first(stored: np.ndarray, site: RewrittenSite, rows: int) -> Matrix:
    if site.form in (WeightForm.DQ_COLUMN_MAJOR, WeightForm.MATMUL_NBITS):
        return stored.reshape(-1, rows).T
    return stored.reshape(rows, -1)
