"""Each condition of ONNX Runtime's fusion has its reason, and what this machine's runtime does agrees."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto

from export.rewrite import rewrite
from export.run import export_model
from export.save import Destination
from export.summary import export_table
from export.verify import fusion
from export.verify.alike import form_of
from export.verify.fusion import CannotRun, nodes_run_as_matmulnbits, run_one_token, why_not_fused
from stages.errors import GraphError
from stages.model.directory import ModelDirectory, locate_model
from stages.records.formats import PerBlock, PerChannel, QuantSpec
from tests.export.builders import exact_weight, site_of, spec_of, store_of_each
from tests.export.exports import options, tiny_export
from tests.support.commands import Commands
from tests.support.graphs import MICROSOFT, TinyGraph

NOW, BEFORE = (1, 31), (1, 24)
UNKNOWN = "doesn't know"


def node_behind(op_types: list[str], *, readers: int = 1, gemm: dict[str, float] | None = None) -> ir.Node:
    """Return a MatMul (or Gemm) whose weight comes through nodes of ``op_types``."""
    value = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT))
    for op_type in op_types:
        value = ir.node(op_type, [value]).outputs[0]
    nodes = [
        ir.node("MatMul" if gemm is None else "Gemm", [ir.Value(name="x"), value], attributes=gemm or {})
        for _ in range(readers)
    ]
    return nodes[0]


def test_a_profile_that_a_full_disk_cut_short_is_no_proof(tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text('[{"cat": "Node", "na')
    with pytest.raises(OSError, match="the disk is full"):
        fusion._matmulnbits_in(profile, "CPUExecutionProvider")


PLAIN = ["DequantizeLinear"]


@pytest.mark.parametrize(
    ("spec", "version", "reason"),
    [
        (spec_of(4), NOW, UNKNOWN),
        (spec_of(4), BEFORE, UNKNOWN),
        (spec_of(8), NOW, UNKNOWN),
        (spec_of(8), BEFORE, "8-bit codes"),
        (spec_of(4, scale_dtype="float16"), BEFORE, "float16 scales"),
        (spec_of(4, scale_dtype="float16"), NOW, UNKNOWN),
        (spec_of(4, granularity=PerChannel()), BEFORE, "per channel"),
        (spec_of(4, granularity=PerChannel()), NOW, UNKNOWN),
        (spec_of(4, scale_dtype="bfloat16"), NOW, "bfloat16"),
        (spec_of(4, granularity=PerBlock(block_size=8)), NOW, "block size 8"),
        (spec_of(4, granularity=PerBlock(block_size=48)), NOW, "block size 48"),
        (spec_of(4, granularity=PerBlock(block_size=512)), NOW, "block size 512"),
    ],
)
def test_formats_that_are_not_fused(spec: QuantSpec, version: tuple[int, int], reason: str) -> None:
    assert reason in why_not_fused(node_behind(PLAIN), spec, version)


@pytest.mark.parametrize(
    ("node", "version", "reason"),
    [
        (node_behind(["DequantizeLinear", "Transpose"]), NOW, "column-major"),
        (node_behind(PLAIN, readers=2), NOW, "same DequantizeLinear"),
        (node_behind([]), NOW, "no DequantizeLinear"),
        (node_behind(["DequantizeLinear", "Cast"]), NOW, "comes from Cast"),
        (node_behind(PLAIN, gemm={"transB": 1}), NOW, "Gemm scales or transposes"),
        (node_behind(PLAIN, gemm={"beta": 0.5}), NOW, "Gemm scales or transposes"),
        (node_behind(PLAIN, gemm={"transB": 0}), BEFORE, "first to fuse Gemm"),
        (node_behind(PLAIN, gemm={"transB": 0}), NOW, UNKNOWN),
    ],
)
def test_graphs_that_are_not_fused(node: ir.Node, version: tuple[int, int], reason: str) -> None:
    assert reason in why_not_fused(node, spec_of(4), version)


@pytest.mark.parametrize(("block_size", "fused"), [(8, 0), (16, 1), (48, 0)])
def test_the_profile_shows_what_ran_fused(tmp_path: Path, block_size: int, fused: int) -> None:
    rng = np.random.default_rng(0)
    site = site_of("y", "h", 64, 32)
    weight = exact_weight(site, spec_of(4, granularity=PerBlock(block_size=block_size)), rng)
    graph = TinyGraph()
    graph.input("input_ids", TensorProto.INT64, ["batch", "length"])
    graph.node("Gather", [graph.constant("table", np.ones((4, 64), np.float32)), "input_ids"], ["h"])
    graph.linear("h", weight.matrix, "y")
    graph.output("y", TensorProto.FLOAT, ["batch", "length", 32])
    result = rewrite(graph.model(), store_of_each(tmp_path / "weights", weight))
    path = tmp_path / "model.onnx"
    ir.save(result.model, path)
    base = ModelDirectory(folder=tmp_path, onnx_file=path, has_genai_config=False)
    assert nodes_run_as_matmulnbits(path, frozenset({"y"}), base) == ({"y/MatMul"} if fused else frozenset())


@pytest.mark.parametrize(
    ("kind", "weights", "reason"),
    [
        (TensorProto.STRING, 4, "its inputs can't be made here: .*pixels"),
        (TensorProto.FLOAT, 4, "it can't be run with zeros for pixels"),
        (TensorProto.FLOAT, 1, None),
    ],
)
def test_inputs_that_no_decoder_has_are_no_fault_of_the_export(
    kind: int, weights: int, reason: str | None, tmp_path: Path
) -> None:
    graph = TinyGraph()
    graph.input("pixels", kind, [1, "anything"])
    if kind == TensorProto.FLOAT:
        graph.node("MatMul", ["pixels", graph.constant("weight", np.ones((weights, 2), np.float32))], ["y"])
    else:
        graph.node("Identity", ["pixels"], ["y"])
    graph.output("y", kind, [1, "columns"])
    path = graph.save(tmp_path)
    base = ModelDirectory(folder=tmp_path, onnx_file=path, has_genai_config=False)
    with nullcontext() if reason is None else pytest.raises(CannotRun, match=reason):
        assert nodes_run_as_matmulnbits(path, frozenset({"y"}), base) == frozenset()


def _stops_at_one_token(folder: Path, *, at_all: bool) -> Path:
    """Return a model that fits 7 tokens only, or any number of them."""
    graph = TinyGraph()
    graph.input("input_ids", TensorProto.INT64, ["batch", "length"])
    graph.node("Gather", [graph.constant("table", np.ones((8, 16), np.float32)), "input_ids"], ["h"])
    shape = graph.constant("shape", np.array([-1, 7, 16] if at_all else [0, 0, 16]))
    graph.linear(graph.node("Reshape", ["h", shape], ["x"]), np.ones((16, 16), np.float32), "y")
    graph.output("y", TensorProto.FLOAT, None)
    return graph.save(folder)


@pytest.mark.parametrize("base_stops", [True, False])
def test_a_model_that_stops_is_at_fault_only_where_the_base_runs(tmp_path: Path, base_stops: bool) -> None:
    path = _stops_at_one_token(tmp_path / "output", at_all=True)
    base = locate_model(_stops_at_one_token(tmp_path / "base", at_all=base_stops))
    error, words = (CannotRun, "the base itself") if base_stops else (GraphError, "the exported model")
    with pytest.raises(error, match=words):
        run_one_token(path, frozenset({"y"}), base)


@pytest.mark.parametrize(("operator", "opset"), [("BiasSplitGelu", 21), ("Opset", onnx.defs.onnx_opset_version())])
def test_what_could_not_be_checked_is_said_and_the_model_is_kept(
    operator: str, opset: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No provider here has the operator, and no ONNX Runtime the newest opset."""
    graph = TinyGraph(opset=opset)
    graph.input("input_ids", TensorProto.INT64, ["batch", "length"])
    graph.node("Gather", [graph.constant("table", np.ones((8, 16), np.float32)), "input_ids"], ["h"])
    weight = exact_weight(site_of("y", "h", 16, 64), spec_of(4), np.random.default_rng(0))
    graph.linear("h", weight.matrix, "y")
    if operator == "BiasSplitGelu":
        graph.node(operator, ["y", graph.constant("b", np.ones(64, np.float32))], ["z"], None, MICROSOFT)
    else:
        graph.node("Relu", ["y"], ["z"])
    graph.output("z", TensorProto.FLOAT, None)
    base = locate_model(graph.save(tmp_path / "base"))
    store = store_of_each(tmp_path / "weights", weight)
    summary = export_model(base, store, Destination.from_path(tmp_path / "out", base, overwrite=False), options())
    assert summary.onnx_file.is_file()
    assert summary.report is not None
    assert summary.report.fused is None
    assert ("not checked", summary.report.skipped[0]) in export_table(summary).facts
    assert operator in caplog.text
    assert summary.report.worst_exact is not None


