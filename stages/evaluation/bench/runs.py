"""Make models by running commands and score them, each once: measurements are recorded and read the next time.

Next to each model's folder NAME are its record, NAME.run.json, and its command's output, NAME.log. A record counts as
long as the command and its inputs (the base model and its calibration) are the same.
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

import numpy as np
from jaxtyping import Float32
from pydantic import TypeAdapter

from stages.commands.progress import Progress
from stages.errors import UserError, in_one_line
from stages.evaluation.accuracy import Accuracy
from stages.evaluation.compare import PreparedBase, Reference, Windows, open_reference
from stages.evaluation.records import ModelRow
from stages.model.directory import locate_model
from stages.model.sizes import model_bytes
from stages.quantization.weights.store import open_store
from stages.quantization.weights.summary import bits_per_weight
from stages.system.json_file import read_json, write_json
from stages.system.measured_process import Cost, run_measured
from stages.system.paths import shell_line

_RECORD_SUFFIX = ".run.json"


def _do_nothing() -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherRuntime:
    """Run a model that isn't ONNX Runtime's."""

    files: tuple[str, ...]
    """What the model consists of, in its folder."""
    logits: Callable[[Windows, Path], Iterator[Float32[np.ndarray, "L V"]]]
    """Yields the logits of each window of token ids; the path is a folder for files of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One way to make a model: a command that writes it, and what to do before and after, unmeasured."""

    name: str
    command: tuple[str, ...]
    model: Path
    """The folder that the command writes."""
    weights: Path | None = None
    """The folder of quantized weights that it also writes, where it is stages.quantize."""
    before: Callable[[], None] = _do_nothing
    after: Callable[[], None] = _do_nothing
    runtime: OtherRuntime | None = None
    """What runs the model; None is ONNX Runtime."""

    @property
    def model_bytes(self) -> int:
        """Return the size of what was written.

        Raises:
            UserError: the model isn't there.
        """
        if self.runtime is None:
            return model_bytes(locate_model(self.model))
        return sum((self.model / name).stat().st_size for name in self.runtime.files)

    @property
    def shown_command(self) -> str:
        """Return what a person types to make the same model."""
        program = "python" if self.command[0] == sys.executable else self.command[0]
        return shell_line((program, *self.command[1:]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What stages.quantize reports about its search."""

    seconds: float
    bits_per_weight: float
    held_out_loss: float | None
    """Mean over the sites of the relative squared output error on held-out text; None where nothing was searched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is known of a run: the file NAME.run.json."""

    command: tuple[str, ...]
    inputs: str
    """Fingerprint of the base model and its calibration."""
    failure: str | None = None
    """Why it failed, in one sentence."""
    cost: Cost | None = None
    bytes: int | None = None
    search: Search | None = None
    accuracy: dict[str, Accuracy] = field(default_factory=dict)
    """By the text's key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationText:
    """A text to score models on, with the base and its windows of the text."""

    text: str
    base: PreparedBase

    @property
    def key(self) -> str:
        """Return the fingerprint of everything, apart from the models, that scores depend on."""
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
    """Whether to make runs again that failed before."""

    def base_row(self, text: EvaluationText) -> ModelRow | None:
        """Return the base's own row; None where it wasn't scored yet."""
        return read_json(self._base_file(text), _ROWS)

    @contextmanager
    def open_reference(self, text: EvaluationText, progress: Progress) -> Iterator[Reference]:
        """Run the base on a text, record its own row, and yield its logits to score models against."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open_reference(text.base, progress) as reference:
            write_json(self._base_file(text), _ROWS, reference.row)
            yield reference

    def find(self, run: Run, texts: Sequence[EvaluationText]) -> Record | None:
        """Return the record of ``run`` if its command and inputs are the same, and what it lacks can be scored."""
        record = read_json(self._record_file(run), _RECORDS)
        if record is None or (record.command, record.inputs) != (run.command, self.inputs):
            return None
        if record.failure is not None:
            return None if self.retry_failed else record
        scored = all(text.key in record.accuracy for text in texts)
        return record if scored or run.model.is_dir() else None

    def make(self, run: Run) -> Record:
        """Run the command and record what it took; a failure is recorded too."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = Record(command=run.command, inputs=self.inputs)
        try:
            run.before()
            cost = run_measured(run.command, self.folder / f"{run.name}.log")
            run.after()
            size = run.model_bytes
            search = None if run.weights is None else _read_search(run.weights)
            record = replace(record, cost=cost, bytes=size, search=search)
        except UserError as error:
            record = replace(record, failure=str(error))
        self._save(run, record)
        return record

    def score(self, run: Run, record: Record, references: Mapping[str, Reference], progress: Progress) -> Record:
        """Score the model of ``run`` against each reference that its record lacks, and record that.

        Args:
            run: whose model is scored.
            record: what is known of it.
            references: the base's logits, by the text's key.
            progress: shows how many windows are scored.
        """
        for key, reference in references.items():
            if record.failure is None and key not in record.accuracy:
                try:
                    accuracy = _score(run, reference, progress)
                    record = replace(record, accuracy={**record.accuracy, key: accuracy})
                except UserError as error:
                    record = replace(record, failure=str(error))
                self._save(run, record)
        return record

    def _base_file(self, text: EvaluationText) -> Path:
        return self.folder / f"base.{self.inputs[:8]}.{text.key}.json"

    def _record_file(self, run: Run) -> Path:
        return self.folder / f"{run.name}{_RECORD_SUFFIX}"

    def _save(self, run: Run, record: Record) -> None:
        write_json(self._record_file(run), _RECORDS, record)


@contextmanager
def explain_write_errors(folder: Path) -> Iterator[None]:
    """Raise UserError where the block can't write its measurements into ``folder``."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--output {folder} can't be written ({in_one_line(error)}); free space there or choose another folder "
            "(what is finished stays, and the same command goes on from there)."
        ) from error


