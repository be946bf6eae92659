"""Embeddings through the whole command on builder-made models, untied and tied: run, generate, resume, export again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import stages.quantization.run
import stages.quantize
from stages.commands.quantize_options import QuantizeConfig
from stages.model.directory import locate_model
from stages.model.sizes import TIED, size_parts
from stages.quantization.weights.store import QuantizedStore
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


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model rounded, its table as it was."""
    output = tmp_path_factory.mktemp("plain") / "plain"
    options = {"algo": "rtn_dq", "block_size": 16, "target": "any", "embedding": "none"}
    return stages.quantize.quantize(QuantizeConfig(onnx_path=tiny_model, output_path=output, **options)).folder


@pytest.mark.parametrize(
    ("form", "axis", "bits"),
    [("gather_block_quantized", 1, 8), ("gather_block_quantized", 0, 4), ("dq", 1, 4), ("dq", 0, 8)],
)
def test_an_untied_embedding_shrinks_and_the_model_generates(
    form: str, axis: int, bits: int, tiny_model: Path, plain: Path, tmp_path: Path, commands: Commands
) -> None:
    output = tmp_path / "small"
    options = ["--embedding", bits, "--gather_quantize_axis", axis, "--gather_form", form, "--gather_block_size", 32]
    printed = quantize(commands, tiny_model, output, *options)
    assert f"INT{bits} block 32, 0.1 MB -> 0.0 MB" in printed
    assert "lookups" in printed
    assert ("dequantizes this whole table" in printed) == (form == "dq")
    # 300 x 64 float32 numbers become codes and a scale for each 32 (axis 0 fills up its last block of tokens).
    saved = 300 * 64 * 4 - 300 * 64 * bits // 8 - (300 * 2 if axis == 1 else 10 * 64) * 4
    assert data_bytes(plain) - data_bytes(output) == saved
    base = _logits(tiny_model, TOKENS)
    # Five percent of weight error a layer, as without the embedding's; a wrong row gives more than 1.
    assert distance(_logits(output, TOKENS), base) < 0.4
    assert len(_generate(output)) == 24


def readers(folder: Path) -> tuple[ir.Node, ir.Node]:
    """Return the lookup and the node that makes the logits."""
    nodes = {node.name: node for node in ir.load(folder / "model.onnx").graph}
    return nodes["/model/embed_tokens/Gather"], nodes["/lm_head/MatMul"]


def stored_name(node: ir.Node, place: int) -> str | None:
    """Return the initializer that the node reads at ``place``, through a Reshape or not."""
    value = node.inputs[place]
    assert value is not None
    maker = value.producer()
    source = value if maker is None else maker.inputs[0]
    return None if source is None else source.name


def test_the_cpus_narrow_scales_of_a_shared_table_reach_both_readers(
    tied_model: Path, tmp_path: Path, commands: Commands
) -> None:
    quantize(commands, tied_model, tmp_path / "one", "--target", "cpu")
    lookup, head = readers(tmp_path / "one")
    assert stored_name(lookup, 2) == stored_name(head, 2)
    assert distance(_logits(tmp_path / "one", TOKENS), _logits(tied_model, TOKENS)) < 0.4


@pytest.mark.parametrize(
    ("model", "options", "extra"),
    [
        ("tied_model", ["--lm_head", 4, "--embedding", 4, "--use_zero_point"], 1),
        ("tied_model_fp16", ["--lm_head", 8, "--embedding", 8, "--gather_block_size", 32], 0),
    ],
)
def test_a_tied_table_is_stored_once_and_both_read_it(
    model: str, options: list[object], extra: int, tmp_path: Path, commands: Commands, request: pytest.FixtureRequest
) -> None:
    source: Path = request.getfixturevalue(model)
    one, two, again = tmp_path / "one", tmp_path / "two", tmp_path / "again"
    printed = quantize(commands, source, one, *options)
    assert "one table of 0.0 MB for it and /lm_head/MatMul" in printed
    lookup, head = readers(one)
    assert (lookup.op_type, head.op_type) == ("GatherBlockQuantized", "MatMulNBits")
    assert head.attributes["accuracy_level"].as_int() == 4
    places = [(0, 1), (2, 2), (3, 3)][: 2 + extra]
    assert all(stored_name(lookup, there) == stored_name(head, here) for there, here in places)
    assert "DequantizeLinear" in {node.op_type for node in ir.load(one / "model.onnx").graph}
    printed = quantize(commands, source, two, *options, "--share_embedding", "off")
    assert "one table" not in printed
    bits = options[1]
    assert isinstance(bits, int)
    assert data_bytes(two) - data_bytes(one) > 300 * 64 * bits // 8
    parts = {part.name: part.after for part in size_parts(locate_model(source), locate_model(one))}
    assert parts[TIED] > 300 * 64 * bits // 8
    base = _logits(source, TOKENS)
    for output in (one, two):
        assert "lm_head.MatMul.weight" not in ir.load(output / "model.onnx").graph.initializers
        assert distance(_logits(output, TOKENS), base) < 0.4
    arguments = ["--onnx_path", source, "--weights_path", tmp_path / "one.weights", "--output_path", again]
    assert commands.export(*arguments)[0] == 0
    assert (again / "model.onnx.data").read_bytes() == (one / "model.onnx.data").read_bytes()


