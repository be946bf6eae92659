"""Make models by commands and judge them, each once: what was measured is written down and read the next time.

Beside every model lies NAME.run.json, its record, and NAME.log, what its command printed. A record counts as long as
its command and what that works on (the base model and its calibration) are the same.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean

from pydantic import TypeAdapter

from stages.commands.progress import Progress
from stages.errors import UserError, in_one_line
from stages.evaluation.accuracy import Accuracy
from stages.evaluation.compare import PreparedBase, Reference, open_reference
from stages.evaluation.records import ModelRow
from stages.model.directory import locate_model
from stages.model.sizes import stored_bytes
from stages.quantization.weights.store import open_store
from stages.quantization.weights.summary import bits_per_weight
from stages.system.json_file import read_json, write_json
from stages.system.measured_process import Cost, run_measured
from stages.system.paths import shell_line

_RECORD_SUFFIX = ".run.json"


def _nothing() -> None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One way to make a model: a command that writes ``model``, and what happens before and after, unmeasured."""

    name: str
    command: tuple[str, ...]
    model: Path
    """The folder that appears."""
    weights: Path | None = None
    """The folder of quantized weights that appears, where the command is stages.quantize."""
    before: Callable[[], None] = _nothing
    after: Callable[[], None] = _nothing

    @property
    def shown_command(self) -> str:
        """What a person types to make the same model."""
        program = "python" if self.command[0] == sys.executable else self.command[0]
        return shell_line((program, *self.command[1:]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What stages.quantize reports of its search."""

    seconds: float
    bits_per_weight: float
    held_out_loss: float | None
    """Mean over the sites of the relative squared output error on held-out text; None where nothing was searched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is known of a run."""

    command: tuple[str, ...]
    inputs: str
    failure: str | None = None
    """The sentence that it failed with."""
    cost: Cost | None = None
    bytes: int | None = None
    search: Search | None = None
    accuracy: dict[str, Accuracy] = field(default_factory=dict)
    """By the key of the evaluation_text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationText:
    """A text that models are judged on, and the base on it."""

    text: str
    base: PreparedBase

    @property
    def key(self) -> str:
        """Fingerprint of everything but the models that the numbers depend on."""
        settings = self.base.settings
        parts = (self.base.tokens, settings.accuracy_level, settings.providers)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


_RECORDS = TypeAdapter(Record)
_ROWS = TypeAdapter(ModelRow)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """A folder of measured models."""

    folder: Path
    inputs: str
    """Fingerprint of the base model and its calibration."""
    retry_failed: bool
    """Make runs again that failed before."""

    def base_row(self, evaluation_text: EvaluationText) -> ModelRow | None:
        """The base's own row, where it was judged."""
        return read_json(self._base_file(evaluation_text), _ROWS)

    @contextmanager
    def open_reference(self, evaluation_text: EvaluationText, progress: Progress) -> Iterator[Reference]:
        """The base's logits on a text; its own row is written down."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open_reference(evaluation_text.base, progress) as reference:
            write_json(self._base_file(evaluation_text), _ROWS, reference.row)
            yield reference

    def find(self, run: Run, evaluation_texts: Sequence[EvaluationText]) -> Record | None:
        """The record of ``run`` if it is one of this command, and whole, or its model is there to be judged."""
        record = read_json(self._record_file(run), _RECORDS)
        if record is None or (record.command, record.inputs) != (run.command, self.inputs):
            return None
        if record.failure is not None:
            return None if self.retry_failed else record
        judged = all(evaluation_text.key in record.accuracy for evaluation_text in evaluation_texts)
        return record if judged or run.model.is_dir() else None

    def make(self, run: Run) -> Record:
        """Run the command; a failure is a record too."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = Record(command=run.command, inputs=self.inputs)
        try:
            run.before()
            cost = run_measured(run.command, self.folder / f"{run.name}.log")
            run.after()
            size = stored_bytes(locate_model(run.model))
            search = None if run.weights is None else _read_search(run.weights)
            record = replace(record, cost=cost, bytes=size, search=search)
        except UserError as error:
            record = replace(record, failure=str(error))
        self._save(run, record)
        return record

    def judge(self, run: Run, record: Record, references: Mapping[str, Reference], progress: Progress) -> Record:
        """Score the model of ``run`` against each reference that it has no accuracy for yet."""
        for key, reference in references.items():
            if record.failure is None and key not in record.accuracy:
                record = self._judged(run, record, key, reference, progress)
        return record

    def _judged(self, run: Run, record: Record, key: str, reference: Reference, progress: Progress) -> Record:
        try:
            row = reference.score(locate_model(run.model), progress)
            record = replace(record, accuracy={**record.accuracy, key: row.accuracy})
        except UserError as error:
            record = replace(record, failure=str(error))
        self._save(run, record)
        return record

    def _base_file(self, evaluation_text: EvaluationText) -> Path:
        return self.folder / f"base.{self.inputs[:8]}.{evaluation_text.key}.json"

    def _record_file(self, run: Run) -> Path:
        return self.folder / f"{run.name}{_RECORD_SUFFIX}"

    def _save(self, run: Run, record: Record) -> None:
        write_json(self._record_file(run), _RECORDS, record)


@contextmanager
def room_in(folder: Path) -> Iterator[None]:
    """Raise UserError where what is measured can't be written down."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--output {folder} can't be written ({in_one_line(error)}); free space or choose another folder (what is "
            "finished stays, and the same command goes on)."
        ) from error


def measure(
    run_folder: RunFolder,
    runs: Sequence[Run],
    evaluation_texts: Sequence[EvaluationText],
    progress: Progress,
    tidy: Callable[[Mapping[str, Record]], None],
) -> dict[str, Record]:
    """Make and judge all runs that aren't written down; ``tidy`` is told after each what there is, by name."""
    task = progress.add_task("sweep", total=len(runs), unit="models")
    records: dict[str, Record] = {}
    with room_in(run_folder.folder), _references(run_folder, runs, evaluation_texts, progress) as references:
        for run in runs:
            progress.update(task, now=run.name)
            record = run_folder.find(run, evaluation_texts) or run_folder.make(run)
            records[run.name] = run_folder.judge(run, record, references, progress)
            tidy(records)
            progress.advance(task)
    return records


@contextmanager
def _references(
    run_folder: RunFolder, runs: Sequence[Run], evaluation_texts: Sequence[EvaluationText], progress: Progress
) -> Iterator[dict[str, Reference]]:
    """The base's logits on every text that a run hasn't been judged on."""
    with ExitStack() as stack:
        yield {
            evaluation_text.key: stack.enter_context(run_folder.open_reference(evaluation_text, progress))
            for evaluation_text in evaluation_texts
            if run_folder.base_row(evaluation_text) is None
            or any(_lacks(run_folder.find(run, evaluation_texts), evaluation_text) for run in runs)
        }


def _lacks(record: Record | None, evaluation_text: EvaluationText) -> bool:
    return record is None or (record.failure is None and evaluation_text.key not in record.accuracy)


def read_records(folder: Path) -> dict[str, Record]:
    """Every readable record in ``folder`` by the run's name, whatever its inputs."""
    return {
        path.name.removesuffix(_RECORD_SUFFIX): record
        for path in sorted(folder.glob(f"*{_RECORD_SUFFIX}"))
        if (record := read_json(path, _RECORDS)) is not None
    }


def read_base_rows(folder: Path) -> dict[str, ModelRow]:
    """The base's own rows in ``folder`` by the key of their evaluation_text."""
    return {
        path.name.split(".")[-2]: row
        for path in sorted(folder.glob("base.*.json"))
        if (row := read_json(path, _ROWS)) is not None
    }


def _read_search(weights: Path) -> Search:
    store = open_store(weights)
    reports = store.reports()
    losses = [report.held_out_loss for report in reports if report.held_out_loss is not None]
    return Search(
        seconds=sum(report.seconds for report in reports),
        bits_per_weight=bits_per_weight(store),
        held_out_loss=mean(losses) if losses else None,
    )


def remove_model(run: Run) -> None:
    """Delete what the command of ``run`` wrote; its record stays."""
    for folder in (run.model, run.weights):
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
