"""Graphs are alike where ONNX Runtime can't tell them apart but by names and numbers of weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from export.verify.alike import form_of


def layer(prefix: str, seed: int, *, steps: int = 2, axis: int = 0, width: int = 64, swapped: bool = False) -> ir.Graph:
    """Return Concat(x @ weight, x) behind a Reshape by a small constant."""
    x = ir.Value(name=f"{prefix}.x", shape=ir.Shape(("t", width)), type=ir.TensorType(ir.DataType.FLOAT))
    weight = np.random.default_rng(seed).standard_normal((width, width)).astype(np.float32)
    constants = {f"{prefix}.w": weight, f"{prefix}.shape": np.array([steps, -1], np.int64)}
    values = {
        name: ir.Value(name=name, shape=ir.Shape(array.shape), const_value=ir.tensor(array, name=name))
        for name, array in constants.items()
    }
    product = ir.node("MatMul", [x, values[f"{prefix}.w"]], name=f"{prefix}/MatMul")
    pair = [x, product.outputs[0]] if swapped else [product.outputs[0], x]
    joined = ir.node("Concat", pair, attributes={"axis": axis}, name=f"{prefix}/Concat")
    shaped = ir.node("Reshape", [joined.outputs[0], values[f"{prefix}.shape"]], name=f"{prefix}/Reshape")
    return ir.Graph(
        [x],
        shaped.outputs,
        nodes=[product, joined, shaped],
        initializers=list(values.values()),
        opset_imports={"": 21},
    )


def test_names_and_numbers_of_weights_make_no_difference() -> None:
    assert form_of(layer("layers.0", 0)) == form_of(layer("layers.1", 1))


@pytest.mark.parametrize(
    "other",
    [
        lambda: layer("b", 0, steps=4),
        lambda: layer("b", 0, axis=1),
        lambda: layer("b", 0, width=128),
        lambda: layer("b", 0, swapped=True),
    ],
    ids=["constant", "attribute", "shape", "wiring"],
)
def test_all_else_makes_one(other: Callable[[], ir.Graph]) -> None:
    assert form_of(layer("a", 0)) != form_of(other())


def test_an_output_more_makes_one() -> None:
    graph = layer("a", 0)
    graph.outputs.append(graph[0].outputs[0])
    assert form_of(graph) != form_of(layer("a", 0))


def test_graphs_inside_are_not_compared() -> None:
    graph, inner = layer("a", 0), layer("inner", 0)
    graph.append(ir.node("If", [graph.inputs[0]], attributes={"then_branch": inner, "else_branch": layer("b", 0)}))
    assert form_of(graph) is None
