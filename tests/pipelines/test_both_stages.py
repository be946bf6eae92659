"""The whole way on a real builder-made model: calibrate, quantize, export, run, generate."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import onnxruntime_genai as og
import pytest

from stages.calibration.cache import open_cache
from stages.model.directory import locate_model
from stages.quantization.weights.store import QuantizedStore
from stages.runtime.feeds import CausalFeeds
from stages.runtime.providers import choose_providers
from stages.runtime.tap import ActivationTap
from tests.support.commands import Commands
from tests.support.written import fused_sites

ALGORITHMS = ("rtn", "rtn_dq", "awq_lite", "awq_clip", "awq_full", "awq_gptq")


@pytest.fixture(scope="session")
def cache(tiny_cache: Path) -> Path:
    return tiny_cache


def _logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    directory = locate_model(folder)
    session = ort.InferenceSession(str(directory.onnx_file), options, providers=["CPUExecutionProvider"])
    feeds = CausalFeeds.of(session, directory)
    return np.asarray(session.run(["logits"], feeds(tokens))[0], np.float32)


def _generate(folder: Path) -> list[int]:
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=24, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([0, 5, 9], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_forward_passes_equal_batches(
    batch_size: int, tiny_model: Path, tiny_text: Path, tmp_path: Path, commands: Commands, monkeypatch
) -> None:
    seen: list[int] = []
    original = ActivationTap.run

    def counted(self, tokens, carried):
        seen.append(len(tokens))
        return original(self, tokens, carried)

    monkeypatch.setattr(ActivationTap, "run", counted)
    code, printed = commands.calibrate(
        "--onnx_path", tiny_model, "--dataset", tiny_text, "--calib-size", 20, "--seq-len", 16,
        "--batch_size", batch_size, "--cache_dir", tmp_path / "cache", "--token_weights", "none",
    )  # fmt: skip
    assert code == 0, printed
    assert len(seen) == -(-18 // batch_size) + -(-2 // batch_size)
    assert sum(seen) == 20


def test_statistics_are_those_of_the_tokens_in_the_cache(cache: Path, tiny_model: Path) -> None:
    from safetensors.numpy import load_file

    from stages.model.load import fingerprint_model, load_graph
    from stages.model.sites import find_groups
    from stages.runtime.tap import open_value_tap

    directory = locate_model(tiny_model)
    model = load_graph(directory)
    groups = find_groups(model)
    activations = tuple(group.activation for group in groups)
    tap = open_value_tap(model, directory, activations, choose_providers("cpu"), {})
    tokens = load_file(cache / "tokens.safetensors")
    assert (len(tokens["calibration"]), len(tokens["held_out"])) == (18, 2)
    opened = open_cache(cache, fingerprint_model(directory))
    rows = dict(tap.run(tokens["calibration"]))
    for group in groups:
        x = rows[group.activation].reshape(-1, group.in_features).double()
        stats = opened.read(group.activation).calibration
        assert stats.gram is not None
        exact = x.T @ x / len(x)
        # float32 sums over 576 tokens; entries are at most the largest diagonal entry.
        assert float((stats.gram.double() - exact).abs().max()) < 1e-5 * float(exact.diagonal().max())


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "arguments",
    [
        [],
        pytest.param(["--use_zero_point"], marks=pytest.mark.thorough),
        pytest.param(["--scale_range", "signed"], marks=pytest.mark.thorough),
    ],
)
def test_every_algorithm_gives_a_model_that_runs_fused_and_stays_near_the_base(
    algorithm: str, arguments: list[str], tiny_model: Path, cache: Path, tmp_path: Path, commands: Commands
) -> None:
    output = tmp_path / "int4"
    code, printed = commands.quantize(
        "--onnx_path", tiny_model, "--output_path", output, "--algo", algorithm, "--block-size", 16,
        "--cache_dir", cache, "--accuracy_level", 1, *arguments,
    )  # fmt: skip
    assert code == 0, printed
    assert fused_sites(output) == (10, 10)
    tokens = np.arange(40).reshape(1, 40) * 7 % 300
    base, ours = _logits(tiny_model, tokens), _logits(output, tokens)
    # Five percent of weight error a layer; a broken fold or transposed code gives more than 1.
    assert np.linalg.norm(ours - base) / np.linalg.norm(base) < 0.4
    assert len(_generate(output)) == 24
    session = json.loads((output / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
    assert session["session.qdq_matmulnbits_accuracy_level"] == "1"


@pytest.mark.slow
def test_fp16_with_separate_projections(
    tiny_model_dml: Path, tiny_text: Path, tmp_path: Path, commands: Commands
) -> None:
    cache, output = tmp_path / "cache", tmp_path / "int4"
    code, printed = commands.calibrate(
        "--onnx_path", tiny_model_dml, "--dataset", tiny_text, "--calib_size", 12, "--seq_len", 32, "--cache_dir", cache
    )
    assert code == 0, printed
    code, printed = commands.quantize(
        "--onnx_path", tiny_model_dml, "--output_path", output, "--block_size", 32, "--cache_dir", cache
    )
    assert code == 0, printed
    assert fused_sites(output) == (14, 14)
    tokens = np.arange(40).reshape(1, 40) * 7 % 300
    base, ours = _logits(tiny_model_dml, tokens), _logits(output, tokens)
    assert np.linalg.norm(ours - base) / np.linalg.norm(base) < 0.4


@pytest.mark.slow
def test_column_major_computes_the_same_and_says_that_it_is_not_fused(
    tiny_model: Path, cache: Path, tmp_path: Path, commands: Commands
) -> None:
    arguments = ["--onnx_path", tiny_model, "--block_size", 16, "--cache_dir", cache, "--enable_mixed_quant"]
    arguments += ["--algo", "awq_lite"]
    code, printed = commands.quantize(*arguments, "--use_column_major", "--output_path", tmp_path / "columns")
    assert code == 0, printed
    assert "column-major" in printed
    assert commands.quantize(*arguments, "--output_path", tmp_path / "rows")[0] == 0
    tokens = np.arange(40).reshape(1, 40) * 7 % 300
    columns, rows = _logits(tmp_path / "columns", tokens), _logits(tmp_path / "rows", tokens)
    # The same codes and scales; only the order of float32 sums differs.
    np.testing.assert_allclose(columns, rows, atol=1e-4 * np.abs(rows).max())
    code, printed = commands.quantize(
        *arguments, "--use_column_major", "--algo", "rtn", "--output_path", tmp_path / "x"
    )
    assert (code, "--use_column_major" in printed) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "sites", "eight_bit"),
    [
        pytest.param(["--enable_mixed_quant"], 10, 2, marks=pytest.mark.thorough),
        (["--enable_mixed_quant", "--use_zero_point", "--int8_block_size", 32], 10, 2),
        pytest.param(
            ["--layers_8bit", "qkv_proj,down_proj", "--int8_block_size", 16], 10, 4, marks=pytest.mark.thorough
        ),
        (["--layers_8bit", "layers.1", "--lm_head", 8], 11, 6),
        pytest.param(["--lm_head", 4], 11, 0, marks=pytest.mark.thorough),
    ],
)
def test_mixed_precision_is_fused_and_nearer_to_the_base(
    arguments: list[object],
    sites: int,
    eight_bit: int,
    tiny_model: Path,
    cache: Path,
    tmp_path: Path,
    commands: Commands,
) -> None:
    output = tmp_path / "mixed"
    code, printed = commands.quantize(
        "--onnx_path", tiny_model, "--output_path", output, "--block_size", 16, "--cache_dir", cache, *arguments
    )
    assert code == 0, printed
    assert fused_sites(output) == (sites, sites)
    assert (f"INT8 at {eight_bit} sites" in printed) == (eight_bit > 0)
    tokens = np.arange(40).reshape(1, 40) * 7 % 300
    base, ours = _logits(tiny_model, tokens), _logits(output, tokens)
    assert np.linalg.norm(ours - base) / np.linalg.norm(base) < 0.4
    assert len(_generate(output)) == 24


@pytest.mark.slow
def test_folding_changes_no_result(tiny_model: Path, cache: Path, tmp_path: Path, commands: Commands) -> None:
    """The same choice with Mul nodes and folded must compute the same logits: v_proj's sharing aside, which is kept."""
    tokens = np.arange(40).reshape(1, 40) * 11 % 300
    logits = {}
    for name, arguments in {
        "folded": [],
        "mul": ["--awqlite_disable_fuse_nodes", "--awqlite_run_per_subgraph", "--exclude", "lm_head"],
        "own": ["--awqlite_disable_fuse_nodes"],
    }.items():
        output = tmp_path / name
        code, printed = commands.quantize(
            "--onnx_path", tiny_model, "--output_path", output, "--algo", "awq_lite", "--block_size", 16,
            "--cache_dir", cache, *arguments,
        )  # fmt: skip
        assert code == 0, printed
        logits[name] = _logits(output, tokens)
    base = _logits(tiny_model, tokens)
    errors = {name: np.linalg.norm(value - base) / np.linalg.norm(base) for name, value in logits.items()}
    assert max(errors.values()) < 0.4, errors
    assert max(errors.values()) < 1.5 * min(errors.values()), errors


