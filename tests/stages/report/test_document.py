"""Reports: what is written is what is read; foreign files are refused, parts are added and replaced."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stages.errors import UserError
from stages.evaluation.records import OutputEvaluation, OutputRow
from stages.report.document import Report, read_report, write_report
from tests.stages.report import sample


def render(report: Report) -> str:
    return f"a page of {report.title}"


def test_reports_are_read_as_they_were_written(tmp_path: Path) -> None:
    report = sample.whole_report()
    write_report(report, render, tmp_path / "deep" / "report")
    page = tmp_path / "deep" / "report" / "report.html"
    assert page.read_text(encoding="utf-8") == f"a page of {report.title}"
    assert read_report(page.parent) == report
    assert sorted(file.name for file in page.parent.iterdir()) == ["report.html", "report.json"]


def test_a_new_folder_is_an_empty_report(tmp_path: Path) -> None:
    assert read_report(tmp_path / "nothing") == Report()
    assert not (tmp_path / "nothing").exists()


def test_foreign_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"holds no report\.json to add to"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text('{"title": 3}', encoding="utf-8")
    with pytest.raises(UserError, match=r"report\.json can't be read as a report of this version \(title: .*\)"):
        read_report(tmp_path)
    with pytest.raises(UserError, match="holds no"):
        read_report(tmp_path / "report.html")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"report can't be written to .*file"):
        write_report(Report(), render, tmp_path / "file" / "report")


def test_an_evaluation_replaces_that_of_its_text_and_models() -> None:
    first, second = sample.evaluation("a"), sample.evaluation("b")
    changed = replace(first, comparison=replace(first.comparison, windows=9))
    others = replace(first, comparison=replace(first.comparison, models=(("base", "f"), ("other", "e"))))
    report = Report().with_evaluation(first).with_evaluation(second).with_evaluation(changed)
    assert report.evaluations == (changed, second), "texts keep their order"
    assert report.with_evaluation(others).evaluations == (changed, second, others)


def test_outputs_replace_those_of_their_samples_and_models() -> None:
    rows = tuple(OutputRow(name=name, bytes=9, accuracy_level="4", scores=()) for name in ("base", "int4"))
    int4 = OutputEvaluation(component="vision", source="images", samples=2, rows=rows)
    int8, again = replace(int4, rows=(rows[0], replace(rows[1], name="int8"))), replace(int4, samples=3)
    report = Report().with_outputs(int4).with_outputs(int8).with_outputs(again)
    assert report.outputs == (again, int8)
