"""Bad input: one clear sentence that names the culprit and the mend, exit code 2, nothing left behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from tests.commands import Commands
from tests.graphs import TinyGraph


def _check(result: tuple[int, str], *words: str) -> None:
    code, printed = result
    assert code == 2, printed
    assert "Traceback" not in printed
    lines = [line for line in printed.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    assert len(errors) == 1, printed
    for word in words:
        assert word in errors[0], printed


def _left(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "base"))


@pytest.mark.parametrize("command", ["calibrate", "quantize"])
def test_missing_model(command: str, tmp_path: Path, commands: Commands) -> None:
    output = ["--output_path", tmp_path / "out", "--algo", "rtn_dq"] if command == "quantize" else []
    # Square brackets are markup to the library that prints.
    result = getattr(commands, command)("--onnx_path", tmp_path / "[bold]nothing.onnx", *output)
    _check(result, "[bold]nothing.onnx", "does not exist")
    assert _left(tmp_path) == set()


@pytest.mark.parametrize("command", ["calibrate", "quantize"])
def test_truncated_external_data(command: str, model: Path, tmp_path: Path, commands: Commands) -> None:
    data = model / "model.onnx.data"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    before = _left(tmp_path)
    output = ["--output_path", tmp_path / "out", "--algo", "rtn_dq"] if command == "quantize" else []
    _check(getattr(commands, command)("--onnx_path", model, *output), "model.onnx.data", "truncated")
    assert _left(tmp_path) == before


def test_nothing_to_quantize(tmp_path: Path, commands: Commands) -> None:
    graph = TinyGraph()
    graph.input("x", TensorProto.FLOAT, ["t", 4])
    graph.node("Relu", ["x"], ["y"])
    graph.output("y", TensorProto.FLOAT, ["t", 4])
    (tmp_path / "base").mkdir()
    ir.save(ir.from_proto(graph.proto()), tmp_path / "base/model.onnx")
    result = commands.quantize("--onnx_path", tmp_path / "base", "--output_path", tmp_path / "out", "--algo", "rtn_dq")
    _check(result, "nothing to quantize")
    assert _left(tmp_path) == {"base", "base/model.onnx"}


def test_everything_excluded_and_unmatched_pattern(model: Path, tmp_path: Path, commands: Commands) -> None:
    arguments = ["--onnx_path", model, "--output_path", tmp_path / "out", "--algo", "rtn_dq"]
    _check(commands.quantize(*arguments, "--exclude", "model,lm_head"), "--exclude", "nothing would be quantized")
    _check(commands.quantize(*arguments, "--exclude", "dwn_proj"), "dwn_proj", "nearest names", "down_proj")


def test_no_embedding_to_quantize(tmp_path: Path, commands: Commands) -> None:
    graph = TinyGraph()
    graph.input("x", TensorProto.FLOAT, ["t", 32])
    graph.linear("x", np.ones((32, 32), np.float32), "y")
    graph.output("y", TensorProto.FLOAT, ["t", 32])
    graph.save(tmp_path / "base")
    before = _left(tmp_path)
    arguments = ["--onnx_path", tmp_path / "base", "--output_path", tmp_path / "out", "--algo", "rtn_dq"]
    _check(commands.quantize(*arguments, "--gather_quantize_axis", 1), "--gather_quantize_axis", "leave the option out")
    assert _left(tmp_path) == before


@pytest.mark.parametrize(
    ("option", "value"), [("--gather_quantize_axis", "2"), ("--gather_form", "gather"), ("--int8_block_size", "chanel")]
)
def test_unknown_choices_are_refused_with_code_2(option: str, value: str, commands: Commands) -> None:
    code, printed = commands.quantize("--onnx_path", "a", "--output_path", "b", option, value)
    assert code == 2
    assert option.removeprefix("--") in printed.replace("-", "_")
    assert "Traceback" not in printed


def test_unknown_dataset(model: Path, tmp_path: Path, commands: Commands) -> None:
    before = _left(tmp_path)
    _check(commands.calibrate("--onnx_path", model, "--dataset", "wikitex"), "wikitex", "cnn", "offline")
    assert _left(tmp_path) == before


def test_no_tokenizer(model: Path, commands: Commands) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        (model / name).unlink(missing_ok=True)
    _check(commands.calibrate("--onnx_path", model, "--dataset", "offline"), "--model_name")


def test_windows_longer_than_the_context(model: Path, tmp_path: Path, commands: Commands) -> None:
    before = _left(tmp_path)
    result = commands.calibrate("--onnx_path", model, "--dataset", "offline", "--seq_len", 1025)
    _check(result, "--seq_len 1025", "context", "1024 tokens")
    assert _left(tmp_path) == before


def test_no_cache_cache_of_another_model_and_other_options(
    model: Path, tiny_text: Path, tmp_path: Path, commands: Commands
) -> None:
    quantize = ["--onnx_path", model, "--output_path", tmp_path / "out"]
    _check(commands.quantize(*quantize), "base.calibration", "run stages.calibrate first")
    calibrate = ["--onnx_path", model, "--dataset", tiny_text, "--calib_size", 4, "--seq_len", 16]
    assert commands.calibrate(*calibrate)[0] == 0
    _check(commands.calibrate(*calibrate, "--seed", 1), "base.calibration", "token fingerprint", "--overwrite")
    data = model / "model.onnx.data"
    changed = bytearray(data.read_bytes())
    changed[-1] ^= 1
    data.write_bytes(changed)
    _check(commands.quantize(*quantize), "made from another model")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.weights").exists()


def test_existing_output_is_untouched(model: Path, tmp_path: Path, commands: Commands) -> None:
    arguments = ["--onnx_path", model, "--output_path", tmp_path / "out", "--algo", "rtn_dq"]
    assert commands.quantize(*arguments)[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    _check(commands.quantize(*arguments, "--block_size", 32), str(tmp_path / "out"), "--overwrite")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert commands.quantize(*arguments, "--block_size", 32, "--overwrite")[0] == 0
    assert (tmp_path / "out/model.onnx.data").read_bytes() != before["model.onnx.data"]


@pytest.mark.parametrize("option", ["--output_path", "--cache_dir", "--weights_path"])
def test_unwritable_folders(option: str, model: Path, tiny_text: Path, tmp_path: Path, commands: Commands) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("a file where a folder should be")
    target = blocker / "sub" / "out"
    before = _left(tmp_path)
    if option == "--cache_dir":
        result = commands.calibrate(
            "--onnx_path", model, "--dataset", tiny_text, "--calib_size", 4, "--seq_len", 16, option, target
        )
    else:
        output = ["--output_path", tmp_path / "out"] if option == "--weights_path" else []
        result = commands.quantize("--onnx_path", model, "--algo", "rtn_dq", *output, option, target)
    _check(result, option, "can't be written")
    assert _left(tmp_path) == before


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_activations(value: float, model: Path, tiny_text: Path, tmp_path: Path, commands: Commands) -> None:
    graph = ir.load(model / "model.onnx")
    gain = graph.graph.initializers["model.layers.1.input_layernorm.weight"]
    assert gain.const_value is not None
    broken = gain.const_value.numpy().copy()
    broken[3] = value
    gain.const_value = ir.tensor(broken, name=gain.name)
    ir.save(graph, model / "model.onnx", external_data="other.data")
    before = _left(tmp_path)
    result = commands.calibrate("--onnx_path", model, "--dataset", tiny_text, "--calib_size", 4, "--seq_len", 16)
    _check(result, "layers.1/input_layernorm", "NaN or infinite")
    assert _left(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--block_size", "48"], ["--block_size 48", "power of two"]),
        (["--block_size", "512"], ["--block_size 512"]),
        (["--int8_block_size", "48"], ["--int8_block_size 48", "power of two"]),
        (["--target", "tpu"], ["--target tpu", "cpu, cuda, dml, trt-rtx, webgpu, qnn"]),
        (["--target", "cpu@latest"], ["--target cpu@latest", "1.24"]),
        (["--target", "cuda@1.18"], ["--target cuda@1.18", "before 1.20"]),
        # The target leaves an option that can't be to the same error as without it.
        (["--target", "cpu", "--block_size", "48"], ["--block_size 48", "power of two"]),
        (["--gather_quantize_axis", "1", "--gather_block_size", "24"], ["--gather_block_size 24", "power of two"]),
        (["--gather_block_size", "8"], ["--gather_block_size 8"]),
        (["--awqlite_alpha_step", "0"], ["--awqlite_alpha_step"]),
        (["--awqclip_alpha_min", "1.5"], ["--awqclip_alpha_min"]),
        (["--device", "cuda:77"], ["--device cuda:77"]),
    ],
)
def test_options_that_cannot_be(
    arguments: list[str], words: list[str], model: Path, tmp_path: Path, commands: Commands
) -> None:
    result = commands.quantize("--onnx_path", model, "--output_path", tmp_path / "out", "--algo", "rtn_dq", *arguments)
    _check(result, *words)
    assert not (tmp_path / "out").exists()


def test_too_little_text_and_unknown_provider(model: Path, tmp_path: Path, commands: Commands) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A few words only.")
    _check(commands.calibrate("--onnx_path", model, "--dataset", short), "windows", "--calib_size")
    _check(commands.calibrate("--onnx_path", model, "--calibration_eps", "gpu"), "--calibration_eps", "gpu")


def test_unknown_option_is_refused_with_code_2(commands: Commands) -> None:
    code, printed = commands.quantize("--onnx_path", "a", "--output_path", "b", "--blok_size", "32")
    assert code == 2
    assert "blok_size" in printed
    assert "Traceback" not in printed
