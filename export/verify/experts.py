"""Check one saved QMoE: its numbers against the store, and every expert's output against float64 arithmetic on them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
import torch
from jaxtyping import Float, Float64, Int16
from torch import Tensor

from export.forms.matmul_nbits import implied_zero_point
from export.forms.qmoe import RAW, ROUTER_WEIGHTS, ExpertTable, RewrittenExperts, unpacked_rows
from export.save import read_initializer
from export.verify.isolated import IsolatedModel, relative_error, run_isolated
from stages.errors import GraphError
from stages.model.patterns import input_of
from stages.records.formats import FLOAT_TYPES, onnx_float
from stages.records.results import ExpertsError
from stages.records.sites import FloatName
from stages.runtime.blocks.experts import activated

_TOKENS = 2
"""Tokens that each expert sees."""
_CHOSEN = 1e4
_TOLERANCE: Mapping[FloatName, float] = MappingProxyType({"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-4})
"""By type of the graph; bfloat16 runs as float32 here."""
_ROUNDED_ACTIVATIONS = 5e-2
"""INT8 in blocks has no kernel but with activations rounded to int8: 1.6e-2 was seen; a wrong expert gives 1."""


def check_stored_experts(node: ir.Node, experts: RewrittenExperts) -> None:
    """Raise GraphError unless ``node`` is QMoE and every expert's saved numbers are the store's."""
    if node.op_type != "QMoE":
        raise GraphError(f"'{experts.layer.name}' was saved as {node.op_type}, not as QMoE; export again.")
    for table in (experts.fc1, experts.fc2):
        saved = _Saved(node, table)
        for index, source in enumerate(table.sources):
            wanted = source.read()
            codes = wanted.codes.numpy().astype(np.int16) + (
                implied_zero_point(table.spec) if table.spec.symmetric else 0
            )
            same = np.array_equal(saved.codes(index), codes)
            same &= np.array_equal(saved.scales(index), wanted.scales.float().numpy())
            if wanted.zero_points is not None:
                same &= np.array_equal(saved.zero_points(index), wanted.zero_points.numpy())
            if not same:
                raise GraphError(
                    f"What was saved as '{table.codes}' differs from the quantized weight of '{source.site.name}'; "
                    "check the disk and export again."
                )


def measure_experts(folder: Path, node: ir.Node, experts: RewrittenExperts) -> ExpertsError:
    """Measure the error of every expert's output, at accuracy level 1.

    Args:
        folder: holds the saved data file.
        node: the saved QMoE.
        experts: what was written there.

    Raises:
        GraphError: ONNX Runtime refuses the node, or an expert's output isn't what its own numbers give.
    """
    layer, spec = experts.layer, experts.fc1.spec
    x = np.random.default_rng(0).standard_normal((layer.experts * _TOKENS, layer.hidden))
    x = x.astype(FLOAT_TYPES[layer.dtype].numpy)
    found = run_isolated(_isolated(node, experts), x, folder)
    fc1, fc2 = _Saved(node, experts.fc1), _Saved(node, experts.fc2)
    errors = []
    for index in range(layer.experts):
        tokens = slice(index * _TOKENS, (index + 1) * _TOKENS)
        weights = fc1.weight(index), fc2.weight(index)
        reference = _reference(node, experts, index, weights, x[tokens].astype(np.float64))
        errors.append(relative_error(found[tokens], reference))
    worst = int(np.argmax(errors))
    tolerance = _TOLERANCE[layer.dtype] if spec.bits == 4 else _ROUNDED_ACTIVATIONS
    if not errors[worst] < tolerance:
        raise GraphError(
            f"Expert {worst} of '{layer.name}' gives outputs {errors[worst]:.1e} away from its own numbers (at most "
            f"{tolerance:.0e} is rounding) on ONNX Runtime; try another version of it, or --experts none."
        )
    return ExpertsError(node=layer.name, experts=layer.experts, worst=worst, error=errors[worst])


def _isolated(node: ir.Node, experts: RewrittenExperts) -> ir.Model:
    """Return x [tokens, H] -> the node, with scores that send each token to one expert alone."""
    layer, model, graph = experts.layer, IsolatedModel(), node.graph
    assert isinstance(graph, ir.Graph)
    tokens, dtype = layer.experts * _TOKENS, onnx_float(layer.dtype)
    kind = ir.TensorType(dtype)
    x = ir.Value(name="x", shape=ir.Shape((tokens, layer.hidden)), type=kind)
    y = ir.Value(name="y", shape=ir.Shape((tokens, layer.hidden)), type=kind)
    chosen = (np.repeat(np.eye(layer.experts), _TOKENS, axis=0) * _CHOSEN).astype(FLOAT_TYPES[layer.dtype].numpy)
    scores = ir.Value(
        name="scores", shape=ir.Shape(chosen.shape), type=kind, const_value=ir.tensor(chosen, name="scores")
    )
    inputs = [None if value is None else model.copy(value) for value in node.inputs[2:ROUTER_WEIGHTS]]
    # The installed release may not know what the target's needs.
    attributes = {name: value for name, value in node.attributes.items() if name != RAW}
    for name, number in (("k", 1), ("normalize_routing_weights", 1)):
        attributes[name] = ir.AttrInt64(name, number)
    if "accuracy_level" in attributes:
        attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
    last = ir.Node(node.domain, node.op_type, [x, model.copy(scores), *inputs], list(attributes.values()), outputs=[y])
    return model.ending_in(last, x, graph)


def _reference(
    node: ir.Node,
    experts: RewrittenExperts,
    index: int,
    weights: tuple[Tensor, Tensor],
    x: Float64[np.ndarray, "T H"],
) -> Float64[np.ndarray, "T H"]:
    """Return one expert's output.

    Args:
        node: the saved QMoE.
        experts: what was written there.
        index: which expert it is.
        weights: its own two, from the file's numbers.
        x: what it reads.
    """
    fc1, fc2 = weights
    hidden = torch.from_numpy(x) @ fc1.T + _bias(node, 4, index)
    output: np.ndarray = (activated(hidden, experts.layer.activation) @ fc2.T + _bias(node, 7, index)).numpy()
    return output


def _bias(node: ir.Node, place: int, index: int) -> Tensor:
    value = input_of(node, place)
    if value is None or value.const_value is None:
        return torch.zeros(1, dtype=torch.float64)
    return torch.from_numpy(value.const_value.numpy()[index].astype(np.float64))


class _Saved:
    """The saved numbers of one projection, an expert at a time.

    Args:
        node: the saved QMoE.
        table: what was written there.
    """

    def __init__(self, node: ir.Node, table: ExpertTable) -> None:
        self._table = table
        self._codes, self._scales = read_initializer(node, table.codes), read_initializer(node, table.scales)
        self._zero_points = None if table.zero_points is None else read_initializer(node, table.zero_points)
        self._site = table.sources[0].site

    def codes(self, index: int) -> Int16[np.ndarray, "N K"]:
        """Return unsigned codes."""
        return unpacked_rows(self._codes[index], self._site.in_features, self._table.spec)

    def scales(self, index: int) -> Float[np.ndarray, "N nB"]:
        """Return scales in float32."""
        found: np.ndarray = self._scales[index].reshape(self._site.out_features, -1).astype(np.float32)
        return found

    def zero_points(self, index: int) -> Int16[np.ndarray, "N nB"]:
        """Return stored zero points, or those that the operator implies."""
        spec, site = self._table.spec, self._site
        blocks = spec.num_blocks(site.in_features)
        if self._zero_points is None:
            return np.full((site.out_features, blocks), implied_zero_point(spec), np.int16)
        stored = self._zero_points[index]
        if stored.ndim == 1:
            return unpacked_rows(stored[None], site.out_features, spec).reshape(-1, 1)
        return unpacked_rows(stored, blocks, spec)

    def weight(self, index: int) -> Tensor:
        """Return (code - zero point) * scale in float64, [N, K]."""
        width = self._table.spec.block_size(self._site.in_features)
        steps = np.repeat(self.scales(index).astype(np.float64), width, axis=1)
        centred = self.codes(index) - np.repeat(self.zero_points(index), width, axis=1)
        return torch.from_numpy(centred * steps)
