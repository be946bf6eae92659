"""Run one saved weight alone and compare its product with float64 arithmetic on the saved numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from jaxtyping import Float, Float64

from export.forms.dequantize_linear import RewrittenSite
from export.forms.matmul_nbits import stored_block_size, unpacked_codes, unpacked_zero_points
from export.save import read_initializer
from stages.commands.options import AccuracyLevel
from stages.records.formats import FLOAT_TYPES, WeightForm, onnx_float
from stages.records.results import SiteError
from stages.runtime.providers import CPU_ONLY
from stages.runtime.session import SessionSettings, open_session
from stages.runtime.upcast import runnable_graph

Matrix = np.ndarray[tuple[int, int], np.dtype[Any]]


def stored_width(site: RewrittenSite) -> int:
    """Inputs that share one of the stored scales."""
    source = site.source
    if site.form is WeightForm.MATMUL_NBITS:
        return stored_block_size(source.site, source.spec)
    return source.spec.block_size(source.site.in_features)


def stored_matrix(node: ir.Node, site: RewrittenSite) -> Matrix:
    """[K, N]: codes as the store has them, or the floating-point weight of the QDQ form."""
    source, found = site.source, read_initializer(node, site.weight)
    if site.form is WeightForm.MATMUL_NBITS:
        return unpacked_codes(found, source.site, source.spec).T
    return _inputs_first(found, site, source.site.in_features)


def stored_scales(node: ir.Node, site: RewrittenSite) -> Matrix:
    """[nB, N], one row for each ``stored_width`` inputs."""
    return _inputs_first(read_initializer(node, site.scales), site, _num_blocks(site))


def stored_zero_points(node: ir.Node, site: RewrittenSite) -> Matrix | None:
    """[nB, N], or None where no zero point is stored."""
    if site.zero_points is None:
        return None
    found = read_initializer(node, site.zero_points)
    if site.form is WeightForm.MATMUL_NBITS:
        return unpacked_zero_points(found, site.source.site, site.source.spec).T
    return _inputs_first(found, site, _num_blocks(site))


def _num_blocks(site: RewrittenSite) -> int:
    return -(-site.source.site.in_features // stored_width(site))


def _inputs_first(stored: np.ndarray, site: RewrittenSite, rows: int) -> Matrix:
    if site.form in (WeightForm.DQ_COLUMN_MAJOR, WeightForm.MATMUL_NBITS):
        return stored.reshape(-1, rows).T
    return stored.reshape(rows, -1)


_TOKENS = 8


_ROWS = 256


def measure_site(folder: Path, node: ir.Node, site: RewrittenSite) -> SiteError:
    """Errors of ``node``'s saved weight, read from the data file in ``folder``.

    Raises:
        GraphError: ONNX Runtime refuses the weight.
    """
    source = site.source
    x = np.random.default_rng(0).standard_normal((_TOKENS, source.site.in_features))
    x = x.astype(FLOAT_TYPES[source.spec.scale_dtype].numpy)
    reference = _reference(x.astype(np.float64), node, site)
    exact, default = (_relative_error(_product(folder, node, site, x, level), reference) for level in (1, None))
    return SiteError(site=source.site.name, exact=exact, default=default)


def _product(
    folder: Path, node: ir.Node, site: RewrittenSite, x: Float[np.ndarray, "T K"], level: AccuracyLevel | None
) -> Float[np.ndarray, "T N"]:
    with runnable_graph(_MatMulAlone(node, site, level).build(), CPU_ONLY, folder) as graph:
        widened = isinstance(graph, Path)
        settings = SessionSettings(external_data_folder=None if widened else folder, accuracy_level=level)
        product: np.ndarray = open_session(graph, settings).run(None, {"x": x.astype(np.float32) if widened else x})[0]
        return product


def _relative_error(y: Float[np.ndarray, "T N"], reference: Float64[np.ndarray, "T N"]) -> float:
    size = float(np.abs(reference).max())
    return float(np.abs(y.astype(np.float64) - reference).max()) / (size or 1.0)


# --------------------------------------------------------------------------- the model of one site


@dataclass(frozen=True, slots=True)
class _MatMulAlone:
    """x [8, K] -> MatMul behind the node's own [QuantizeLinear and] DequantizeLinear, or the MatMulNBits that it is."""

    node: ir.Node
    site: RewrittenSite
    level: AccuracyLevel | None
    """For MatMulNBits, which session options don't reach; None: as the node says."""
    _values: dict[str, ir.Value] = field(default_factory=dict)
    _nodes: list[ir.Node] = field(default_factory=list)

    def build(self) -> ir.Model:
        """The model, whose initializers still point into the data file."""
        site, dtype = self.site.source.site, onnx_float(self.site.source.spec.scale_dtype)
        x = ir.Value(name="x", shape=ir.Shape((_TOKENS, site.in_features)), type=ir.TensorType(dtype))
        y = ir.Value(name="y", shape=ir.Shape((_TOKENS, site.out_features)), type=ir.TensorType(dtype))
        self._nodes.append(self._multiply(x, y))
        initializers = [value for value in self._values.values() if value.const_value is not None]
        assert self.node.graph is not None
        graph = ir.Graph(
            [x],
            [y],
            nodes=self._nodes,
            initializers=initializers,
            opset_imports=self.node.graph.opset_imports,
            name="site",
        )
        return ir.Model(graph, ir_version=10)

    def _multiply(self, x: ir.Value, y: ir.Value) -> ir.Node:
        weights = [self._copy(value) for value in self.node.inputs[1:] if value is not None]
        if self.site.form is not WeightForm.MATMUL_NBITS:
            return ir.node("MatMul", [x, weights[0]], outputs=[y], name="MatMul")
        attributes = dict(self.node.attributes)
        if self.level is not None:
            attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", self.level)
        return ir.Node(self.node.domain, self.node.op_type, [x, *weights], list(attributes.values()), outputs=[y])

    def _copy(self, value: ir.Value) -> ir.Value:
        name = str(value.name)
        if name not in self._values:
            self._values[name] = copied = ir.Value(
                name=name, shape=value.shape, type=value.type, const_value=value.const_value
            )
            maker = value.producer()
            if maker is not None:
                self._copy_node(maker, copied)
        return self._values[name]

    def _copy_node(self, node: ir.Node, output: ir.Value) -> None:
        inputs = [None if value is None else self._copy(value) for value in node.inputs]
        attributes = list(node.attributes.values())
        self._nodes.append(ir.Node(node.domain, node.op_type, inputs, attributes, outputs=[output], name=node.name))


# --------------------------------------------------------------------------- float64 arithmetic on the saved numbers


def _reference(x: Float64[np.ndarray, "T K"], node: ir.Node, site: RewrittenSite) -> Float64[np.ndarray, "T N"]:
    """x @ W with W = (code - zero_point) * scale from the file, a few rows at a time: memory stays small."""
    y = np.zeros((x.shape[0], site.source.site.out_features))
    for rows, weight in _dequantized_rows(node, site):
        y += x[:, rows] @ weight
    return y


def _dequantized_rows(node: ir.Node, site: RewrittenSite) -> Iterator[tuple[slice, Float64[np.ndarray, "rows N"]]]:
    matrix, scales, zero_points = stored_matrix(node, site), stored_scales(node, site), stored_zero_points(node, site)
    for start in range(0, len(matrix), _ROWS):
        rows = slice(start, min(start + _ROWS, len(matrix)))
        weight = matrix[rows].astype(np.float64)
        if site.form is not WeightForm.QDQ:
            blocks = np.arange(rows.start, rows.stop) // stored_width(site)
            if zero_points is not None:
                weight -= zero_points[blocks].astype(np.float64)
            weight *= scales[blocks].astype(np.float64)
        yield rows, weight
