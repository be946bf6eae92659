"""A bench makes and judges each model once; what it wrote down counts for the same command, base and text alone."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from stages.commands.evaluate_options import EvaluateConfig
from stages.errors import UserError
from stages.evaluation.bench.runs import Bench
from stages.evaluation.bench.runs import Record
from stages.evaluation.bench.runs import Run
from stages.evaluation.bench.runs import Yardstick
from stages.evaluation.bench.runs import measure
from stages.evaluation.bench.runs import remove_model
from stages.evaluation.compare import prepare_base
from stages.commands.progress import progress_bar

COPY = "import shutil, sys; open(sys.argv[3], 'a').write('x'); shutil.copytree(sys.argv[1], sys.argv[2])"
FAIL = "import sys; open(sys.argv[3], 'a').write('x'); raise ValueError('no such method')"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(folder=tmp_path / "bench", inputs="base and calibration", retry_failed=False)


@pytest.fixture
def yardstick(tiny_model: Path, tiny_text: Path) -> Yardstick:
    config = EvaluateConfig(base=tiny_model, model=(), text=str(tiny_text), windows=2, seq_len=32)
    return Yardstick(text="tiny", base=prepare_base(config))


def made_by(code: str, bench: Bench, source: Path, name: str = "model") -> Run:
    """A run whose command notes each time that it is called."""
    folder, calls = bench.folder / name, bench.folder.parent / f"{name}.calls"
    return Run(name=name, command=(sys.executable, "-c", code, str(source), str(folder), str(calls)), model=folder)


def calls(run: Run) -> int:
    file = Path(run.command[-1])
    return len(file.read_text()) if file.is_file() else 0


def measured(bench: Bench, run: Run, *yardsticks: Yardstick) -> Record:
    return measure(bench, [run], yardsticks, progress_bar(), lambda _: None)[run.name]


def test_a_run_is_made_and_judged_once(bench: Bench, tiny_model_dml: Path, yardstick: Yardstick) -> None:
    run = made_by(COPY, bench, tiny_model_dml)
    record = measured(bench, run, yardstick)
    assert record.failure is None
    # float16 in place of float32, 62 predictions.
    assert 0 < record.accuracy[yardstick.key].mean_divergence < 1e-3
    assert record.accuracy[yardstick.key].tokens == 2 * 31
    assert record.bytes == sum(file.stat().st_size for file in run.model.glob("model.onnx*"))
    assert record.cost is not None
    assert measured(bench, run, yardstick) == record
    assert calls(run) == 1
    row = bench.base_row(yardstick)
    assert row is not None
    assert row.accuracy.mean_divergence == 0


def test_another_text_needs_the_model_alone(bench: Bench, tiny_model_dml: Path, yardstick: Yardstick) -> None:
    run = made_by(COPY, bench, tiny_model_dml)
    assert measured(bench, run).accuracy == {}
    assert set(measured(bench, run, yardstick).accuracy) == {yardstick.key}
    assert calls(run) == 1


def test_a_removed_model_is_made_again_only_to_be_judged(
    bench: Bench, tiny_model_dml: Path, yardstick: Yardstick
) -> None:
    run = made_by(COPY, bench, tiny_model_dml)
    measured(bench, run)
    remove_model(run)
    measured(bench, run)
    assert calls(run) == 1
    assert yardstick.key in measured(bench, run, yardstick).accuracy
    assert calls(run) == 2


@pytest.mark.parametrize("changed", ["command", "inputs"])
def test_another_command_or_base_is_another_run(bench: Bench, tiny_model_dml: Path, changed: str) -> None:
    run = made_by(COPY, bench, tiny_model_dml)
    measured(bench, run)
    shutil.rmtree(run.model)
    if changed == "inputs":
        bench = replace(bench, inputs="another base")
    else:
        run = replace(run, command=(*run.command[:2], COPY + " ", *run.command[3:]))
    measured(bench, run)
    assert calls(run) == 2


def test_a_failure_is_kept_until_it_shall_be_tried_again(bench: Bench, yardstick: Yardstick) -> None:
    run = made_by(FAIL, bench, Path("nowhere"))
    record = measured(bench, run, yardstick)
    assert record.failure == "no such method"
    assert record.cost is None
    assert measured(bench, run, yardstick) == record
    assert calls(run) == 1
    measured(replace(bench, retry_failed=True), run, yardstick)
    assert calls(run) == 2
    assert "Traceback" in (bench.folder / "model.log").read_text()


def test_what_comes_before_or_after_may_fail_too(bench: Bench, tiny_model_dml: Path) -> None:
    def refuse() -> None:
        raise UserError("it can't be installed")

    run = made_by(COPY, bench, tiny_model_dml)
    assert measured(bench, replace(run, before=refuse)).failure == "it can't be installed"
    assert calls(run) == 0
    again = replace(bench, retry_failed=True)
    assert measured(again, replace(run, after=refuse)).failure == "it can't be installed"
    assert calls(run) == 1


def test_a_model_that_can_not_be_judged_failed(bench: Bench, tiny_model: Path, yardstick: Yardstick) -> None:
    spoil = COPY + "; open(sys.argv[2] + '/model.onnx', 'w').write('spoilt')"
    run = made_by(spoil, bench, tiny_model)
    assert measured(bench, run, yardstick).failure is not None


def test_others_go_on_and_are_told_of(bench: Bench, tiny_model_dml: Path, yardstick: Yardstick) -> None:
    runs = [made_by(FAIL, bench, tiny_model_dml, "first"), made_by(COPY, bench, tiny_model_dml, "second")]
    told: list[list[str]] = []

    def tidy(records: Mapping[str, Record]) -> None:
        told.append(list(records))

    records = measure(bench, runs, [yardstick], progress_bar(), tidy)
    assert [record.failure for record in records.values()] == ["no such method", None]
    assert told == [["first"], ["first", "second"]]
