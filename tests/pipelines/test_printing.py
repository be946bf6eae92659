"""What a person, a file and a program see of a command: in files, on a terminal, with --quiet and with --json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path

import pytest

from stages.commands.calibrate_options import CalibrateConfig
from stages.commands.evaluate_options import EvaluateConfig, InspectConfig, SweepConfig
from stages.commands.quantize_options import ExportConfig, QuantizeConfig
from stages.evaluate import command as evaluate
from stages.inspect.__main__ import command as inspect
from stages.quantize import quantize
from tests.support import forked
from tests.support.commands import Commands

QUANTIZE = [sys.executable, "-m", "stages.quantize"]


def arguments(base: Path, cache: Path, output: Path, *more: str) -> list[str]:
    """Name no runtime, so that formats are the same whatever the base was built for."""
    places = ["--onnx_path", str(base), "--cache_dir", str(cache), "--output_path", str(output)]
    return [*places, "--block_size", "16", *(() if "--target" in more else ("--target", "any")), *more]


@pytest.mark.slow
def test_into_files_lines_appear_while_the_command_runs(tiny_model: Path, tiny_cache: Path, tmp_path: Path) -> None:
    output, log, out, err = (tmp_path / name for name in ("int4", "log", "stdout", "stderr"))
    command = ["-m", "stages.quantize", *arguments(tiny_model, tiny_cache, output, "--log_file", str(log))]
    process = forked.start(command, out, err, {"OMP_NUM_THREADS": "1"})
    while not err.exists() or (shown := err.read_text(encoding="utf-8")).count("\n") < 2:
        assert process.is_alive()
        time.sleep(0.005)
    assert process.is_alive()
    assert not output.exists(), "they came long before the end"
    first, second = shown.splitlines()[:2]
    assert first.startswith(f"calibration: {tiny_cache} is there and used: ")
    assert second == "search: 0 of 8 groups"
    process.join()
    assert process.exitcode == 0
    rest, errors = out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8")
    lines = errors.splitlines()
    assert any(line.startswith("search: 8 of 8 groups in ") and ", error 0." in line for line in lines), errors
    assert any(line.startswith("checking weights: 10 of 10 sites in ") for line in lines), errors
    assert not any(character in errors + rest for character in "\x1b\r━")
    assert "10 of 10 sites run as MatMulNBits" in rest
    logged = log.read_text(encoding="utf-8")
    assert all(line in logged for line in lines)


@pytest.mark.slow
def test_on_a_terminal_a_bar_is_drawn(tiny_model: Path, tiny_cache: Path, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty", reason="terminals of this kind are Unix's")
    reading, writing = pty.openpty()
    command = ["-m", "stages.quantize", *arguments(tiny_model, tiny_cache, tmp_path / "int4", "--algo", "rtn_dq")]
    variables = {"TERM": "xterm", "COLUMNS": "120", "NO_COLOR": "", "OMP_NUM_THREADS": "1"}
    process = forked.start(command, Path(os.devnull), Path(os.ttyname(writing)), variables)
    shown = b""
    while reading in wait([reading, process.sentinel]):
        shown += os.read(reading, 65536)
    os.close(writing)
    with suppress(OSError):  # Linux's way to say that nobody writes any more
        while part := os.read(reading, 65536):
            shown += part
    os.close(reading)
    process.join()
    assert process.exitcode == 0
    text = shown.decode()
    assert "━" in text
    assert "8 of 8 groups" in text
    assert "\x1b[" in text
    assert "groups in " not in text, "lines are for what is no terminal"


@pytest.mark.slow
def test_quiet_says_nothing_where_all_is_well_and_the_error_where_not(tiny_model: Path, tmp_path: Path) -> None:
    given = arguments(tiny_model, tmp_path, tmp_path / "int4", "--algo", "rtn_dq", "--quiet")
    done = subprocess.run([*QUANTIZE, *given], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    again = forked.run(["-m", "stages.quantize", *given, "--verify", "off"])
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("error: --output_path ")
    assert again.stderr.count("\n") == 1


def test_quiet_keeps_warnings(tiny_model: Path, tmp_path: Path, commands: Commands) -> None:
    common = ["--onnx_path", tiny_model, "--algo", "rtn_dq", "--target", "dml", "--layers_8bit", "down_proj", "--quiet"]
    code, printed = commands.quantize(*common, "--output_path", tmp_path / "int4")
    assert code == 0
    assert printed.startswith("warning: DirectML has no 8-bit weights")
    assert "formats for" not in printed


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Quantized weights, their model beside them."""
    output = tmp_path_factory.mktemp("printed") / "int4"
    quantize(QuantizeConfig(onnx_path=tiny_model, output_path=output, algo="rtn_dq", target="any", block_size=16))
    return output.with_name("int4.weights")


