"""Run one saved weight alone and compare its product with float64 arithmetic on the saved numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
from jaxtyping import Float, Float64

from export.data_file import read_initializer
from export.qdq import RewrittenSite, float_type
from stages.records import FloatName, WeightForm
from stages.session import SessionSettings, open_session

_TOKENS = 8
_ROWS = 256
_NUMPY_FLOATS: dict[FloatName, np.dtype[np.generic]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteError:
    """max |y - y_ref| / max |y_ref| over 8 random tokens, at accuracy level 1 and at the runtime's default level."""

    site: str
    exact: float
    default: float


def measure_site(folder: Path, node: ir.Node, site: RewrittenSite) -> SiteError:
    """Errors of ``node``'s saved weight, read from the data file in ``folder``.

    Raises:
        GraphError: ONNX Runtime refuses the weight.
    """
    source = site.source
    x = np.random.default_rng(0).standard_normal((_TOKENS, source.site.in_features))
    x = x.astype(_NUMPY_FLOATS[source.spec.scale_dtype])
    model = ir.to_proto(_MatMulAlone(node, site).build()).SerializeToString()
    reference = _reference(x.astype(np.float64), node, site)
    levels: list[int | None] = [1, None]
    errors = []
    for level in levels:
        session = open_session(model, SessionSettings(external_data_folder=folder, accuracy_level=level))
        errors.append(_relative_error(session.run(None, {"x": x})[0], reference))
    return SiteError(site=source.site.name, exact=errors[0], default=errors[1])


def _relative_error(y: Float[np.ndarray, "T N"], reference: Float64[np.ndarray, "T N"]) -> float:
    size = float(np.abs(reference).max())
    return float(np.abs(y.astype(np.float64) - reference).max()) / (size or 1.0)


# --------------------------------------------------------------------------- the model of one site


@dataclass(frozen=True, slots=True)
class _MatMulAlone:
    """x [8, K] -> MatMul with the node's own [QuantizeLinear and] DequantizeLinear and initializers."""

    node: ir.Node
    site: RewrittenSite
    _values: dict[str, ir.Value] = field(default_factory=dict)
    _nodes: list[ir.Node] = field(default_factory=list)

    def build(self) -> ir.Model:
        """The model, whose initializers still point into the data file."""
        site, dtype = self.site.source.site, float_type(self.site.source.spec.scale_dtype)
        x = ir.Value(name="x", shape=ir.Shape((_TOKENS, site.in_features)), type=ir.TensorType(dtype))
        y = ir.Value(name="y", shape=ir.Shape((_TOKENS, site.out_features)), type=ir.TensorType(dtype))
        weight = self.node.inputs[1]
        assert weight is not None
        self._nodes.append(ir.node("MatMul", [x, self._copy(weight)], outputs=[y], name="MatMul"))
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
    source = site.source
    in_features = source.site.in_features
    per_block = (source.spec.num_blocks(in_features), source.site.out_features)
    matrix = _inputs_first(node, site, site.weight, (in_features, source.site.out_features))
    scales = _inputs_first(node, site, site.scales, per_block)
    zero_points = None if site.zero_points is None else _inputs_first(node, site, site.zero_points, per_block)
    for start in range(0, in_features, _ROWS):
        rows = slice(start, min(start + _ROWS, in_features))
        weight = matrix[rows].astype(np.float64)
        if site.form is not WeightForm.QDQ:
            blocks = np.arange(rows.start, rows.stop) // source.spec.block_size(in_features)
            if zero_points is not None:
                weight -= zero_points[blocks].astype(np.float64)
            weight *= scales[blocks].astype(np.float64)
        yield rows, weight


def _inputs_first(node: ir.Node, site: RewrittenSite, name: str, shape: tuple[int, int]) -> np.ndarray:
    """An initializer as [K or nB, N], whatever the form that it is stored in."""
    stored = read_initializer(node, name)
    if site.form is WeightForm.DQ_COLUMN_MAJOR:
        return stored.reshape(shape[::-1]).T
    return stored.reshape(shape)
