"""``python -m stages.sweep`` on a tiny model: real points, their table, resuming, failures and what stays on disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from statistics import mean

import pytest
import transformers
from safetensors.numpy import load_file

from stages.commands.evaluate_options import SweepConfig
from stages.commands.output import Section
from stages.evaluation.bench.runs import Record
from stages.quantization.weights.store import open_store
from stages.report.document import read_report
from tests.stages.report.parsed import parse
from tests.support import forked
from tests.support.commands import Commands

pytestmark = pytest.mark.slow


def records(folder: Path) -> dict[str, Record]:
    from pydantic import TypeAdapter

    files = sorted(folder.glob("*.run.json"))
    return {file.name.removesuffix(".run.json"): TypeAdapter(Record).validate_json(file.read_bytes()) for file in files}


def test_points_are_compared_and_a_second_sweep_repeats_none(
    commands: Commands, tiny_model: Path, tiny_cache: Path, unseen_text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "sweep"
    arguments = ["--base", tiny_model, "--cache_dir", tiny_cache, "--output", output, "--text", unseen_text]
    arguments += ["--windows", 2, "--seq_len", 32]
    points = ["--algo", "rtn_dq", "--block_size", 32, "--use_zero_point", False]
    points += ["--options", "exclude=", "exclude= scale_range=compat7"]
    code, printed = commands.sweep(*arguments, *points)
    assert code == 0, printed
    assert "2 models to make, one after the other: about 2" in printed
    assert " s of search, and 0.0 GB in " in printed
    found = records(output)
    assert sorted(found) == ["rtn_dq-b32-nozp-exclude", "rtn_dq-b32-nozp-exclude-scale_range-compat7"]
    for name, record in found.items():
        (accuracy,) = record.accuracy.values()
        assert accuracy.mean_divergence > 0
        assert record.search is not None
        assert record.search.held_out_loss is None
        assert record.search.seconds == open_store(output / f"{name}.weights").seconds()
        assert record.bytes == sum(file.stat().st_size for file in (output / name).glob("model.onnx*"))
        # The command itself, typed again, makes the same model.
        assert " ".join(("python", *record.command[1:])) in (output / "table.md").read_text().replace("'", "")
    written = (output / "table.md").read_text()
    assert all(f" {name} " in written for name in found)
    (table,) = read_report(output).sweep
    assert {point.name: point.bytes for point in table.points} == {name: found[name].bytes for name in found}
    assert sum(point.on_front for point in table.points) == 1
    assert parse((output / "report.html").read_text(encoding="utf-8")).by_id("front-0")
    files = {file: file.stat().st_mtime_ns for file in output.rglob("*.onnx")}
    code, again = commands.sweep(*arguments, *points)
    assert code == 0, again
    assert "models to make" not in again
    assert {file: file.stat().st_mtime_ns for file in output.rglob("*.onnx")} == files
    assert (output / "table.md").read_text() == written
    # Both take as many bytes; the one with the larger divergence is beaten.
    best = min(found, key=lambda name: next(iter(found[name].accuracy.values())).mean_divergence)
    code, _ = commands.sweep(*arguments, *points, "--keep", "best")
    assert code == 0
    assert [folder.name for folder in output.iterdir() if folder.is_dir() and folder.suffix != ".weights"] == [best]


@pytest.mark.thorough
def test_a_points_command_makes_the_same_model(
    commands: Commands, tiny_model: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    output = tmp_path / "sweep"
    arguments = ["--base", tiny_model, "--cache_dir", tiny_cache, "--output", output]
    arguments += ["--no_evaluation", "--keep", "none", "--verbose"]
    arguments += ["--use_zero_point", True, "--block_size", 16, "--algo", "awq_clip"]
    code, printed = commands.sweep(*arguments)
    assert code == 0, printed
    ((name, record),) = records(output).items()
    assert not (output / name).exists()
    assert not (output / f"{name}.weights").exists()
    line = next(line for line in printed.splitlines() if line.startswith(f"{name}: "))
    program, *rest = line.removeprefix(f"{name}: ").split()
    assert program == "python"
    done = forked.run(rest)
    assert done.returncode == 0, done.stderr
    assert record.bytes == sum(file.stat().st_size for file in (output / name).glob("model.onnx*"))
    losses = [report.held_out_loss for report in open_store(output / f"{name}.weights").reports()]
    assert record.search is not None
    assert record.search.held_out_loss == mean(losses)


@pytest.mark.thorough
def test_a_failed_point_is_a_row_and_the_exit_code_says_so(
    commands: Commands, tiny_model: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    output = tmp_path / "sweep"
    arguments = ["--base", tiny_model, "--cache_dir", tiny_cache, "--output", output]
    arguments += ["--no_evaluation", "--keep", "best"]
    code, printed = commands.sweep(
        *arguments, "--use_zero_point", False, "--algo", "awq_lite", "--block_size", 24, 32, "--options", "device=cpu"
    )
    assert code == 2
    assert "1 of 2 failed (awq_lite-b24-nozp-device-cpu): the table says why" in printed
    assert "--block_size 24 is not a power of two" in printed
    failed, fine = records(output).values()
    assert failed.failure is not None
    assert fine.failure is None
    # The only point that worked is nowhere beaten.
    assert (output / "awq_lite-b32-nozp-device-cpu" / "model.onnx").is_file()


def test_calibrated_text_is_refused_before_anything_runs(
    commands: Commands, tiny_model: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    seen = load_file(tiny_cache / "tokens.safetensors")["calibration"].reshape(-1)
    text = tmp_path / "seen.txt"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    text.write_text(tokenizer.decode(seen, skip_special_tokens=True), encoding="utf-8")
    arguments = ["--base", tiny_model, "--cache_dir", tiny_cache, "--output", tmp_path / "sweep", "--text", text]
    code, printed = commands.sweep(*arguments, "--windows", 2, "--seq_len", 48)
    assert code == 2
    assert "were calibrated on" in printed
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--text", "nosuch.txt"), "--text nosuch.txt"),
        (("--windows", 0), "--windows must be at least 1"),
        (("--options", "", "seed=1"), "all points of a sweep share one calibration"),
        (("--options", "no_such_option"), "has no option --no_such_option"),
    ],
)
def test_what_cannot_be_used_is_said_before_the_calibration(
    options: tuple[object, ...], words: str, commands: Commands, tiny_model: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    code, printed = commands.sweep("--base", tiny_model, "--cache_dir", cache, "--output", tmp_path / "sweep", *options)
    assert code == 2
    assert words in printed
    assert not cache.exists()


def test_points_whose_options_need_statistics_share_one_calibration(
    commands: Commands, tiny_model: Path, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def calibrate(config: SweepConfig) -> Section:
        shutil.copytree(tiny_cache, config.cache_path)
        return Section(name="calibration", table="calibrated once", record=None)

    monkeypatch.setattr("stages.sweep._calibrate", calibrate)
    arguments = ["--base", tiny_model, "--cache_dir", tmp_path / "cache", "--output", tmp_path / "sweep"]
    arguments += ["--no_evaluation", "--algo", "rtn_dq", "--block_size", "None", "--options", "target=any target_bpw=6"]
    code, printed = commands.sweep(*arguments)
    assert code == 0, printed
    assert "calibrated once" in printed
    assert "1 model to make" in printed
    code, printed = commands.sweep(*arguments)
    assert code == 0, printed
    assert "to make" not in printed


def test_another_models_cache_is_refused(
    commands: Commands, tiny_model_dml: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    code, printed = commands.sweep(
        "--base", tiny_model_dml, "--cache_dir", tiny_cache, "--output", tmp_path / "sweep", "--no_evaluation"
    )
    assert code == 2
    assert "was made from another model" in printed
