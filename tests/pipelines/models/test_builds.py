"""Graphs as onnxruntime-genai's builder writes them for each execution provider, from calibration to a checked model.

test_pipeline goes the same way for fp32 on cpu and fp16 on dml.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.pipelines.test_both_stages import _logits
from tests.support.commands import Commands
from tests.support.tiny_models import build_genai_model
from tests.support.written import fused_sites

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("execution_provider", "precision", "sites"),
    [
        # MultiHeadAttention behind nodes that repeat key/value heads; q, k and v apart.
        pytest.param("cpu", "fp16", 14, marks=pytest.mark.thorough),
        ("cuda", "fp16", 10),
        pytest.param("webgpu", "fp32", 10, marks=pytest.mark.thorough),
        # Norms written out in small nodes.
        ("NvTensorRtRtx", "fp16", 10),
    ],
)
def test_a_build_is_quantized_fused_and_folded_everywhere(
    execution_provider: str,
    precision: str,
    sites: int,
    tiny_hf: Path,
    tiny_text: Path,
    tmp_path: Path,
    commands: Commands,
) -> None:
    base, output = tmp_path / "base", tmp_path / "int4"
    build_genai_model(tiny_hf, base, precision, execution_provider)
    arguments = ["--dataset", tiny_text, "--calib_size", 12, "--seq_len", 64]
    code, printed = commands.calibrate("--onnx_path", base, *arguments)
    assert code == 0, printed
    code, printed = commands.quantize(
        "--onnx_path", base, "--output_path", output, "--block_size", 32, "--algo", "awq_lite"
    )
    assert code == 0, printed
    assert fused_sites(output) == (sites, sites)
    # A search may choose no scale; every scale that it chooses must find a place.
    assert "in norms" in printed
    assert "in value projections" in printed
    assert "as Mul nodes" not in printed
    assert "1 x --exclude lm_head: /lm_head/MatMul" in printed
    tokens = np.arange(40).reshape(1, 40) * 7 % 300
    expected, found = _logits(base, tokens), _logits(output, tokens)
    # Five percent of weight error a layer; a broken fold or transposed code gives more than 1.
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.4


def test_a_build_that_no_runtime_opens_is_refused_before_anything_is_computed(
    tiny_hf: Path, tmp_path: Path, commands: Commands
) -> None:
    """onnxruntime-genai 0.18 writes Attention without caches for fp32 on cuda, dml and NvTensorRtRtx."""
    base = tmp_path / "base"
    build_genai_model(tiny_hf, base, "fp32", "cuda")
    for command, more in (("calibrate", []), ("quantize", ["--algo", "rtn_dq", "--output_path", tmp_path / "out"])):
        code, printed = getattr(commands, command)("--onnx_path", base, *more)
        assert code == 2
        assert "no node makes its output 'present.0.key'" in printed
        assert "--precision fp16" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"base"}
