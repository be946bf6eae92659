"""``python -m stages.sweep`` on a tiny model: real points, their table, resuming, failures and what stays on disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from stages.evaluation.bench import Record
from tests.commands import Commands


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_text: Path) -> Path:
    """A calibration of the tiny model."""
    from rich.console import Console

    from stages.calibrate import calibrate
    from stages.config import CalibrateConfig

    folder = tmp_path_factory.mktemp("caches") / "tiny"
    config = CalibrateConfig(
        onnx_path=tiny_model, dataset=str(tiny_text), calib_size=20, seq_len=32, batch_size=4, cache_dir=folder
    )
    calibrate(config, Console(quiet=True))
    return folder


@pytest.fixture(scope="module")
def other_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text that the tiny model was not calibrated on."""
    path = tmp_path_factory.mktemp("text") / "other.txt"
    path.write_text(" ".join(f"Line {n} holds {n * n % 89} apples." for n in range(60)), encoding="utf-8")
    return path


def records(folder: Path) -> dict[str, Record]:
    from pydantic import TypeAdapter

    files = sorted(folder.glob("*.run.json"))
    return {file.name.removesuffix(".run.json"): TypeAdapter(Record).validate_json(file.read_bytes()) for file in files}


def test_points_are_compared_and_a_second_sweep_repeats_none(
    commands: Commands, tiny_model: Path, cache: Path, other_text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "sweep"
    arguments = ["--base", tiny_model, "--cache_dir", cache, "--output", output, "--text", other_text]
    arguments += ["--windows", 2, "--seq_len", 32, "--use_zero_point", False, "--block_size", 32]
    code, printed = commands.sweep(*arguments, "--algo", "rtn_dq", "awq_lite", "--options", "exclude=")
    assert code == 0, printed
    found = records(output)
    assert sorted(found) == ["awq_lite-b32-exclude", "rtn_dq-b32-exclude"]
    for name, record in found.items():
        (accuracy,) = record.accuracy.values()
        assert accuracy.mean_divergence > 0
        assert record.search is not None
        assert (record.search.held_out_loss is None) == name.startswith("rtn_dq")
        assert record.bytes == sum(file.stat().st_size for file in (output / name).glob("model.onnx*"))
        # The command itself, typed again, makes the same model.
        assert " ".join(("python", *record.command[1:])) in printed.replace("'", "")
    written = (output / "table.md").read_text()
    assert all(f" {name} " in written for name in found)
    files = {file: file.stat().st_mtime_ns for file in output.rglob("*.onnx")}
    code, again = commands.sweep(*arguments, "--algo", "rtn_dq", "awq_lite", "--options", "exclude=")
    assert code == 0, again
    assert {file: file.stat().st_mtime_ns for file in output.rglob("*.onnx")} == files
    assert (output / "table.md").read_text() == written


def test_a_points_command_makes_the_same_model(
    commands: Commands, tiny_model: Path, cache: Path, tmp_path: Path
) -> None:
    output = tmp_path / "sweep"
    arguments = ["--base", tiny_model, "--cache_dir", cache, "--output", output, "--no_evaluation", "--keep", "none"]
    arguments += ["--use_zero_point", True, "--block_size", 16, "--algo", "awq_clip"]
    code, printed = commands.sweep(*arguments)
    assert code == 0, printed
    ((name, record),) = records(output).items()
    assert not (output / name).exists()
    assert not (output / f"{name}.weights").exists()
    line = next(line for line in printed.splitlines() if line.startswith(f"{name}: "))
    program, *rest = line.removeprefix(f"{name}: ").split()
    assert program == "python"
    subprocess.run([sys.executable, *rest], check=True, capture_output=True)
    codes = onnx.load(output / name / "model.onnx", load_external_data=False).graph
    assert any(node.op_type == "DequantizeLinear" for node in codes.node)
    assert record.bytes == sum(file.stat().st_size for file in (output / name).glob("model.onnx*"))


def test_a_failed_point_is_a_row_and_the_exit_code_says_so(
    commands: Commands, tiny_model: Path, cache: Path, tmp_path: Path
) -> None:
    output = tmp_path / "sweep"
    arguments = ["--base", tiny_model, "--cache_dir", cache, "--output", output, "--no_evaluation", "--keep", "best"]
    code, printed = commands.sweep(
        *arguments, "--use_zero_point", False, "--algo", "awq_lite", "--block_size", 24, 32, "--options", "device=cpu"
    )
    assert code == 2
    assert "1 of 2 failed (awq_lite-b24-device-cpu): the table says why" in printed
    assert "--block_size 24 is not a power of two" in printed
    failed, fine = records(output).values()
    assert failed.failure is not None
    assert fine.failure is None
    # The only point that worked is nowhere beaten.
    assert (output / "awq_lite-b32-device-cpu" / "model.onnx").is_file()


def test_calibrated_text_is_refused_before_anything_runs(
    commands: Commands, tiny_model: Path, cache: Path, tmp_path: Path
) -> None:
    seen = load_file(cache / "tokens.safetensors")["calibration"].reshape(-1)
    text = tmp_path / "seen.txt"
    text.write_text(AutoTokenizer.from_pretrained(tiny_model).decode(seen, skip_special_tokens=True), encoding="utf-8")
    arguments = ["--base", tiny_model, "--cache_dir", cache, "--output", tmp_path / "sweep", "--text", text]
    code, printed = commands.sweep(*arguments, "--windows", 2, "--seq_len", 48)
    assert code == 2
    assert "were calibrated on" in printed
    assert not (tmp_path / "sweep").exists()


def test_another_models_cache_is_refused(commands: Commands, tiny_model_dml: Path, cache: Path, tmp_path: Path) -> None:
    code, printed = commands.sweep(
        "--base", tiny_model_dml, "--cache_dir", cache, "--output", tmp_path / "sweep", "--no_evaluation"
    )
    assert code == 2
    assert "was made from another model" in printed