def document(result: tuple[int, str]) -> dict[str, object]:
    code, printed = result
    assert code == 0, printed
    found: dict[str, object] = json.loads(printed)
    assert found["format"] == 1
    assert found["error"] is None
    return found


@pytest.fixture
def run(commands: Commands) -> Callable[..., dict[str, object]]:
    """A command with --quiet --json; what it printed must be one document."""

    def call(config: type, command: Callable[..., None], *given: object) -> dict[str, object]:
        return document(commands.run(config, command, (*given, "--quiet", "--json")))

    return call


def test_json_of_calibrate(tiny_model: Path, tiny_text: Path, tmp_path: Path, commands: Commands) -> None:
    given = ["--onnx_path", tiny_model, "--dataset", tiny_text, "--calib_size", 4, "--seq_len", 16, "--quiet", "--json"]
    given += ["--cache_dir", tmp_path / "cache"]
    made, again = (document(commands.calibrate(*given))["calibration"] for _ in range(2))
    assert isinstance(made, dict)
    assert isinstance(again, dict)
    assert (made["calibration_windows"], made["held_out_windows"], made["seq_len"]) == (3, 1, 16)
    assert made["made"]["matmuls"] == 11
    assert again == made | {"made": None}, "the cache was there"


def test_json_of_quantize(tiny_model: Path, tiny_cache: Path, tmp_path: Path, commands: Commands) -> None:
    given = arguments(
        tiny_model, tiny_cache, tmp_path / "int4", "--algo", "awq_lite", "--target", "cpu", "--use_zero_point"
    )
    found = document(commands.quantize(*given, "--quiet", "--json"))
    search, export, formats = found["search"], found["export"], found["formats"]
    assert isinstance(search, dict)
    assert isinstance(export, dict)
    assert isinstance(formats, dict)
    assert len(search["sites"]) == 11
    first = search["sites"][0]
    assert first["format"] == "4b16z"
    assert 0 < first["loss"] < first["loss_rtn"]
    assert search["kept"] == []
    assert export["report"]["fused"] == 11
    assert export["bytes_after"] < export["bytes_before"]
    assert formats["explanations"][0]["option"] == "--target"


@pytest.mark.slow
def test_json_of_an_error_and_of_progress_beside_it(
    tiny_model: Path, tiny_cache: Path, weights: Path, commands: Commands
) -> None:
    code, printed = commands.quantize(
        *arguments(tiny_model, tiny_cache, weights.with_name("int4")), "--quiet", "--json"
    )
    assert code == 2
    found = json.loads(printed[: printed.index("error: ")])
    assert "already exists" in found["error"]
    assert set(found) == {"format", "command", "error"}


@pytest.mark.slow
def test_json_of_export_inspect_and_dry_run(
    tiny_model: Path, weights: Path, tmp_path: Path, run: Callable[..., dict[str, object]], commands: Commands
) -> None:
    given = ["--onnx_path", tiny_model, "--weights_path", weights, "--output_path", tmp_path / "again"]
    export = document(commands.export(*given, "--quiet", "--json"))["export"]
    assert isinstance(export, dict)
    assert export["onnx_file"] == str(tmp_path / "again" / "model.onnx")
    inspection = run(InspectConfig, inspect, tmp_path / "again")["inspection"]
    assert isinstance(inspection, dict)
    assert inspection["kind"] == "model"
    assert len(inspection["quantized"]) == 10
    given = ["--onnx_path", tiny_model, "--output_path", tmp_path / "x", "--algo", "rtn_dq", "--dry_run"]
    plan = document(commands.quantize(*given, "--quiet", "--json"))["plan"]
    assert isinstance(plan, dict)
    assert len(plan["sites"]) == 11
    assert not (tmp_path / "x").exists()


