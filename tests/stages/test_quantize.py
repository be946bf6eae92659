"""The one command: stage one where it wasn't done yet, what is finished found again, evaluation, the box."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages import quantize
from stages.commands.evaluate_options import EvaluateConfig
from stages.commands.output import Section
from stages.commands.quantize_options import QuantizeConfig
from stages.errors import UserError
from stages.evaluation.compare import prepare
from stages.quantize import preview
from stages.report.document import read_report
from stages.system.distributed import Processes
from tests.support.commands import Commands

Call = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    place = tmp_path_factory.mktemp("one")
    shutil.copytree(tiny_model, place / "base")
    return place


@pytest.fixture
def call(folder: Path, tiny_text: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Quantize base to int4, typed as people do."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("stages.runtime.genai.why_not_genai", lambda _: "it would take a while")
    text = ("--dataset", tiny_text, "--calib_size", 4, "--seq_len", 32)
    models = ("--onnx_path", "base", "--output_path", "int4", "--target", "any")
    return lambda *more: commands.run(
        QuantizeConfig, quantize.command, (*models, *text, "--algo", "awq_lite", "--block_size", 16, *more)
    )


@pytest.mark.slow
def test_one_command_does_everything_once(call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, printed = call("--dry_run")
    assert code == 0, printed
    assert "there is no calibration in base.calibration yet: it is part of the same run (text: " in printed
    assert "the search's time is without calibration, which can take longer" in " ".join(printed.split())
    assert "not yet" not in printed
    assert {path.name for path in folder.iterdir()} == {"base"}

    code, printed = call()
    assert code == 0, printed
    assert {path.name for path in folder.iterdir()} == {"base", "base.calibration", "int4", "int4.weights"}
    assert "calibration cache" in printed
    assert "x mlp/down_proj" not in printed, "the search's table is a detail"
    assert "│ inspect    python -m stages.inspect int4 " in printed, printed
    assert "not compared with the base" in printed

    monkeypatch.setattr("stages.calibration.capture.Capture.fill", None)
    code, printed = call("--evaluate")
    assert code == 0, printed
    assert "int4 is there already, made with exactly these options." in printed
    assert "on code " in printed
    assert "decoding speed isn't measured: it would take a while" in printed
    report = read_report(folder / "int4.weights" / "report")
    assert [one.comparison.text for one in report.evaluations] == ["code", "offline"]
    card = Path(folder, "int4", "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (code|offline) \| \d+ \| 4 \(", card, re.M) == ["code", "offline"]
    (base, int4) = report.evaluations[0].rows
    assert (base.accuracy_level, int4.accuracy_level[:1]) == ("none (nothing is quantized)", "4")
    assert "\n| code | 4088 | 4 (ONNX Runtime" in (folder / "int4" / "README.md").read_text(encoding="utf-8")

    monkeypatch.setattr("stages.evaluation.compare.open_reference", None)
    again = call("--evaluate")
    assert again[0] == 0, again[1]
    assert "windows" not in again[1].replace("windows of 512", ""), "nothing is run again"


@pytest.mark.slow
def test_another_text_is_one_sentence(call: Call, folder: Path, commands: Commands) -> None:
    call()
    code, printed = call("--calib_size", 6, "--output_path", "other")
    assert code == 2
    assert "holds another calibration: its text is tiny.txt (3 + 1 windows of 32 tokens), and tiny.txt" in printed
    code, printed = commands.quantize(
        "--onnx_path", folder / "base", "--output_path", "other", "--algo", "awq_lite", "--block_size", 16, "--dry_run"
    )
    assert code == 0
    assert "part of the same run" not in printed, "a cache that is there is used, whatever its text"


def test_a_run_that_was_stopped_behind_its_output_finds_it_finished(
    call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    arguments = ("--algo", "rtn_dq", "--output_path", "stopped", "--verify", "off")
    with monkeypatch.context() as patched:
        patched.setattr("stages.quantize._write_report", stop)
        assert call(*arguments)[0] == 130
    code, printed = call(*arguments)
    assert (code, "stopped is there already" in printed) == (0, True), printed
    assert (folder / "stopped.weights" / "report" / "report.html").is_file()
    (folder / "stopped" / "tokenizer.json").unlink()
    code, printed = call(*arguments)
    assert (code, "already exists" in printed) == (2, True), printed


def test_models_that_are_swapped_or_there_already_are_named(
    tiny_model: Path, tmp_path: Path, commands: Commands, caplog: pytest.LogCaptureFixture
) -> None:
    made = tmp_path / "int4"
    arguments = ("--algo", "rtn_dq", "--block_size", 16, "--quiet")
    assert commands.quantize("--onnx_path", tiny_model, "--output_path", made, *arguments)[0] == 0
    words = "is quantized already (10 of its 11 MatMuls hold integer weights)"
    for code, printed in (
        commands.quantize("--onnx_path", made, "--output_path", tmp_path / "twice", *arguments),
        commands.quantize("--onnx_path", made, "--output_path", tiny_model, *arguments),
        commands.calibrate("--onnx_path", made, "--use_random_calib", "--seq_len", 8, "--calib_size", 2),
    ):
        assert (code, words in printed) == (2, True), printed
    code, printed = commands.quantize("--onnx_path", tiny_model, "--output_path", made, *arguments, "--use_zero_point")
    assert (code, "already exists, made with other options or from another base" in printed) == (2, True), printed
    prepare(EvaluateConfig(base=made, model=(tiny_model,), text="code", windows=1, seq_len=8))
    assert f"--base {made} is a quantized model" in caplog.text


def test_a_dry_run_says_what_the_tuning_of_blocks_lacks(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise UserError("onnx2torch isn't installed.")

    monkeypatch.setattr("stages.runtime.blocks.converters.onnx2torch.import_onnx2torch", missing)
    config = QuantizeConfig(onnx_path=tiny_model, output_path=tmp_path / "x", algo="rtn_dq", refine=True)
    assert preview(config).obstacles == ("onnx2torch isn't installed.",)


def test_a_finished_package_is_evaluated_by_the_first_process_alone(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    another, made = Processes(SimpleNamespace(is_main_process=False)), SimpleNamespace(folder=tmp_path)
    monkeypatch.setattr("stages.system.distributed.join_processes", lambda: another)
    monkeypatch.setattr(Processes, "broadcast", lambda *_: made)
    config = QuantizeConfig(
        onnx_path=tiny_model, output_path=tmp_path / "int4", component="decoder,vision", evaluate=True
    )
    assert quantize.quantize(config) is None


def test_each_of_several_components_has_an_evaluation_in_json(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = SimpleNamespace(folder=tmp_path, evaluations=(), outputs=())

    def evaluate(*_: object) -> Generator[Section, None, object]:
        yield Section(name="outputs", table="", record=None)
        return made

    def several(*_: object) -> Generator[Section, None, object]:
        yield from ()
        return made

    monkeypatch.setattr("stages.quantize._run_several", several)
    monkeypatch.setattr("stages.quantize._evaluate", evaluate)
    monkeypatch.setattr("stages.quantize.add_to_card", lambda *_: None)
    config = QuantizeConfig(
        onnx_path=tiny_model, output_path=tmp_path / "int4", component="encoder,vision", evaluate=True
    )
    assert [section.name for section in quantize.run(config)] == ["encoder.outputs", "vision.outputs"]
