"""Read and write the measured results that pages show: JSON files in docs/results."""

from __future__ import annotations

import datetime
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnxruntime
import torch
from pydantic import TypeAdapter

from scripts.architectures.matrix import Cell
from scripts.benchmarks.figures import Benchmark
from scripts.peers.comparison import Comparison
from scripts.write_tables.support_matrix import FamilyResult
from stages.runtime.genai import runtime_version
from stages.system.hardware import describe_machine
from stages.system.json_file import Records, explained, write_json

_SOURCES = ("stages", "export", "genai_quant", "scripts")
_MODELOPT_PINS = Path(__file__).parents[1] / "peers" / "modelopt.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """When, where and with what something was measured."""

    date: str
    commit: str
    """Its short hash, and -dirty where the sources held something else."""
    versions: tuple[str, ...]
    """Packages as "name version"."""
    machine: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonResult:
    """One model, quantized by us and by others."""

    title: str
    """The model's name."""
    provenance: Provenance
    comparison: Comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkResult:
    """Time and memory on one model."""

    title: str
    """The model's name."""
    provenance: Provenance
    benchmark: Benchmark


@dataclass(frozen=True, slots=True, kw_only=True)
class FamiliesResult:
    """The model families that the tests take the whole way."""

    provenance: Provenance
    families: tuple[FamilyResult, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchitecturesResult:
    """What became of every architecture that onnxruntime-genai's builder knows."""

    provenance: Provenance
    cells: tuple[Cell, ...]
    described: dict[str, tuple[str, str]]
    """Of each architecture: released models that have it, and what sets it apart."""
    later: dict[str, Provenance] = field(default_factory=dict)
    """Of the architectures that were measured again since."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimesResult:
    """How long commands take."""

    provenance: Provenance
    seconds: dict[str, float]
    """By command line."""


Result = ComparisonResult | BenchmarkResult | FamiliesResult | ArchitecturesResult | TimesResult
_RESULTS: Records[Result] = TypeAdapter(Result)


def read_results(folder: Path) -> list[Result]:
    """Read all results in ``folder``, by file name.

    Raises:
        UserError: a file can't be read.
    """
    results = []
    for file in sorted(folder.glob("*.json")):
        with explained(f"{file} can't be read", "measure again and write it with scripts.write_tables"):
            results.append(_RESULTS.validate_json(file.read_bytes()))
    return results


def save_result(result: Result, folder: Path) -> None:
    """Write ``result`` into ``folder``; an earlier one of the same kind and model is replaced.

    Of architectures only those that ``result`` has are replaced.
    """
    if isinstance(result, ArchitecturesResult):
        result = _with_earlier(result, [one for one in read_results(folder) if isinstance(one, ArchitecturesResult)])
    kind = type(result).__name__.removesuffix("Result")
    title = result.title if isinstance(result, ComparisonResult | BenchmarkResult) else ""
    write_json(folder / f"{re.sub(r'[^a-z0-9.]+', '-', f'{kind} {title}'.lower()).strip('-')}.json", _RESULTS, result)


def _with_earlier(result: ArchitecturesResult, earlier: Sequence[ArchitecturesResult]) -> ArchitecturesResult:
    """Return ``result`` with the cells of other architectures that were measured before."""
    again = {cell.architecture for cell in result.cells}
    for before in earlier:
        if kept := tuple(cell for cell in before.cells if cell.architecture not in again):
            since = {name: one for name, one in before.later.items() if name not in again}
            result = replace(
                result,
                provenance=before.provenance,
                cells=(*kept, *result.cells),
                later={**since, **dict.fromkeys(sorted(again), result.provenance)},
            )
    return result


def without_commands(comparison: Comparison) -> Comparison:
    """Return ``comparison`` without command lines, which hold paths of one machine."""
    texts = (
        replace(text, models=tuple(replace(model, command="") for model in text.models)) for text in comparison.texts
    )
    return replace(comparison, texts=tuple(texts))


def provenance(root: Path) -> Provenance:
    """Return today's date, the commit in ``root``, this machine and the versions that matter."""
    changed = _git(root, "status", "--porcelain", "--", *_SOURCES)
    (modelopt,) = re.findall(r"^nvidia-modelopt==(\S+)$", _MODELOPT_PINS.read_text(encoding="utf-8"), re.MULTILINE)
    return Provenance(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        commit=_git(root, "rev-parse", "--short=8", "HEAD") + ("-dirty" if changed else ""),
        versions=(
            f"onnxruntime {onnxruntime.__version__}",
            runtime_version("scripts.write_tables"),
            f"torch {torch.__version__}",
            f"nvidia-modelopt {modelopt}",
        ),
        machine=describe_machine(),
    )


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(("git", "-C", str(root), *arguments), capture_output=True, text=True, check=True)
    return done.stdout.strip()
