"""``python -m stages.inspect``: every kind of folder is recognized, and others are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.commands.evaluate_options import InspectConfig
from stages.inspect.__main__ import command
from tests.support.commands import Commands

Inspect = Callable[..., tuple[int, str]]


@pytest.fixture
def inspect(commands: Commands) -> Inspect:
    return lambda *arguments: commands.run(InspectConfig, command, arguments)


def inspection(answer: tuple[int, str]) -> dict[str, object]:
    code, printed = answer
    assert code == 0, printed
    found = json.loads(printed)["inspection"]
    assert isinstance(found, dict)
    return found


def test_every_kind_of_folder_is_recognized(
    inspect: Inspect, tiny_model: Path, tiny_cache: Path, tmp_path: Path, commands: Commands
) -> None:
    output, sweep = tmp_path / "int4", tmp_path / "sweep"
    given = ["--algo", "rtn_dq", "--block_size", 16, "--target", "auto"]
    made = commands.quantize("--onnx_path", tiny_model, "--output_path", output, "--verify", "off", *given)
    assert made[0] == 0, made[1]
    sweep.mkdir()
    (sweep / "a.run.json").write_text('{"command": ["x"], "inputs": "i"}', encoding="utf-8")
    folders = {
        tiny_model: "model",
        output: "model",
        output / "model.onnx": "model",
        tiny_cache: "calibration",
        tmp_path / "int4.weights": "weights",
        sweep: "sweep",
    }
    for folder, kind in folders.items():
        assert inspection(inspect(folder, "--json"))["kind"] == kind
        code, printed = inspect(folder)
        assert code == 0, printed
        assert printed.count("\n") > 3
    for more, is_told in ((), False), (("--verbose",), True):
        code, printed = inspect(output, *more)
        assert ("other runtimes" in printed, "WebGPU" in printed) == (not is_told, is_told), printed
    found = inspection(inspect(output, "--json"))
    assert found["made_for"] == "cpu"
    assert len(found["runtimes"]) == 6  # type: ignore[arg-type]
    embedding, first, *others = inspection(inspect(output, "--json"))["quantized"]  # type: ignore[misc]
    assert embedding["operators"] == ["GatherBlockQuantized"]
    assert len(others) == 10
    assert first["operators"] == ["DequantizeLinear", "MatMul"]
    assert first["form"] == "DequantizeLinear -> MatMul"


def test_other_folders_are_refused(inspect: Inspect, tmp_path: Path) -> None:
    code, printed = inspect(tmp_path / "nothing")
    assert code == 2
    assert "does not exist; pass a model, a calibration cache, quantized weights or a sweep" in printed
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    code, printed = inspect(tmp_path)
    assert code == 2
    assert "no .onnx file" in printed
    assert "but notes.txt" in printed
