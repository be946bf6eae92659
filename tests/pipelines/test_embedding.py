"""Embeddings through the whole command on builder-made models, untied and tied: run, generate, resume, export again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import stages.quantization.run
from tests.pipelines.test_both_stages import _generate, _logits
from tests.support.commands import Commands
from tests.support.tiny_models import build_genai_model, save_tiny_llama

pytestmark = pytest.mark.slow

TOKENS = np.arange(40).reshape(1, 40) * 7 % 300


@pytest.fixture(scope="session")
def tied_hf(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("tied-hf")
    save_tiny_llama(folder, tiny_tokenizer, tied=True)
    return folder


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory: pytest.TempPathFactory, tied_hf: Path) -> Path:
    """One initializer for lm_head and, through a Transpose, the embedding; fp32 for the CPU."""
    folder = tmp_path_factory.mktemp("models") / "tied"
    build_genai_model(tied_hf, folder, "fp32", "cpu")
    return folder


@pytest.fixture(scope="session")
def tied_model_fp16(tmp_path_factory: pytest.TempPathFactory, tied_hf: Path) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tied-dml"
    build_genai_model(tied_hf, folder, "fp16", "dml")
    return folder


def quantize(commands: Commands, model: Path, output: Path, *arguments: object) -> str:
    code, printed = commands.quantize(
        "--onnx_path", model, "--output_path", output, "--algo", "rtn_dq", "--block_size", 16, *arguments
    )
    assert code == 0, printed
    return printed


def data_bytes(folder: Path) -> int:
    return (folder / "model.onnx.data").stat().st_size


def distance(found: np.ndarray, base: np.ndarray) -> float:
    return float(np.linalg.norm(found - base) / np.linalg.norm(base))


@pytest.mark.parametrize("form", ["gather_block_quantized", "dq"])
@pytest.mark.parametrize("axis", [0, 1])
def test_an_untied_embedding_shrinks_and_the_model_generates(
    form: str, axis: int, tiny_model: Path, tmp_path: Path, commands: Commands
) -> None:
    plain, output = tmp_path / "plain", tmp_path / "int4"
    quantize(commands, tiny_model, plain)
    printed = quantize(commands, tiny_model, output, "--gather_quantize_axis", axis, "--gather_form", form)
    assert "INT4, 0.1 MB -> 0.0 MB" in printed
    assert "lookup error" in printed
    assert ("dequantizes this whole table" in printed) == (form == "dq")
    # 300 x 64 float32 numbers become codes and a scale for each 32 (axis 0 fills up its last block of tokens).
    saved = 300 * 64 * 4 - 300 * 32 - (300 * 2 if axis == 1 else 10 * 64) * 4
    assert data_bytes(plain) - data_bytes(output) == saved
    base = _logits(tiny_model, TOKENS)
    # Five percent of weight error a layer, as without the embedding's; a wrong row gives more than 1.
    assert distance(_logits(output, TOKENS), base) < 0.4
    assert len(_generate(output)) == 24


@pytest.mark.parametrize("model", ["tied_model", "tied_model_fp16"])
def test_a_tied_head_keeps_the_original_until_it_is_quantized_too(
    model: str, tmp_path: Path, commands: Commands, request: pytest.FixtureRequest
) -> None:
    source: Path = request.getfixturevalue(model)
    original = ir.load(source / "model.onnx").graph.initializers["lm_head.MatMul.weight"].const_value
    assert original is not None
    base = _logits(source, TOKENS)
    kept, both = tmp_path / "kept", tmp_path / "both"
    printed = quantize(commands, source, kept, "--gather_quantize_axis", 1)
    assert "stays because /lm_head/MatMul reads it too" in printed
    found = ir.load(kept / "model.onnx").graph.initializers["lm_head.MatMul.weight"].const_value
    assert found is not None
    assert found.tobytes() == original.tobytes()
    printed = quantize(commands, source, both, "--gather_quantize_axis", 1, "--lm_head", 4)
    assert "stays because" not in printed
    assert "lm_head.MatMul.weight" not in ir.load(both / "model.onnx").graph.initializers
    for output in (kept, both):
        assert distance(_logits(output, TOKENS), base) < 0.4
        assert {node.op_type for node in ir.load(output / "model.onnx").graph} >= {"GatherBlockQuantized"}
    assert data_bytes(both) < data_bytes(kept) - original.nbytes / 2


def test_a_tied_model_generates(tied_model: Path, tmp_path: Path, commands: Commands) -> None:
    quantize(commands, tied_model, tmp_path / "int4", "--gather_quantize_axis", 1, "--lm_head", 8)
    assert len(_generate(tmp_path / "int4")) == 24


def test_a_stopped_run_rounds_only_what_is_missing_and_other_options_are_refused(
    tiny_model: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    quantize(commands, tiny_model, whole, "--gather_quantize_axis", 1)
    arguments = ["--onnx_path", tiny_model, "--output_path", resumed, "--algo", "rtn_dq", "--block_size", 16]
    original = stages.quantization.run.quantize_table

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages.quantization.run, "quantize_table", stopped)
    assert commands.quantize(*arguments, "--gather_quantize_axis", 1)[0] == 130
    weights = tmp_path / "resumed.weights"
    assert not list(weights.glob("embedding.*"))
    code, printed = commands.export("--onnx_path", tiny_model, "--weights_path", weights, "--output_path", resumed)
    assert code == 2
    assert "lacks the quantized embedding" in printed

    code, printed = commands.quantize(*arguments, "--gather_quantize_axis", 1, "--gather_block_size", 64)
    assert code == 2
    assert "embedding INT4 block 32" in printed

    monkeypatch.setattr(stages.quantization.run, "quantize_table", original)
    monkeypatch.setattr(stages.quantization.run.GroupSolver, "solve_posed", lambda *_: pytest.fail("searched again"))
    assert commands.quantize(*arguments, "--gather_quantize_axis", 1)[0] == 0
    monkeypatch.setattr(stages.quantization.run, "quantize_table", lambda *_: pytest.fail("rounded again"))
    assert commands.quantize(*arguments, "--gather_quantize_axis", 1, "--overwrite")[0] == 0
    for name in ("model.onnx", "model.onnx.data"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()
