"""--weight_operator through the whole command: the same logits in both forms, generation, levels, refusals."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tests.pipelines.test_both_stages import _generate, _logits
from tests.support.commands import Commands
from tests.support.written import fused_sites

TOKENS = np.arange(40).reshape(1, 40) * 7 % 300


def operators(folder: Path) -> Counter[str]:
    return Counter(node.op_type for node in ir.load(folder / "model.onnx").graph.all_nodes())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "sites"),
    [
        ([], 10),
        pytest.param(["--use_zero_point"], 10, marks=pytest.mark.thorough),
        pytest.param(["--enable_mixed_quant"], 10, marks=pytest.mark.thorough),
        (["--layers_8bit", "layers.1", "--lm_head", 8, "--use_zero_point"], 11),
        pytest.param(
            ["--layers_8bit", "down_proj", "--int8_block_size", 16, "--lm_head", 4], 11, marks=pytest.mark.thorough
        ),
        pytest.param(["--awqlite_disable_fuse_nodes"], 10, marks=pytest.mark.thorough),
    ],
)
def test_both_forms_compute_the_same(
    arguments: list[object], sites: int, tiny_model: Path, tiny_cache: Path, tmp_path: Path, commands: Commands
) -> None:
    logits = {}
    for form in ("dq", "matmul_nbits"):
        code, printed = commands.quantize(
            "--onnx_path", tiny_model, "--output_path", tmp_path / form, "--cache_dir", tiny_cache, "--block_size", 16,
            "--weight_operator", form, "--accuracy_level", 1, "--algo", "awq_lite", *arguments,
        )  # fmt: skip
        assert code == 0, printed
        assert fused_sites(tmp_path / form) == (sites, sites)
        logits[form] = _logits(tmp_path / form, TOKENS)
    # The same codes and scales; float32 sums over blocks of another size where a scale per channel was repeated.
    np.testing.assert_allclose(logits["matmul_nbits"], logits["dq"], atol=1e-5 * np.abs(logits["dq"]).max())
    counts = operators(tmp_path / "matmul_nbits")
    assert (counts["MatMulNBits"], counts["DequantizeLinear"]) == (sites, 0)
    assert operators(tmp_path / "dq")["DequantizeLinear"] == sites
    assert _generate(tmp_path / "matmul_nbits") == _generate(tmp_path / "dq")


@pytest.mark.slow
def test_float16_with_separate_projections(tiny_model_dml: Path, tmp_path: Path, commands: Commands) -> None:
    logits = {}
    for form in ("dq", "matmul_nbits"):
        code, printed = commands.quantize(
            "--onnx_path", tiny_model_dml, "--output_path", tmp_path / form, "--algo", "rtn_dq", "--block_size", 32,
            "--weight_operator", form, "--accuracy_level", 1,
        )  # fmt: skip
        assert code == 0, printed
        assert fused_sites(tmp_path / form) == (14, 14)
        logits[form] = _logits(tmp_path / form, TOKENS)
    # Float16 activations, 2^-11 a rounding, and sums in another order before it.
    np.testing.assert_allclose(logits["matmul_nbits"], logits["dq"], atol=2e-3 * np.abs(logits["dq"]).max())


@pytest.mark.parametrize("level", [None, 4])
def test_the_accuracy_level_goes_into_the_nodes_not_into_the_session(
    level: int | None, tiny_model: Path, tmp_path: Path, commands: Commands
) -> None:
    arguments = [] if level is None else ["--accuracy_level", level]
    code, printed = commands.quantize(
        "--onnx_path", tiny_model, "--output_path", tmp_path / "out", "--algo", "rtn_dq", "--block_size", 16,
        "--weight_operator", "matmul_nbits", *arguments,
    )  # fmt: skip
    assert code == 0, printed
    nodes = [node for node in ir.load(tmp_path / "out" / "model.onnx").graph if node.op_type == "MatMulNBits"]
    assert {node.attributes.get_int("accuracy_level", -1) for node in nodes} == {-1 if level is None else level}
    assert "accuracy_level" not in json.dumps(json.loads((tmp_path / "out" / "genai_config.json").read_text()))


@pytest.mark.parametrize("arguments", [["--algo", "rtn"], ["--use_column_major"]])
def test_forms_that_exclude_each_other_are_refused(
    arguments: list[str], tiny_model: Path, tmp_path: Path, commands: Commands
) -> None:
    code, printed = commands.quantize(
        "--onnx_path", tiny_model, "--output_path", tmp_path / "out", "--weight_operator", "matmul_nbits", *arguments
    )
    assert (code, printed.count("\n")) == (2, 1)
    assert "--weight_operator matmul_nbits" in printed
    assert not (tmp_path / "out").exists()
