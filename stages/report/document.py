"""report.json: everything that a report shows, as frozen types; the page is made from nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from stages.errors import UserError
from stages.evaluation.accuracy import Accuracy
from stages.evaluation.records import Evaluation, ModelRow
from stages.model.sizes import SizePart
from stages.records.results import SiteReport, VerifyReport
from stages.system.json_file import explained, write_whole

_LOGGER = logging.getLogger(__name__)
REPORT_JSON = "report.json"
REPORT_HTML = "report.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedSite:
    """A site, what was chosen for it, and what it lost."""

    layer: int | None
    """Decoder layer; None outside the layers."""
    kind: str
    """Its name without the layer."""
    in_features: int
    out_features: int
    report: SiteReport


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptSite:
    """A site that stays as it is."""

    site: str
    layer: int | None
    kind: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """One run of stages.quantize."""

    summary: str
    """Algorithm and options in words."""
    weight_form: str
    bits_per_weight: float
    """Over the quantized sites, scales and zero points included."""
    sites: tuple[QuantizedSite, ...]
    """In graph order."""
    kept: tuple[KeptSite, ...]
    other_weights: tuple[str, ...] = ()
    """In words: large weights that no MatMul or Gemm reads."""
    sizes: tuple[SizePart, ...] = ()
    """None where the models weren't at hand."""
    verified: VerifyReport | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPoint:
    """One model of a sweep."""

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
    """What is weighed against bytes."""
    on_front: bool
    """Whether no other one beats it in bytes and loss at once."""
    note: str
    """Why it failed, or a remark."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepTable:
    """The points of a sweep on one text."""

    text: str | None
    """None where no text judged them: then the loss is that of the layers on held-out text."""
    base: ModelRow | None
    points: tuple[SweepPoint, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A whole report; each part is there or not."""

    title: str = ""
    machine: str = ""
    """Where its first part was made."""
    quantization: Quantization | None = None
    evaluations: tuple[Evaluation, ...] = ()
    """One a text and choice of models, in the order in which they came."""
    sweep: tuple[SweepTable, ...] = ()

    def with_evaluation(self, evaluation: Evaluation) -> Document:
        """This report with ``evaluation`` in place of one of the same models on the same text, or added."""
        others = [one for one in self.evaluations if _subject(one) != _subject(evaluation)]
        return replace(self, evaluations=(*others, evaluation))


def _subject(evaluation: Evaluation) -> tuple[str, tuple[str, ...]]:
    comparison = evaluation.comparison
    return comparison.text, tuple(name for name, _ in comparison.models)


_DOCUMENTS = TypeAdapter(Document)


def read_document(folder: Path) -> Document:
    """The report in ``folder``; an empty one where there is none yet.

    Raises:
        UserError: there is a report.json of another kind, or only a page.
    """
    path = folder / REPORT_JSON
    if not path.exists():
        if folder.is_file() or (folder / REPORT_HTML).exists():
            raise UserError(f"{folder} holds no {REPORT_JSON} to add to, and is not empty; choose another folder.")
        return Document()
    with explained(f"{path} can't be read as a report of this version", "delete it or choose another folder"):
        return _DOCUMENTS.validate_json(path.read_bytes())


def write_report(document: Document, render: Callable[[Document], str], folder: Path) -> None:
    """Write report.json and the page that ``render`` makes from it, and log where the page lies.

    Raises:
        UserError: the folder can't be written.
    """
    files = {REPORT_JSON: _DOCUMENTS.dump_json(document, indent=1), REPORT_HTML: render(document).encode()}
    with explained(f"The report can't be written to {folder}", "choose another folder"):
        for name, content in files.items():
            write_whole(folder / name, content)
    _LOGGER.info("report: %s", folder / REPORT_HTML)
