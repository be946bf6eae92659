"""Models of every kind: base models, ours in each form, and those of other quantizers."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

from stages.inspect.model import ModelReport, report_model
from stages.model.directory import locate_model
from tests.support.commands import Commands
from tests.support.graphs import TinyGraph, tiny_decoder

SITES = 10
"""MatMuls of the tiny model's two layers: qkv, o, gate, up and down."""
WEIGHTS = 2 * (64 * 128 + 64 * 64 + 3 * 64 * 96)
"""Numbers in them."""
BLOCK = 16


def report(folder: Path) -> ModelReport:
    return report_model(locate_model(folder))


def decoder(dtype: np.dtype) -> TinyGraph:
    rng = np.random.default_rng(0)
    up, down = (rng.standard_normal(shape).astype(dtype) for shape in ((64, 96), (96, 64)))
    return tiny_decoder(up, down, rng)


def runtimes_with_warnings(found: ModelReport) -> set[str]:
    return {answer.runtime.partition("@")[0] for answer in found.runtimes if answer.objections}


def fused_by_newest(found: ModelReport) -> list[bool]:
    return [group.spans[-1].fused for group in found.fused_on]


def test_a_base_model_holds_nothing_quantized(tiny_model: Path) -> None:
    found = report(tiny_model)
    assert (found.quantized, found.fused_on, found.input_scales, found.runtimes) == ((), (), (), ())
    assert found.open is not None
    assert (found.open.matmuls, found.open.weights) == (SITES + 1, WEIGHTS + 64 * 300)
    assert {(each.reader, each.bytes) for each in found.left} >= {("Gather", 4 * 300 * 64), ("MatMul", 4 * 300 * 64)}
    assert sum(each.bytes for each in found.left if each.reader == "MatMul") == 4 * found.open.weights
    (data,) = found.files.data
    assert sum(each.bytes for each in found.left) == data.referenced_bytes == data.file_bytes
    assert found.configuration.present
    assert (found.configuration.layers, found.configuration.conflicts) == (2, ())


@pytest.mark.parametrize(
    ("dtype", "name"), [(np.float32, "FLOAT"), (np.float16, "FLOAT16"), (ml_dtypes.bfloat16, "BFLOAT16")]
)
def test_a_base_model_of_any_float_type(dtype: type, name: str, tmp_path: Path) -> None:
    decoder(np.dtype(dtype)).save(tmp_path)
    found = report(tmp_path)
    assert found.quantized == ()
    assert {each.type for each in found.left} == {name}
    assert found.open is not None
    # gate, up and down; the head reads the embedding through a Transpose.
    assert found.open.weights == 3 * 64 * 96 + 64 * 32
    assert not found.configuration.present
    assert found.configuration.tokenizer == ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a quantized site of ours looks like."""

    operators: tuple[str, ...] = ("DequantizeLinear", "MatMul")
    codes: str = "INT4"
    grouping: str = "block"
    zero_point: bool = False
    bits: float = 4 + 32 / BLOCK
    """A weight's, with its part of the scale and zero point."""
    fused: tuple[bool, ...] = (True,)
    """By the newest release, for each group of sites that releases treat the same way."""


