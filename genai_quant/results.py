"""What the Python functions return, and how it is gathered from what the commands show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from export.export_model import ExportSummary
from stages.report import SearchSummary
from stages.screen import Finding

Record = TypeVar("Record")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedModel:
    """A quantized model on disk, and how it came about."""

    folder: Path
    """onnxruntime-genai loads it as it stands."""
    onnx_file: Path
    weights: Path
    """Folder of the quantized weights, for another ``export``."""
    search: SearchSummary
    export: ExportSummary


class Gathered:
    """Findings that are kept for the program that asked, not printed."""

    def __init__(self) -> None:
        self._records: list[object] = []

    def show(self, finding: Finding) -> None:
        """Keep the record; nobody sees the table."""
        self._records.append(finding.record)

    def end(self, error: str | None) -> None:
        """Errors are raised, so there is nothing to keep."""

    def of_type(self, kind: type[Record]) -> Record:
        """The one record of this type."""
        (record,) = (record for record in self._records if isinstance(record, kind))
        return record