def test_a_budget_chooses_the_format_of_a_shared_table(tied_model: Path, tmp_path: Path, commands: Commands) -> None:
    text = ["--dataset", "offline", "--calib_size", 8, "--seq_len", 64, "--cache_dir", tmp_path / "cache"]
    found = {}
    for budget in (4.5, 8.5):
        output = tmp_path / f"at{budget}"
        arguments = ["--onnx_path", tied_model, "--output_path", output, "--algo", "awq_clip", "--verify", "quick"]
        code, printed = commands.quantize(*arguments, *text, "--target_bpw", budget, "--target", "cpu")
        assert code == 0, printed
        lookup, head = readers(output)
        assert stored_name(lookup, 0) == stored_name(head, 1)
        assert stored_name(lookup, 2) == stored_name(head, 2)
        found[budget] = lookup.attributes["bits"].as_int()
    assert found == {4.5: 4, 8.5: 8}
    kept = json.loads((tmp_path / "cache" / "forecast.json").read_text(encoding="utf-8"))["losses"]
    lookups = kept["lookups of lm_head.MatMul.weight in nats"]
    # INT8 is as good as exact, INT4 is not.
    assert lookups["4b32"] > 20 * lookups["8b64"] > 0


def test_a_tied_head_that_stays_keeps_the_original(tied_model: Path, tmp_path: Path, commands: Commands) -> None:
    original = ir.load(tied_model / "model.onnx").graph.initializers["lm_head.MatMul.weight"].const_value
    assert original is not None
    printed = quantize(commands, tied_model, tmp_path / "kept", "--embedding", 4, "--lm_head", "none")
    assert "stays because /lm_head/MatMul reads it too" in printed
    found = ir.load(tmp_path / "kept" / "model.onnx").graph.initializers["lm_head.MatMul.weight"].const_value
    assert found is not None
    assert found.tobytes() == original.tobytes()


def test_a_tied_model_generates(tied_model: Path, tmp_path: Path, commands: Commands) -> None:
    quantize(commands, tied_model, tmp_path / "small", "--embedding", 8, "--lm_head", 8)
    assert len(_generate(tmp_path / "small")) == 24


def test_an_untied_model_says_why_it_cannot_share(tiny_model: Path, tmp_path: Path, commands: Commands) -> None:
    options = ["--embedding", 8, "--lm_head", 8, "--share_embedding", "on"]
    arguments = ["--onnx_path", tiny_model, "--output_path", tmp_path / "one", "--algo", "rtn_dq", *options]
    code, printed = commands.quantize(*arguments)
    assert code == 2
    assert "holds other numbers than every lm_head of the model" in printed


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
    monkeypatch.setattr(QuantizedStore, "write", lambda *_: pytest.fail("searched again"))
    assert commands.quantize(*arguments, "--gather_quantize_axis", 1)[0] == 0
    monkeypatch.setattr(stages.quantization.run, "quantize_table", lambda *_: pytest.fail("rounded again"))
    assert commands.quantize(*arguments, "--gather_quantize_axis", 1, "--overwrite")[0] == 0
    for name in ("model.onnx", "model.onnx.data"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()


@pytest.mark.thorough
def test_a_size_with_little_room_stores_a_table_of_its_own_in_int4(
    tiny_model: Path, tmp_path: Path, commands: Commands
) -> None:
    text = ["--dataset", "offline", "--calib_size", 8, "--seq_len", 64, "--cache_dir", tmp_path / "cache"]
    found = {}
    for size in ("160kB", "90kB"):
        output = tmp_path / size
        arguments = ["--onnx_path", tiny_model, "--output_path", output, "--algo", "awq_clip", "--target", "cpu"]
        code, printed = commands.quantize(*arguments, *text, "--target_size", size)
        assert code == 0, printed
        lookup, _ = readers(output)
        assert lookup.op_type == "GatherBlockQuantized"
        found[size] = lookup.attributes.get_int("bits", 4)
        assert data_bytes(output) + (output / "model.onnx").stat().st_size <= 1000 * int(size.removesuffix("kB"))
    assert found == {"160kB": 8, "90kB": 4}
