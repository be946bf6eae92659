"""A run folder makes and scores each model once; records count only for the same command, base and text."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from stages.commands.evaluate_options import EvaluateConfig
from stages.commands.progress import progress_bar
from stages.errors import UserError
from stages.evaluation.bench.runs import (
    EvaluationText,
    OtherRuntime,
    Record,
    Run,
    RunFolder,
    Search,
    measure,
    remove_model,
)
from stages.evaluation.compare import prepare_base

COPY = "import shutil, sys; open(sys.argv[3], 'a').write('x'); shutil.copytree(sys.argv[1], sys.argv[2])"
FAIL = "import sys; open(sys.argv[3], 'a').write('x'); raise ValueError('no such method')"


@pytest.fixture
def run_folder(tmp_path: Path) -> RunFolder:
    return RunFolder(folder=tmp_path / "runs", inputs="base and calibration", retry_failed=False)


@pytest.fixture
def text(tiny_model: Path, tiny_text: Path) -> EvaluationText:
    config = EvaluateConfig(base=tiny_model, model=(), text=str(tiny_text), windows=2, seq_len=32)
    return EvaluationText(text="tiny", base=prepare_base(config))


def made_by(code: str, run_folder: RunFolder, source: Path, name: str = "model") -> Run:
    """A run whose command notes each time that it is called."""
    folder, calls = run_folder.folder / name, run_folder.folder.parent / f"{name}.calls"
    return Run(name=name, command=(sys.executable, "-c", code, str(source), str(folder), str(calls)), model=folder)


def calls(run: Run) -> int:
    file = Path(run.command[-1])
    return len(file.read_text()) if file.is_file() else 0


def measured(run_folder: RunFolder, run: Run, *texts: EvaluationText) -> Record:
    return measure(run_folder, [run], texts, progress_bar(), lambda _: None)[run.name]


@pytest.mark.slow
def test_a_run_is_made_and_scored_once(run_folder: RunFolder, tiny_model_dml: Path, text: EvaluationText) -> None:
    run = made_by(COPY, run_folder, tiny_model_dml)
    record = measured(run_folder, run, text)
    assert record.failure is None
    # float16 in place of float32, 62 predictions.
    assert 0 < record.accuracy[text.key].mean_divergence < 1e-3
    assert record.accuracy[text.key].tokens == 2 * 31
    assert record.bytes == sum(file.stat().st_size for file in run.model.glob("model.onnx*"))
    assert record.cost is not None
    assert measured(run_folder, run, text) == record
    assert calls(run) == 1
    row = run_folder.base_row(text)
    assert row is not None
    assert row.accuracy.mean_divergence == 0


def test_another_text_needs_only_the_model(run_folder: RunFolder, tiny_model_dml: Path, text: EvaluationText) -> None:
    run = made_by(COPY, run_folder, tiny_model_dml)
    assert measured(run_folder, run).accuracy == {}
    assert set(measured(run_folder, run, text).accuracy) == {text.key}
    assert calls(run) == 1


def test_a_removed_model_is_made_again_only_to_be_scored(
    run_folder: RunFolder, tiny_model_dml: Path, text: EvaluationText
) -> None:
    run = made_by(COPY, run_folder, tiny_model_dml)
    measured(run_folder, run)
    remove_model(run)
    measured(run_folder, run)
    assert calls(run) == 1
    assert text.key in measured(run_folder, run, text).accuracy
    assert calls(run) == 2


@pytest.mark.parametrize("changed", ["command", "inputs"])
def test_another_command_or_base_is_another_run(run_folder: RunFolder, tiny_model_dml: Path, changed: str) -> None:
    run = made_by(COPY, run_folder, tiny_model_dml)
    measured(run_folder, run)
    shutil.rmtree(run.model)
    if changed == "inputs":
        run_folder = replace(run_folder, inputs="another base")
    else:
        run = replace(run, command=(*run.command[:2], COPY + " ", *run.command[3:]))
    measured(run_folder, run)
    assert calls(run) == 2


def test_a_failure_is_kept_until_it_shall_be_tried_again(run_folder: RunFolder, text: EvaluationText) -> None:
    run = made_by(FAIL, run_folder, Path("nowhere"))
    record = measured(run_folder, run, text)
    assert record.failure == "no such method"
    assert record.cost is None
    assert measured(run_folder, run, text) == record
    assert calls(run) == 1
    measured(replace(run_folder, retry_failed=True), run, text)
    assert calls(run) == 2
    assert "Traceback" in (run_folder.folder / "model.log").read_text()


def test_what_comes_before_or_after_may_fail_too(run_folder: RunFolder, tiny_model_dml: Path) -> None:
    def refuse() -> None:
        raise UserError("it can't be installed")

    run = made_by(COPY, run_folder, tiny_model_dml)
    assert measured(run_folder, replace(run, before=refuse)).failure == "it can't be installed"
    assert calls(run) == 0
    again = replace(run_folder, retry_failed=True)
    assert measured(again, replace(run, after=refuse)).failure == "it can't be installed"
    assert calls(run) == 1


def test_a_model_that_cannot_be_scored_failed(run_folder: RunFolder, tiny_model: Path, text: EvaluationText) -> None:
    spoil = COPY + "; open(sys.argv[2] + '/model.onnx', 'w').write('spoilt')"
    run = made_by(spoil, run_folder, tiny_model)
    assert measured(run_folder, run, text).failure is not None


def test_others_go_on_and_are_told_of(run_folder: RunFolder, tiny_model_dml: Path, text: EvaluationText) -> None:
    runs = [made_by(FAIL, run_folder, tiny_model_dml, "first"), made_by(COPY, run_folder, tiny_model_dml, "second")]
    told: list[list[str]] = []

    def tidy(records: Mapping[str, Record]) -> None:
        told.append(list(records))

    records = measure(run_folder, runs, [text], progress_bar(), tidy)
    assert [record.failure for record in records.values()] == ["no such method", None]
    assert told == [["first"], ["first", "second"]]


def test_a_search_takes_the_seconds_that_its_run_took(
    run_folder: RunFolder, tiny_model_dml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sites that were searched at once, or tuned afterwards, have other seconds of their own."""
    sites = [SimpleNamespace(seconds=3.0, held_out_loss=loss) for loss in (0.125, 0.375)]
    store = SimpleNamespace(seconds=lambda: 4.0, reports=lambda: sites)
    monkeypatch.setattr("stages.evaluation.bench.runs.open_store", lambda _: store)
    monkeypatch.setattr("stages.evaluation.bench.runs.bits_per_weight", lambda _: 4.5)
    run = made_by(COPY, run_folder, tiny_model_dml)
    found = run_folder.make(replace(run, weights=run.model)).search
    assert found == Search(seconds=4.0, bits_per_weight=4.5, held_out_loss=0.25)


@pytest.mark.parametrize(("vocabulary", "failure"), [(300, None), (301, "has 301 tokens in its vocabulary")])
def test_another_runtimes_model_is_weighed_and_scored_like_the_others(
    run_folder: RunFolder, text: EvaluationText, vocabulary: int, failure: str | None
) -> None:
    folder = run_folder.folder / "other"
    code = (
        f"import pathlib; folder = pathlib.Path({str(folder)!r}); folder.mkdir(); (folder / 'm').write_bytes(b'12345')"
    )
    uniform = OtherRuntime(
        files=("m",), logits=lambda windows, _: (np.zeros((len(each), vocabulary), np.float32) for each in windows)
    )
    run = Run(name="other", command=(sys.executable, "-c", code), model=folder, runtime=uniform)
    record = measured(run_folder, run, text)
    assert record.bytes == 5
    if failure is None:
        assert record.accuracy[text.key].perplexity == pytest.approx(vocabulary)
        assert record.accuracy[text.key].tokens == 2 * 31
    else:
        assert failure in str(record.failure)
