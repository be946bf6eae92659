"""Results are read as they were written, without what belongs to one machine."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

from scripts.write_tables.results import (
    ArchitecturesResult,
    Provenance,
    provenance,
    read_results,
    save_result,
    without_commands,
)
from scripts.write_tables.tables import architectures
from tests.scripts.architectures.test_matrix import DONE
from tests.scripts.write_tables.test_tables import comparison


def test_results_are_read_as_they_were_written_and_replaced_by_title(tmp_path: Path) -> None:
    one, other = comparison("Qwen 2.5 (0.5B)"), comparison()
    for result in (one, other, other):
        save_result(result, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "comparison-qwen-2.5-0.5b.json",
        "comparison-smollm2-135m-instruct.json",
    ]
    assert read_results(tmp_path) == [one, other]


def test_architectures_that_were_measured_again_stand_beside_the_earlier_ones(tmp_path: Path) -> None:
    first, second, third = (
        Provenance(date=f"2026-11-2{day}", commit=f"c{day}", versions=("onnxruntime 1",), machine="m")
        for day in range(3)
    )
    a, b, c = (replace(DONE, architecture=name) for name in "ABC")
    described = {name: (f"Model {name}", "") for name in "ABC"}
    save_result(ArchitecturesResult(provenance=first, cells=(a, b, c), described=described), tmp_path)
    again = (replace(b, sites=7, fused=7), replace(c, sites=8, fused=8))
    save_result(ArchitecturesResult(provenance=second, cells=again, described=described), tmp_path)
    last = replace(c, sites=9, fused=9)
    save_result(ArchitecturesResult(provenance=third, cells=(last,), described=described), tmp_path)
    (found,) = read_results(tmp_path)
    assert isinstance(found, ArchitecturesResult)
    assert found.provenance == first
    assert sorted(found.cells, key=lambda cell: cell.architecture) == [a, again[0], last]
    assert found.later == {"B": second, "C": third}
    text = architectures([found])
    assert "Measured on 2026-11-20 at commit c0" in text
    assert "`B`: measured on 2026-11-21 at commit c1" in text
    assert "`C`: measured on 2026-11-22 at commit c2" in text


def test_no_command_is_published() -> None:
    texts = without_commands(comparison().comparison).texts
    assert {model.command for text in texts for model in text.models} == {""}


def test_a_changed_source_shows_in_the_commit(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=e")
        return subprocess.run(
            ("git", "-C", str(tmp_path), *identity, *arguments), check=True, capture_output=True, text=True
        ).stdout.strip()

    (tmp_path / "stages").mkdir()
    for name in ("stages/a.py", "README.md"):
        (tmp_path / name).write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "c")
    (tmp_path / "README.md").write_text("2")
    commit = git("rev-parse", "--short=8", "HEAD")
    assert provenance(tmp_path).commit == commit
    (tmp_path / "stages/a.py").write_text("2")
    found = provenance(tmp_path)
    assert found.commit == f"{commit}-dirty"
    assert {version.split()[0] for version in found.versions} == {
        "onnxruntime", "onnxruntime-genai", "torch", "nvidia-modelopt",
    }  # fmt: skip