FORMS: dict[str, tuple[tuple[object, ...], Expected]] = {
    "dq": ((), Expected()),
    "zero points": (("--use_zero_point",), Expected(codes="UINT4", zero_point=True, bits=4 + 36 / BLOCK)),
    "column-major": (
        ("--use_column_major",),
        Expected(operators=("DequantizeLinear", "Transpose", "MatMul"), fused=(False,)),
    ),
    "matmul_nbits": (
        ("--weight_operator", "matmul_nbits"),
        Expected(operators=("MatMulNBits",), codes="4 bits", fused=()),
    ),
    "INT8 blocks": (
        ("--layers_8bit", "layers.0,layers.1", "--int8_block_size", BLOCK),
        Expected(codes="INT8", bits=8 + 32 / BLOCK),
    ),
    "INT8 per channel, column-major": (
        ("--layers_8bit", "layers.0,layers.1", "--int8_block_size", "channel", "--use_column_major"),
        Expected(
            operators=("DequantizeLinear", "Transpose", "MatMul"),
            codes="INT8",
            grouping="channel",
            bits=8 + 32 * 2 * (128 + 64 + 96 + 96 + 64) / WEIGHTS,
        ),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_ours_in_each_form(form: str, tiny_model: Path, tmp_path: Path, commands: Commands) -> None:
    options, expected = FORMS[form]
    given = ["--onnx_path", tiny_model, "--output_path", tmp_path / "int4", "--algo", "rtn_dq", "--verify", "off"]
    code, printed = commands.quantize(*given, "--block_size", BLOCK, *options)
    assert code == 0, printed
    found = report(tmp_path / "int4")
    assert len(found.quantized) == SITES
    for weight in found.quantized:
        assert weight.operators == expected.operators
        assert (weight.codes, weight.grouping, weight.zero_point) == (
            expected.codes, expected.grouping, expected.zero_point,
        )  # fmt: skip
        assert weight.block_size == (BLOCK if expected.grouping == "block" else None)
        assert (weight.scales, weight.activations) == ("FLOAT", "float")
    assert {weight.shape for weight in found.quantized} == {(64, 128), (64, 64), (64, 96), (96, 64)}
    assert sum(weight.weights for weight in found.quantized) == WEIGHTS
    assert 8 * found.quantized_bytes / WEIGHTS == pytest.approx(expected.bits)
    assert found.open is not None
    assert found.open.matmuls == 1
    assert fused_by_newest(found) == list(expected.fused)
    assert [name for group in found.fused_on for name in group.sites] == (
        [weight.node for weight in found.quantized] if expected.fused else []
    )
    (data,) = found.files.data
    # Small tensors are in the .onnx file.
    tensors = found.quantized_bytes + sum(each.bytes for each in found.left)
    assert 0 <= tensors - data.referenced_bytes < found.files.onnx_bytes
    assert "cpu" not in runtimes_with_warnings(found) or "column-major" in form


@pytest.mark.parametrize(
    ("form", "operators", "unfit"),
    [
        ("gather_block_quantized", ("GatherBlockQuantized",), {"dml", "trt-rtx", "webgpu", "qnn"}),
        ("dq", ("DequantizeLinear", "Gather"), {"trt-rtx", "webgpu", "qnn"}),
    ],
)
def test_a_quantized_embedding(
    form: str, operators: tuple[str, ...], unfit: set[str], tiny_model: Path, tmp_path: Path, commands: Commands
) -> None:
    given = ["--onnx_path", tiny_model, "--output_path", tmp_path / "int4", "--algo", "rtn_dq", "--verify", "off"]
    given += ["--block_size", BLOCK, "--gather_quantize_axis", 1, "--gather_block_size", 32, "--gather_form", form]
    assert commands.quantize(*given)[0] == 0
    found = report(tmp_path / "int4")
    (table,) = [weight for weight in found.quantized if weight.node == "/model/embed_tokens/Gather"]
    assert table.operators == operators
    assert (table.shape, table.bits, table.block_size) == ((300, 64), 4, 32)
    assert table.bytes == 300 * 64 // 2 + 4 * 300 * 64 // 32
    assert "Gather" not in {each.reader for each in found.left}
    # A table is looked up, so it has no part in fusion.
    assert sum(len(group.sites) for group in found.fused_on) == SITES
    assert runtimes_with_warnings(found) == unfit


def test_matmul_nbits_by_onnx_runtimes_quantizer(tmp_path: Path) -> None:
    config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=False, accuracy_level=4)
    quantizer = MatMulNBitsQuantizer(decoder(np.dtype(np.float32)).proto(), algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(tmp_path / "model.onnx"))
    found = report(tmp_path)
    assert [weight.shape for weight in found.quantized] == [(64, 96), (64, 96), (96, 64)]
    for weight in found.quantized:
        assert weight.operators == ("MatMulNBits",)
        assert (weight.bits, weight.block_size, weight.zero_point, weight.accuracy_level) == (4, 32, True, 4)
        blocks, rows = weight.shape[0] // 32, weight.shape[1]
        # Zero points are packed in pairs, row by row.
        assert weight.bytes == weight.weights // 2 + rows * (4 * blocks + (blocks + 1) // 2)
    assert found.fused_on == ()
    assert "cpu" not in runtimes_with_warnings(found)


def test_settings_that_the_graph_contradicts_are_found(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    file = folder / "genai_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["model"]["vocab_size"] = 999
    config["model"]["decoder"] |= {"num_hidden_layers": 1, "num_key_value_heads": 3}
    config["model"]["decoder"]["inputs"]["input_ids"] = "tokens"
    file.write_text(json.dumps(config), encoding="utf-8")
    found = report(folder).configuration
    assert [sum(word in each for each in found.conflicts) for word in (
        "vocab_size is 999", "num_hidden_layers is 1", "num_key_value_heads is 3", "'tokens'",
    )] == [1, 1, 1, 1]  # fmt: skip
    assert len(found.conflicts) == 4


def test_a_model_without_weights_that_can_be_quantized(tmp_path: Path) -> None:
    graph = TinyGraph()
    graph.input("x", 1, [2, 2])
    graph.node("Relu", ["x"], ["y"])
    graph.output("y", 1, [2, 2])
    graph.save(tmp_path)
    found = report(tmp_path)
    assert (found.open, found.left, found.quantized) == (None, (), ())
