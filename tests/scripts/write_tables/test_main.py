"""The pages hold exactly what docs/results says, and new results replace old ones."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from scripts.architectures.matrix import append_cell
from scripts.benchmarks.figures import Benchmark, CommandFigure, Machine
from scripts.options import TablesConfig
from scripts.peers.comparison import save_comparison
from scripts.write_tables.__main__ import ROOT, fill, new_results, pages_with_tables
from scripts.write_tables.results import (
    ArchitecturesResult,
    BenchmarkResult,
    ComparisonResult,
    FamiliesResult,
    Provenance,
    Result,
    TimesResult,
    save_result,
    without_commands,
)
from scripts.write_tables.support_matrix import FamilyResult
from stages.errors import OptionError, UserError
from stages.system.hardware import describe_machine
from tests.scripts.architectures.test_matrix import DONE
from tests.scripts.write_tables.test_support_matrix import RESULT
from tests.scripts.write_tables.test_tables import comparison

HERE = Provenance(date="2026-01-02", commit="abc", versions=("torch 2",), machine="a machine")


@pytest.fixture
def copied_pages(tmp_path: Path) -> Path:
    """Copy the repository's pages and results, to be changed."""
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    return tmp_path


def outdated(root: Path) -> set[str]:
    return {page.name for page, text in pages_with_tables(root).items() if page.read_text(encoding="utf-8") != text}


def test_the_pages_agree_with_the_results() -> None:
    assert outdated(ROOT) == set(), "run python -m scripts.write_tables; tables are not edited by hand"


@pytest.mark.parametrize(
    ("page", "block"), [("README.md", "results"), ("docs/benchmarks.md", "cost"), ("docs/model-support.md", "families")]
)
def test_a_number_written_by_hand_is_found(copied_pages: Path, page: str, block: str) -> None:
    file = copied_pages / page
    file.write_text(fill(file.read_text(), block, "| 0.123 |", page))
    assert outdated(copied_pages) == {file.name}


def test_new_results_reach_their_page_and_only_it(copied_pages: Path) -> None:
    result: Result = TimesResult(provenance=HERE, seconds={"bash scripts/check.sh": 272.4})
    save_result(result, copied_pages / "docs/results")
    assert outdated(copied_pages) == {"README.md"}
    text = pages_with_tables(copied_pages)[copied_pages / "README.md"]
    assert "| `bash scripts/check.sh` | 4 min 32 s |" in text
    assert "Measured on 2026-01-02 at commit abc with torch 2; a machine." in text


def test_what_was_measured_becomes_results(tmp_path: Path) -> None:
    save_comparison(comparison().comparison, tmp_path)
    machine = Machine(processor="CPU X", cores=2, threads=2, gpu=None, versions={})
    figure = CommandFigure(name="calibrate", command="python -m secret", seconds=30.0, peak_bytes=10**8)
    benchmark = Benchmark(machine=machine, base="models/base", commands=(figure,))
    (tmp_path / "benchmark.json").write_bytes(TypeAdapter(Benchmark).dump_json(benchmark))
    (tmp_path / "families.jsonl").write_bytes(TypeAdapter(FamilyResult).dump_json(RESULT) + b"\n")
    append_cell(DONE, tmp_path / "architectures.jsonl")
    config = TablesConfig(
        compare=tmp_path,
        benchmark=tmp_path,
        title="SmolLM2-135M-Instruct",
        families=tmp_path / "families.jsonl",
        architectures=tmp_path / "architectures.jsonl",
        times={"x": 1.0},
    )
    compared, measured, families, architectures, times = new_results(config)
    assert isinstance(compared, ComparisonResult)
    assert compared.comparison == without_commands(comparison().comparison)
    assert isinstance(measured, BenchmarkResult)
    assert measured.benchmark == replace(benchmark, commands=(replace(figure, command=""),))
    assert isinstance(families, FamiliesResult)
    assert families.families == (RESULT,)
    assert isinstance(architectures, ArchitecturesResult)
    assert architectures.cells == (DONE,)
    assert architectures.provenance.versions[-1].startswith("transformers ")
    assert isinstance(times, TimesResult)
    assert {result.provenance.machine for result in (compared, measured, families, times)} == {describe_machine()}


@pytest.mark.parametrize("option", ["compare", "benchmark"])
def test_a_folder_without_measurements_is_named(tmp_path: Path, option: str) -> None:
    with pytest.raises(UserError, match=rf"can't be read .*; pass the --output of scripts\.{option}"):
        list(new_results(TablesConfig(title="x", **{option: tmp_path})))


def test_a_block_is_replaced_between_its_markers() -> None:
    page = "a\n<!-- x -->\nold\nrows\n<!-- /x -->\nb\n"
    assert fill(page, "x", r"new \1", "p.md") == "a\n<!-- x -->\nnew \\1\n<!-- /x -->\nb\n"


@pytest.mark.parametrize("page", ["", "<!-- x -->\n", "<!-- x -->\n<!-- /x -->\n<!-- x -->\n<!-- /x -->\n"])
def test_a_page_without_the_markers_is_named(page: str) -> None:
    with pytest.raises(UserError, match=r"p\.md needs one line <!-- x -->"):
        fill(page, "x", "new", "p.md")


def test_damaged_results_are_named(copied_pages: Path) -> None:
    (copied_pages / "docs/results").mkdir(exist_ok=True)
    (copied_pages / "docs/results/x.json").write_text("{}")
    with pytest.raises(UserError, match=r"x\.json can't be read"):
        pages_with_tables(copied_pages)


def test_a_model_needs_its_name() -> None:
    with pytest.raises(OptionError, match="--title"):
        TablesConfig(compare=Path("proof")).validate()
