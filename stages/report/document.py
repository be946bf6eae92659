"""Read and write reports: report.json holds everything that a report shows, and the page is made only from it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from stages.errors import UserError
from stages.evaluation.accuracy import Accuracy
from stages.evaluation.records import Evaluation, ModelRow, OutputEvaluation
from stages.model.sizes import SizePart
from stages.records.results import SiteReport, VerifyReport
from stages.system.json_file import explained, write_whole
from stages.system.paths import from_here

_LOGGER = logging.getLogger(__name__)
REPORT_JSON = "report.json"
REPORT_HTML = "report.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """How a report's first part was made; empty in reports of earlier versions."""

    command: str = ""
    """What a person types to do the same."""
    version: str = ""
    """Of genai-quant."""
    made: str = ""
    """Date and time in UTC."""
    base: str = ""
    """Name of the base model's folder."""
    base_fingerprint: str = ""
    calibration: str = ""
    """The calibration text; empty where none was needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedSite:
    """A quantized site: the choices for it, and its errors."""

    layer: int | None
    """Decoder layer; None outside the layers."""
    kind: str
    """Its name without the layer."""
    in_features: int
    out_features: int
    report: SiteReport
    stored: str = ""
    """Its format in words; empty in reports of earlier versions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedEmbedding:
    """A quantized embedding table."""

    name: str
    stored: str
    """Its format in words."""
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptSite:
    """A site that isn't quantized."""

    site: str
    layer: int | None
    kind: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """One run of stages.quantize."""

    summary: str
    """The algorithm and options, as text."""
    weight_form: str
    bits_per_weight: float
    """Over the quantized sites, scales and zero points included."""
    sites: tuple[QuantizedSite, ...]
    """In graph order."""
    kept: tuple[KeptSite, ...]
    embeddings: tuple[QuantizedEmbedding, ...] = ()
    other_weights: tuple[str, ...] = ()
    """Descriptions of large weights that no MatMul or Gemm reads."""
    sizes: tuple[SizePart, ...] = ()
    """Empty where the models weren't there to look at."""
    verified: VerifyReport | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPoint:
    """One model of a sweep, on one text."""

    name: str
    command: str
    """What a person types to make it again."""
    bytes: int | None
    bits_per_weight: float | None
    search_seconds: float | None
    total_seconds: float | None
    peak_bytes: int | None
    held_out_loss: float | None
    accuracy: Accuracy | None
    loss: float | None
    """KL, or the held-out layer loss where there is no text."""
    on_front: bool
    """Whether no other one beats it in bytes and loss at once."""
    note: str
    """Why it failed, or a remark."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepTable:
    """All models of a sweep on one text."""

    text: str | None
    """None where the models were scored on no text."""
    base: ModelRow | None
    points: tuple[SweepPoint, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A whole report; every part is optional."""

    title: str = ""
    machine: str = ""
    """The machine that its first part was made on."""
    origin: Origin = Origin()
    quantization: Quantization | None = None
    evaluations: tuple[Evaluation, ...] = ()
    """One for each text and choice of models, oldest first."""
    sweep: tuple[SweepTable, ...] = ()
    outputs: tuple[OutputEvaluation, ...] = ()
    """Comparisons of what encoders give, oldest first."""

    def with_outputs(self, evaluation: OutputEvaluation) -> Report:
        """Return this report with ``evaluation`` added, in place of one of the same models on the same samples."""
        outputs = {_judged(one): one for one in self.outputs} | {_judged(evaluation): evaluation}
        return replace(self, outputs=tuple(outputs.values()))

    def with_evaluation(self, evaluation: Evaluation) -> Report:
        """Return this report with ``evaluation`` added, in place of one of the same models on the same text."""
        evaluations = {_subject(one): one for one in self.evaluations} | {_subject(evaluation): evaluation}
        return replace(self, evaluations=tuple(evaluations.values()))


def _subject(evaluation: Evaluation) -> tuple[str, tuple[str, ...]]:
    comparison = evaluation.comparison
    return comparison.text, tuple(name for name, _ in comparison.models)


def _judged(evaluation: OutputEvaluation) -> tuple[str, str, tuple[str, ...]]:
    return evaluation.component, evaluation.source, tuple(row.name for row in evaluation.rows)


_REPORTS = TypeAdapter(Report)


def read_report(folder: Path) -> Report:
    """Return the report in ``folder``, or an empty one where there is none yet.

    Raises:
        UserError: report.json can't be read, or there is a page without it.
    """
    path = folder / REPORT_JSON
    if not path.exists():
        if folder.is_file() or (folder / REPORT_HTML).exists():
            raise UserError(f"{folder} is not empty and holds no {REPORT_JSON} to add to; choose another folder.")
        return Report()
    with explained(f"{path} can't be read as a report of this version", "delete it or choose another folder"):
        return _REPORTS.validate_json(path.read_bytes())


def write_report(report: Report, render: Callable[[Report], str], folder: Path) -> None:
    """Write report.json and the page.

    Args:
        report: what to write.
        render: makes the page.
        folder: made if it isn't there.

    Raises:
        UserError: the folder can't be written.
    """
    files = {REPORT_JSON: _REPORTS.dump_json(report, indent=1), REPORT_HTML: render(report).encode()}
    with explained(f"The report can't be written to {folder}", "choose another folder"):
        for name, content in files.items():
            write_whole(folder / name, content)


def log_report(folder: Path) -> None:
    """Log where the page of a report lies."""
    _LOGGER.info("report: %s", from_here(folder / REPORT_HTML))
