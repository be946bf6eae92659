"""``--target`` through the whole command on builder-made models: the table, the warnings, the graph, the side files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from stages.commands.parsing import parse_target
from tests.pipelines.test_both_stages import _generate, _logits
from tests.support.commands import Commands
from tests.support.written import fused_sites

TOKENS = np.arange(40).reshape(1, 40) * 7 % 300
EXPAND = "session.qdq_matmulnbits_block_size"
AS_THEY_ARE = ("--lm_head", "none", "--embedding", "none")


def _quantize(commands: Commands, model: Path, output: Path, *arguments: object) -> str:
    code, printed = commands.quantize(
        "--onnx_path", model, "--output_path", output, "--algo", "rtn_dq", "--verbose", *arguments
    )
    assert code == 0, printed
    return printed


def _warnings(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("warning:")]


def _graph(folder: Path) -> ir.Graph:
    return ir.load(folder / "model.onnx").graph


def _recipe(output: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads(
        output.with_name(f"{output.name}.weights").joinpath("recipe.json").read_text()
    )
    return content


def _session_options(folder: Path) -> dict[str, object]:
    content = json.loads((folder / "genai_config.json").read_text())
    options: dict[str, object] = content["model"]["decoder"]["session_options"]
    return options


def _dequantizers(graph: ir.Graph) -> Iterator[ir.Node]:
    return (node for node in graph.all_nodes() if node.op_type == "DequantizeLinear")


def _codes(node: ir.Node) -> ir.TensorProtocol:
    assert node.inputs[0] is not None
    tensor = node.inputs[0].const_value
    assert tensor is not None
    return tensor


def _scales(node: ir.Node) -> np.ndarray:
    """Return the stored scales, which a Cast may widen."""
    scales = node.inputs[1]
    assert scales is not None
    maker = scales.producer()
    stored = scales if maker is None else maker.inputs[0]
    assert stored is not None
    assert stored.const_value is not None
    return stored.const_value.numpy()


def test_by_default_a_base_for_the_cpu_becomes_as_small_as_the_cpu_runs_it_fast(
    tiny_model: Path, tmp_path: Path, commands: Commands
) -> None:
    output = tmp_path / "int4"
    printed = _quantize(commands, tiny_model, output, "--target", "auto", "--enable_mixed_quant")
    target = parse_target("cpu").label
    assert f"target {target} (installed here): the base's genai_config.json names no provider" in printed
    assert _warnings(printed) == []
    assert fused_sites(output) == (11, 11)
    formats = f"INT4 block 32 with zero point, INT8 at 3 sites, embedding INT8 block 128 for {target}"
    assert _recipe(output)["summary"] == f"rtn_dq {formats}"
    graph = _graph(output)
    kinds = {
        (_codes(node).dtype, len(node.inputs), node.attributes.get_int("block_size", 0))
        for node in _dequantizers(graph)
    }
    assert kinds == {(ir.DataType.UINT4, 3, 32), (ir.DataType.UINT8, 3, 128)}
    assert [node.op_type for node in graph if "Gather" in node.op_type and "embed" in node.name] == [
        "GatherBlockQuantized"
    ]
    assert len(_generate(output)) == 24
    assert _session_options(output) == _session_options(tiny_model)
    base = _logits(tiny_model, TOKENS)
    # Weight error of a few percent a layer, as without a target.
    assert np.linalg.norm(_logits(output, TOKENS) - base) / np.linalg.norm(base) < 0.4


def test_int8_per_channel_for_cpu_ships_the_session_key_that_onnx_runtime_obeys(
    tiny_model: Path, tmp_path: Path, commands: Commands
) -> None:
    output, optimized = tmp_path / "int4", tmp_path / "optimized.onnx"
    arguments = ["--target", "cpu", "--layers_8bit", "down_proj", "--int8_block_size", "channel"]
    printed = _quantize(commands, tiny_model, output, *arguments, *AS_THEY_ARE)
    assert _warnings(printed) == []
    assert fused_sites(output) == (10, 10)
    assert _session_options(output)[EXPAND] == "128"
    options = ort.SessionOptions()
    options.add_session_config_entry(EXPAND, str(_session_options(output)[EXPAND]))
    options.optimized_model_filepath = str(optimized)
    options.log_severity_level = 3
    ort.InferenceSession(str(output / "model.onnx"), options, providers=["CPUExecutionProvider"])
    fused = [node for node in ir.load(optimized).graph.all_nodes() if node.op_type == "MatMulNBits"]
    assert {node.attributes.get_int("block_size") for node in fused if node.attributes.get_int("bits") == 8} == {128}
    # onnxruntime-genai passes keys on that it does not know itself.
    assert len(_generate(output)) == 24
    code, printed = commands.export(
        "--onnx_path", tiny_model, "--weights_path", tmp_path / "int4.weights", "--output_path", tmp_path / "again"
    )
    assert code == 0, printed
    assert _session_options(tmp_path / "again") == _session_options(output)


@pytest.mark.slow
def test_a_cpu_that_fuses_no_float16_gets_matmul_nbits_at_level_4(
    tiny_model_dml: Path, tmp_path: Path, commands: Commands
) -> None:
    output = tmp_path / "int4"
    arguments = ["--target", "cpu@1.24.1", "--enable_mixed_quant", *AS_THEY_ARE]
    printed = _quantize(commands, tiny_model_dml, output, *arguments)
    assert "formats for cpu@1.24" in printed
    assert _warnings(printed) == []
    assert "fuses no DequantizeLinear with 8-bit codes or float16 scales" in printed
    recipe = _recipe(output)
    assert recipe["weight_form"] == "matmul_nbits"
    assert recipe["session_options"] == [["session.qdq_matmulnbits_accuracy_level", "4"]]
    assert fused_sites(output) == (14, 14)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dq", "gather_block_quantized"])
def test_trt_rtx_gets_signed_int4_without_zero_point_and_int8_per_channel(
    form: str, tiny_model_dml: Path, tmp_path: Path, commands: Commands
) -> None:
    output = tmp_path / "int4"
    arguments = ["--target", "trt-rtx", "--enable_mixed_quant", "--block_size", 64, "--lm_head", "none"]
    printed = _quantize(commands, tiny_model_dml, output, *arguments)
    assert ["rows of 96" in line for line in _warnings(printed)] == [True]
    graph = _graph(output)
    found = {ir.DataType.INT4: 0, ir.DataType.INT8: 0}
    for node in _dequantizers(graph):
        found[_codes(node).dtype] += 1
        assert len(node.inputs) == 2, "a zero point"
        assert (_scales(node) > 0).all()
        assert _scales(node).dtype == np.float16
        blocks = {"axis": 0, "block_size": 64} if _codes(node).dtype == ir.DataType.INT4 else {"axis": 1}
        assert {name: node.attributes.get_int(name) for name in node.attributes} == blocks
    assert found == {ir.DataType.INT4: 12, ir.DataType.INT8: 2}
    assert sum(node.op_type == "Gather" and node.inputs[0].is_initializer() for node in graph) >= 1
    code, printed = commands.quantize(
        "--onnx_path", tiny_model_dml, "--output_path", tmp_path / "asked", "--algo", "rtn_dq", *arguments,
        "--use_zero_point", "--gather_quantize_axis", 1, "--gather_form", form,
    )  # fmt: skip
    assert code == 0, printed
    warnings = _warnings(printed)
    assert len(warnings) == 3
    assert "no zero point" in warnings[1]
    assert ("GatherBlockQuantized" in warnings[2]) == (form != "dq")
    operators = {node.op_type for node in _graph(tmp_path / "asked")}
    assert ("GatherBlockQuantized" in operators) == (form != "dq")


@pytest.mark.slow
def test_dml_leaves_the_sites_of_the_mixed_rule_and_stores_named_ones_as_int8_with_a_warning(
    tiny_model_dml: Path, tmp_path: Path, commands: Commands
) -> None:
    mixed, named = tmp_path / "mixed", tmp_path / "named"
    printed = _quantize(commands, tiny_model_dml, mixed, "--enable_mixed_quant", "--target", "auto")
    assert (
        f"target {parse_target('dml').label} (installed here): the base's genai_config.json names the provider dml"
        in printed
    )
    assert "DirectML has no GatherBlockQuantized: 0.0 MB stay in floating point" in printed
    assert ["stay in floating point" in line for line in _warnings(printed)] == [True]
    assert "2 x --enable_mixed_quant: DirectML has no 8-bit weights" in printed
    assert fused_sites(mixed) == (13, 13)
    assert {_codes(node).dtype for node in _dequantizers(_graph(mixed))} == {ir.DataType.INT4}
    printed = _quantize(commands, tiny_model_dml, named, "--target", "dml", "--layers_8bit", "down_proj", *AS_THEY_ARE)
    assert ["no 8-bit weights" in line for line in _warnings(printed)] == [True]
    kinds = [_codes(node).dtype for node in _dequantizers(_graph(named))]
    assert (kinds.count(ir.DataType.INT8), kinds.count(ir.DataType.INT4)) == (2, 12)


@pytest.mark.slow
def test_cuda_gets_blocks_of_32_and_matmul_nbits_where_int8_comes_in(
    tiny_model_dml: Path, tmp_path: Path, commands: Commands
) -> None:
    plain, mixed = tmp_path / "plain", tmp_path / "mixed"
    arguments = ["--target", "cuda", "--lm_head", "none"]
    printed = _quantize(commands, tiny_model_dml, plain, *arguments, "--gather_quantize_axis", 1)
    assert _warnings(printed) == []
    assert {node.attributes.get_int("block_size") for node in _dequantizers(_graph(plain))} == {32}
    assert fused_sites(plain) == (14, 14)
    printed = _quantize(commands, tiny_model_dml, mixed, *arguments, "--enable_mixed_quant")
    assert _warnings(printed) == []
    assert (_recipe(plain)["weight_form"], _recipe(mixed)["weight_form"]) == ("dq", "matmul_nbits")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cpu", "cuda", "dml", "trt-rtx", "webgpu", "qnn"])
def test_no_target_gets_a_form_that_is_never_fused(
    target: str, tiny_model: Path, tmp_path: Path, commands: Commands
) -> None:
    output = tmp_path / "int4"
    _quantize(commands, tiny_model, output, "--target", target, "--verify", "off", *AS_THEY_ARE)
    model = ir.load(output / "model.onnx")
    assert model.opset_imports[""] >= 21
    for node in _dequantizers(model.graph):
        assert [reader.op_type for reader in node.outputs[0].consumers()] == ["MatMul"]
        assert node.attributes.get_int("block_size") in (32, 64, 128)
        assert _scales(node).ndim == 2
        assert _scales(node).dtype == (np.float16 if target == "cpu" else np.float32)


def test_another_target_is_another_run(tiny_model: Path, tmp_path: Path, commands: Commands) -> None:
    weights = ["--weights_path", tmp_path / "weights", "--verify", "off"]
    _quantize(commands, tiny_model, tmp_path / "first", "--target", "cpu", *weights)
    arguments = ["--onnx_path", tiny_model, "--output_path", tmp_path / "second", "--algo", "rtn_dq", *weights]
    code, printed = commands.quantize(*arguments, "--target", "cuda")
    assert code == 2
    assert f"for {parse_target('cpu').label}" in printed
    assert commands.quantize(*arguments, "--target", "cuda", "--overwrite")[0] == 0


def test_for_any_runtime_only_what_is_slow_is_said_of_formats(
    tiny_model: Path, tmp_path: Path, commands: Commands
) -> None:
    arguments = ["--target", "any", "--use_column_major", "--verify", "off"]
    printed = _quantize(commands, tiny_model, tmp_path / "int4", *arguments)
    assert "formats for" not in printed
    assert ["--use_column_major" in line for line in _warnings(printed)] == [True]
    assert _recipe(tmp_path / "int4")["summary"] == "rtn_dq INT4 block 128 without zero point"
