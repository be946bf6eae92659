"""Computed tables hold the stored numbers, and ONNX Runtime has computed them when it is loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import RemoveUnusedNodesPass

from export.forms.rotary import ComputedTable, compute_rotary_tables
from export.graph_edit import GraphEditor
from export.verify.rotary import measure_computed
from stages.errors import GraphError
from stages.quantization.weights.rotary import TOLERANCE, find_rotary_tables
from tests.support.rotary import Tables, built_tables, lookup_of_tables

POSITIONS = 2048
FREQUENCIES = 1.0 / 1e4 ** (torch.arange(0, 32, 2).float() / 32)


def computed(model: ir.Model) -> tuple[ComputedTable, ...]:
    tables = compute_rotary_tables(GraphEditor.of(model), model)
    RemoveUnusedNodesPass()(model)
    return tables


def optimized(model: ir.Model, folder: Path) -> tuple[ort.InferenceSession, onnx.ModelProto]:
    """Return a session, and the graph that it runs."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session, onnx.load(folder / "optimized.onnx")


@pytest.mark.parametrize("magnitude", [1.0, 1.19])
def test_the_runtime_computes_them_once_when_it_loads_the_graph(tmp_path: Path, magnitude: float) -> None:
    tables = built_tables(POSITIONS, FREQUENCIES, magnitude), built_tables(512, FREQUENCIES / 3, 1.0)
    model = lookup_of_tables(*tables).model()
    assert len(computed(model)) == 4
    assert not {"cos", "sin", "cos_2", "sin_2"} & set(model.graph.initializers)
    session, graph = optimized(model, tmp_path)
    assert [node.op_type for node in graph.graph.node] == ["Gather"] * 4
    rows = session.run(None, {"input_ids": np.arange(512)})
    for found, stored in zip(rows, (table for pair in tables for table in pair), strict=True):
        assert np.abs(found - stored[:512]).max() <= TOLERANCE * magnitude


def test_the_forecast_is_close_to_what_is_saved(tmp_path: Path) -> None:
    graph = lookup_of_tables(built_tables(POSITIONS, FREQUENCIES, 1.19))
    before, model = graph.model(), graph.model()
    (pair,) = find_rotary_tables(before)
    computed(model)
    saved = len(ir.to_proto(before).SerializeToString()) - len(ir.to_proto(model).SerializeToString())
    assert pair.saved_bytes <= saved < pair.saved_bytes + 4096


def branch(name: str, tables: Tables) -> onnx.GraphProto:
    """Return a subgraph as the builder writes longrope: two Constants are its outputs."""
    names = [f"{name}_{kind}" for kind in ("cos", "sin")]
    nodes = [
        helper.make_node("Constant", [], [each], name=f"{each}/Constant", value=numpy_helper.from_array(table))
        for each, table in zip(names, tables, strict=True)
    ]
    shape = tables[0].shape
    outputs = [helper.make_tensor_value_info(each, TensorProto.FLOAT, shape) for each in names]
    return helper.make_graph(nodes, name, [], outputs)


def test_tables_in_the_branches_of_an_if_are_computed_too(tmp_path: Path) -> None:
    small, large = built_tables(512, FREQUENCIES, 1.0), built_tables(POSITIONS, FREQUENCIES / 8, 1.19)
    graph = lookup_of_tables()
    graph.input("long", TensorProto.BOOL, [])
    graph.nodes.append(
        helper.make_node(
            "If",
            ["long"],
            ["c", "s"],
            name="If",
            then_branch=branch("large", large),
            else_branch=branch("small", small),
        )
    )
    for kind in ("c", "s"):
        graph.node("Gather", [kind, "input_ids"], [f"rows_{kind}"])
        graph.output(f"rows_{kind}", TensorProto.FLOAT, ["length", len(FREQUENCIES)])
    model = graph.model()
    assert len(computed(model)) == 4
    session, written = optimized(model, tmp_path)
    branches = [attribute.g for node in written.graph.node if node.op_type == "If" for attribute in node.attribute]
    assert [list(each.node) for each in branches] == [[], []]
    for long, pair in ((False, small), (True, large)):
        rows = session.run(None, {"input_ids": np.arange(512), "long": np.array(long)})
        for found, stored in zip(rows, pair, strict=True):
            assert np.abs(found - stored[:512]).max() <= 1.19 * TOLERANCE


def test_other_numbers_in_the_saved_graph_are_noticed(tmp_path: Path) -> None:
    model = lookup_of_tables(built_tables(POSITIONS, FREQUENCIES, 1.0)).model()
    tables = computed(model)
    nodes = {output.name: node for node in model.graph for output in node.outputs}
    for table in tables:
        assert measure_computed(tmp_path, model.graph, nodes[table.output], table).error <= TOLERANCE
    value = model.graph.initializers["cos/angles/frequencies"]
    value.const_value = ir.tensor(np.nextafter(FREQUENCIES.numpy(), np.float32(1)))
    with pytest.raises(GraphError, match=r"computes 'sin' .* away .*--rotary_tables stored"):
        measure_computed(tmp_path, model.graph, nodes[tables[1].output], tables[1])