def test_json_of_evaluate(
    tiny_model: Path, weights: Path, unseen_text: Path, tmp_path: Path, run: Callable[..., dict[str, object]]
) -> None:
    given = ["--base", tiny_model, "--model", weights.with_name("int4"), "--text", unseen_text]
    given += ["--windows", 1, "--seq_len", 32, "--results", tmp_path / "results.json"]
    first = run(EvaluateConfig, evaluate, *given)["evaluation"]
    assert isinstance(first, dict)
    assert [row["name"] for row in first["rows"]] == [tiny_model.name, "int4"]
    assert first["rows"][1]["accuracy"]["tokens"] == 31
    assert first["rows"][1]["accuracy"]["mean_divergence"] > 0
    assert run(EvaluateConfig, evaluate, *given)["evaluation"] == first


@pytest.mark.slow
@pytest.mark.thorough
def test_json_of_sweep_and_of_its_folder(
    tiny_model: Path, tiny_cache: Path, tmp_path: Path, commands: Commands, run: Callable[..., dict[str, object]]
) -> None:
    given = ["--base", tiny_model, "--output", tmp_path, "--cache_dir", tiny_cache, "--no_evaluation"]
    given += ["--algo", "rtn_dq", "--block_size", 16, "--use_zero_point", "False", "--options", "target=any verify=off"]
    (found,) = document(commands.sweep(*given, "--quiet", "--json"))["results"]  # type: ignore[misc]
    (model,) = found["models"]
    assert model["name"] == "rtn_dq-b16-nozp-target-any-verify-off"
    assert model["command"].startswith("python -m stages.quantize --onnx_path=")
    assert model["failure"] is None
    assert model["bytes"] > 0
    assert model["search"]["bits_per_weight"] == pytest.approx(6)
    inspection = run(InspectConfig, inspect, tmp_path)["inspection"]
    assert isinstance(inspection, dict)
    assert inspection["kind"] == "sweep"
    assert inspection["texts"][0]["models"][0]["bytes"] == model["bytes"]


@pytest.mark.slow
def test_json_of_the_drop_in(tiny_model: Path, tiny_text: Path, tmp_path: Path, commands: Commands) -> None:
    given = ["--onnx_path", tiny_model, "--output_path", tmp_path / "out", "--dataset", tiny_text]
    given += ["--calib_size", 4, "--seq_len", 16, "--algo", "awq_lite", "--cache_dir", tmp_path / "cache"]
    planned = document(commands.drop_in(*given, "--dry_run", "--quiet", "--json"))
    assert set(planned) == {"format", "command", "plan", "error"}
    assert not any(tmp_path.iterdir())
    found = document(commands.drop_in(*given, "--quiet", "--json"))
    assert set(found) == {"format", "command", "calibration", "search", "export", "result", "error"}


@pytest.mark.parametrize(
    "config", [CalibrateConfig, QuantizeConfig, ExportConfig, EvaluateConfig, SweepConfig, InspectConfig]
)
def test_every_command_has_the_same_options(config: type, commands: Commands) -> None:
    code, printed = commands.run(config, lambda *_: None, ("--help_all",))
    assert code == 0
    for option in ("--quiet", "--json", "--log_level {debug,info,warning,error}", "--log_file"):
        assert option in printed


def test_an_interruption_is_a_warning_and_an_error_of_the_document(tmp_path: Path, commands: Commands) -> None:
    def stops(*_: object) -> None:
        raise KeyboardInterrupt

    code, printed = commands.run(InspectConfig, stops, (tmp_path, "--json"))
    assert code == 130
    assert "warning: stopped; the same command goes on" in printed
    assert json.loads(printed[: printed.index("warning: ")])["error"].startswith("stopped;")