def measure(
    run_folder: RunFolder,
    runs: Sequence[Run],
    texts: Sequence[EvaluationText],
    progress: Progress,
    tidy: Callable[[Mapping[str, Record]], None],
) -> dict[str, Record]:
    """Make and score all models that aren't recorded yet, and return all records by the run's name.

    Args:
        run_folder: where models and records are kept.
        runs: the ways to make the models.
        texts: what to score them on; none for no scores.
        progress: shows how many models are done.
        tidy: called after each run with the records so far.
    """
    task = progress.add_task("sweep", total=len(runs), unit="models", keeps="models")
    records: dict[str, Record] = {}
    with explain_write_errors(run_folder.folder), _references(run_folder, runs, texts, progress) as references:
        for run in runs:
            progress.update(task, now=run.name)
            record = run_folder.find(run, texts) or run_folder.make(run)
            records[run.name] = run_folder.score(run, record, references, progress)
            tidy(records)
            progress.advance(task)
    return records


@contextmanager
def _references(
    run_folder: RunFolder, runs: Sequence[Run], texts: Sequence[EvaluationText], progress: Progress
) -> Iterator[dict[str, Reference]]:
    """Yield the base's logits, by the text's key, on every text that a run wasn't scored on."""
    with ExitStack() as stack:
        yield {
            text.key: stack.enter_context(run_folder.open_reference(text, progress))
            for text in texts
            if run_folder.base_row(text) is None or any(_lacks(run_folder.find(run, texts), text) for run in runs)
        }


def _score(run: Run, reference: Reference, progress: Progress) -> Accuracy:
    if run.runtime is None:
        return reference.score(locate_model(run.model), progress).accuracy
    return reference.score_logits(run.model, run.runtime.logits(reference.base.windows, reference.scratch))


def _lacks(record: Record | None, text: EvaluationText) -> bool:
    return record is None or (record.failure is None and text.key not in record.accuracy)


def read_records(folder: Path) -> dict[str, Record]:
    """Return every readable record in ``folder`` by the run's name, whatever its inputs."""
    return {
        path.name.removesuffix(_RECORD_SUFFIX): record
        for path in sorted(folder.glob(f"*{_RECORD_SUFFIX}"))
        if (record := read_json(path, _RECORDS)) is not None
    }


def read_base_rows(folder: Path) -> dict[str, ModelRow]:
    """Return the base's own rows in ``folder`` by their text's key."""
    return {
        path.name.split(".")[-2]: row
        for path in sorted(folder.glob("base.*.json"))
        if (row := read_json(path, _ROWS)) is not None
    }


def _read_search(weights: Path) -> Search:
    store = open_store(weights)
    losses = [report.held_out_loss for report in store.reports() if report.held_out_loss is not None]
    return Search(
        seconds=store.seconds(),
        bits_per_weight=bits_per_weight(store),
        held_out_loss=mean(losses) if losses else None,
    )


def remove_model(run: Run) -> None:
    """Delete what the command of ``run`` wrote; its record stays."""
    for folder in (run.model, run.weights):
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