def test_no_profile_is_left_in_the_output(tmp_path: Path) -> None:
    tiny = tiny_export(tmp_path)
    tiny.run(options("quick"))
    assert not [path for path in tiny.output.iterdir() if "profile" in path.name]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tiny_model", "tiny_model_dml", "tiny_model_bf16"])
def test_the_same_nodes_fuse_in_partitions(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: Commands
) -> None:
    base, output = request.getfixturevalue(kind), tmp_path / "int4"
    code, printed = commands.quantize(
        "--onnx_path", base, "--output_path", output, "--algo", "rtn_dq", "--block_size", 16, "--verify", "off"
    )
    assert code == 0, printed
    directory = locate_model(output)
    matmuls = [node for node in ir.load(directory.onnx_file).graph if node.op_type in ("MatMul", "MatMulNBits")]
    sites = frozenset(str(node.outputs[0].name) for node in matmuls if "lm_head" not in str(node.name))
    whole = nodes_run_as_matmulnbits(directory.onnx_file, sites, directory)
    monkeypatch.setattr(fusion, "_PARTITION_BYTES", 1)
    runs = list[Any]()
    monkeypatch.setattr(fusion, "form_of", lambda graph: runs.append(graph))
    assert nodes_run_as_matmulnbits(directory.onnx_file, sites, directory) == whole
    monkeypatch.setattr(fusion, "form_of", form_of)
    monkeypatch.setattr(fusion, "_run_partition", counted := Mock(wraps=fusion._run_partition))
    assert nodes_run_as_matmulnbits(directory.onnx_file, sites, directory) == whole
    assert counted.call_count < len(runs) or kind != "tiny_model", "layers that are alike run once"
    assert len(whole) == len(sites)