@pytest.mark.slow
def test_an_interrupted_search_goes_on_where_it_stopped_with_the_same_result(
    tiny_model: Path, cache: Path, tmp_path: Path, commands: Commands, monkeypatch
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    arguments = ["--onnx_path", tiny_model, "--cache_dir", cache, "--block_size", 16, "--algo", "awq_lite"]
    assert commands.quantize(*arguments, "--output_path", whole)[0] == 0
    original, written = QuantizedStore.write, []

    def stops_at_the_fourth(self, index, solved):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(index)
        original(self, index, solved)

    monkeypatch.setattr(QuantizedStore, "write", stops_at_the_fourth)
    code, printed = commands.quantize(*arguments, "--output_path", resumed)
    assert code == 130
    assert re.search(r"warning: stopped at search: \d of 8 groups; finished groups are kept", printed)
    weights = tmp_path / "resumed.weights"
    assert len(list(weights.glob("*.safetensors"))) == 3
    assert not resumed.exists()

    again: list[int] = []
    monkeypatch.setattr(
        QuantizedStore, "write", lambda self, index, solved: (again.append(index), original(self, index, solved))
    )
    code, printed = commands.quantize(*arguments, "--output_path", resumed)
    assert code == 0
    assert "search: 3 of 8 groups are there already.\nsearch: 3 of 8 groups\n" in printed
    assert not set(again) & set(written)
    for name in ("model.onnx", "model.onnx.data"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()


@pytest.mark.slow
def test_reexport_gives_the_same_model_without_searching(
    tiny_model: Path, cache: Path, tmp_path: Path, commands: Commands, monkeypatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    search = ["--onnx_path", tiny_model, "--cache_dir", cache, "--algo", "awq_lite", "--block_size", 16]
    assert commands.quantize(*search, "--output_path", first)[0] == 0
    monkeypatch.setattr(QuantizedStore, "write", lambda *_: pytest.fail("searched again"))
    code, printed = commands.export(
        "--onnx_path", tiny_model, "--weights_path", tmp_path / "first.weights", "--output_path", second
    )
    assert code == 0, printed
    for name in ("model.onnx", "model.onnx.data"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.slow
def test_one_run_parses_the_base_once(
    tiny_model: Path, cache: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[Path] = []
    load = onnx.load

    def counted(file: Path, *arguments: object, **options: object) -> onnx.ModelProto:
        parsed.append(Path(file))
        return load(file, *arguments, **options)

    monkeypatch.setattr(onnx, "load", counted)
    output = ["--output_path", tmp_path / "int4", "--block_size", 32]
    code, printed = commands.quantize("--onnx_path", tiny_model, "--cache_dir", cache, *output)
    assert code == 0, printed
    assert parsed.count(tiny_model / "model.onnx") == 1
    parsed.clear()
    weights = ["--weights_path", tmp_path / "int4.weights", "--output_path", tmp_path / "again"]
    code, printed = commands.export("--onnx_path", tiny_model, *weights)
    assert code == 0, printed
    assert parsed.count(tiny_model / "model.onnx") == 1


def test_a_second_calibration_run_is_recognised(
    tiny_model: Path, tiny_text: Path, cache: Path, commands: Commands, monkeypatch
) -> None:
    monkeypatch.setattr(ActivationTap, "run", lambda *_: pytest.fail("ran the model again"))
    code, printed = commands.calibrate(
        "--onnx_path", tiny_model, "--dataset", tiny_text, "--calib_size", 20, "--seq_len", 32, "--batch_size", 4,
        "--cache_dir", cache,
    )  # fmt: skip
    assert code == 0
    assert "already holds exactly this calibration" in printed


@pytest.mark.slow
def test_rtn_needs_no_cache_and_writes_both_forms(tiny_model: Path, tmp_path: Path, commands: Commands) -> None:
    tokens = np.arange(40).reshape(1, 40)
    outputs = {}
    for algorithm in ("rtn", "rtn_dq"):
        output = tmp_path / algorithm
        code, printed = commands.quantize(
            "--onnx_path", tiny_model, "--output_path", output, "--algo", algorithm, "--cache_dir", tmp_path / "none"
        )
        assert code == 0, printed
        outputs[algorithm] = _logits(output, tokens)
    # The runtime folds Q and then computes with the same codes and scales.
    np.testing.assert_allclose(outputs["rtn"], outputs["rtn_dq"], atol=1e-5 * np.abs(outputs["rtn"]).max())
    # Before a Q stand float32 numbers, 61,440 of them, not nibbles: 3.5 bytes more each.
    sizes = [(tmp_path / name / "model.onnx.data").stat().st_size for name in ("rtn", "rtn_dq")]
    assert sizes[0] - sizes[1] >= 61_440 * 3.5
