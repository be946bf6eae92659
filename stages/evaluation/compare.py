"""Run a base model and others on the same windows of text and compare their logits, one session at a time."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from jaxtyping import Float32, Int64
from pydantic import TypeAdapter, ValidationError
from rich.progress import Progress

from stages.atomic import whole_file
from stages.base_graph import external_files, load_graph
from stages.config import EvaluateConfig
from stages.errors import UserError
from stages.evaluation.accuracy import Accuracy, TokenScores, score_window, summarize
from stages.fingerprint import fingerprint_model
from stages.model_directory import ModelDirectory, locate_model
from stages.observe.dataset import pack_windows
from stages.observe.offline_text import offline_evaluation_text
from stages.observe.tokenizer import load_tokenizer
from stages.session import CausalFeeds, SessionSettings, choose_providers, open_session
from stages.widen import must_widen, runnable_file

Windows = Int64[np.ndarray, "windows seq_len"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What is compared with what; two equal comparisons have equal numbers."""

    models: tuple[tuple[str, str], ...]
    """(folder name, fingerprint), the base first."""
    tokens: str
    """sha256 of the windows."""
    accuracy_level: int
    providers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """One line of the table."""

    name: str
    bytes: int
    """The .onnx file and the external data that it refers to."""
    accuracy: Accuracy
    widened: bool = False
    """Whether it holds bfloat16 and ran as float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The base's row first."""

    comparison: Comparison
    rows: tuple[ModelRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedBase:
    """The base found and the text cut into windows; nothing has run yet."""

    directory: ModelDirectory
    windows: Windows
    settings: SessionSettings

    @property
    def tokens(self) -> str:
        """sha256 of the windows."""
        return hashlib.sha256(repr(self.windows.shape).encode() + self.windows.tobytes()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedEvaluation:
    """The base with its text, and the models to compare with it."""

    base: PreparedBase
    models: tuple[ModelDirectory, ...]
    comparison: Comparison


_REPORTS = TypeAdapter(Report)


def prepare_base(config: EvaluateConfig) -> PreparedBase:
    """Find the base and tokenize the text with its tokenizer.

    Raises:
        UserError: the base, its tokenizer or the text can't be read, or the text is too short.
    """
    directory = locate_model(config.base)
    return PreparedBase(
        directory=directory,
        windows=_read_windows(config, directory.folder),
        settings=SessionSettings(
            providers=choose_providers(config.eps, "--eps").names, accuracy_level=config.accuracy_level
        ),
    )


def prepare(config: EvaluateConfig) -> PreparedEvaluation:
    """``prepare_base``, and find the models.

    Raises:
        UserError: a model, the tokenizer or the text can't be read, or the text is too short.
    """
    if not config.model:
        raise UserError("--model names no model; pass one or more folders to compare with --base.")
    directories = tuple(locate_model(path) for path in (config.base, *config.model))
    for directory in directories[1:]:
        _check_vocabulary(directory.folder, _vocabulary(directories[0]), _vocabulary(directory))
    base = prepare_base(config)
    comparison = Comparison(
        models=tuple((directory.folder.name, fingerprint_model(directory)) for directory in directories),
        tokens=base.tokens,
        accuracy_level=config.accuracy_level,
        providers=base.settings.providers,
    )
    return PreparedEvaluation(base=base, models=directories[1:], comparison=comparison)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The base's logits, on disk, which models are scored against."""

    base: PreparedBase
    logits: Float32[np.ndarray, "W L V"]
    row: ModelRow
    """The base's own."""
    scratch: Path

    def score(self, directory: ModelDirectory, progress: Progress) -> ModelRow:
        """Run a model on the same windows; one session is open meanwhile.

        Raises:
            UserError: it has another vocabulary than the base, or logits that aren't finite, or doesn't run.
        """
        return _score_model(directory, self.logits, _watched(directory, self.base, self.scratch, progress), self.base)


@contextmanager
def open_reference(base: PreparedBase, progress: Progress) -> Iterator[Reference]:
    """Run the base on its text; its logits wait in a temporary file until the block ends."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        logits = _record(_watched(base.directory, base, folder, progress), len(base.windows), folder / "base_logits")
        row = _score_model(base.directory, logits, iter(logits), base)
        yield Reference(base=base, logits=logits, row=row, scratch=folder)


def evaluate(prepared: PreparedEvaluation, progress: Progress) -> Report:
    """Score the base and every model; the base's logits wait in a temporary file meanwhile.

    Raises:
        UserError: a model has another vocabulary than the base, or logits that aren't finite.
    """
    with open_reference(prepared.base, progress) as reference:
        rows = [reference.row, *(reference.score(model, progress) for model in prepared.models)]
    return Report(comparison=prepared.comparison, rows=tuple(rows))


def _watched(
    directory: ModelDirectory, base: PreparedBase, scratch: Path, progress: Progress
) -> Iterator[Float32[np.ndarray, "L V"]]:
    """The model's logits on each window, with a bar of its own that goes when it is done."""
    task = progress.add_task(directory.folder.name, total=len(base.windows))
    with runnable_file(directory.onnx_file, base.settings.providers, scratch) as onnx_file:
        for logits in _logits(onnx_file, directory, base):
            progress.advance(task)
            yield logits
    progress.remove_task(task)


def stored_bytes(directory: ModelDirectory) -> int:
    """Bytes of the .onnx file and of every file of external data that it refers to.

    Raises:
        GraphError: the model can't be read, or isn't whole.
    """
    files = {directory.onnx_file.resolve(), *external_files(load_graph(directory))}
    return sum(file.stat().st_size for file in files)


def save_report(report: Report, path: Path) -> None:
    """Write ``report`` as JSON, whole or not at all.

    Raises:
        UserError: the file can't be written.
    """
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path.absolute()) as partial:
            partial.write_bytes(_REPORTS.dump_json(report, indent=1))
    except OSError as error:
        raise UserError(f"--json {path} can't be written ({error.strerror}); choose another file.") from error


def load_report(path: Path, comparison: Comparison) -> Report | None:
    """The report in ``path`` if it is one of exactly this comparison."""
    try:
        report = _REPORTS.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    return report if report.comparison == comparison else None


def _read_windows(config: EvaluateConfig, tokenizer_folder: Path) -> Windows:
    text = offline_evaluation_text() if config.text == "offline" else _read_text(Path(config.text))
    tokenizer = load_tokenizer(str(tokenizer_folder), trust_remote_code=False)
    windows = pack_windows(tokenizer(text, verbose=False)["input_ids"], config.windows, config.seq_len)
    if len(windows) < config.windows or config.windows < 1:
        raise UserError(
            f"--text {config.text} gives {len(windows)} windows of {config.seq_len} tokens and --windows is "
            f"{config.windows}; choose from 1 to what there is."
        )
    return windows


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path} can't be read ({error}); pass a UTF-8 text file, or offline.") from error


def _logits(onnx_file: Path, directory: ModelDirectory, base: PreparedBase) -> Iterator[Float32[np.ndarray, "L V"]]:
    session = open_session(onnx_file, base.settings)
    feeds = CausalFeeds(session, directory.kv_heads, directory.head_size, directory.windowed_caches)
    for window in base.windows:
        try:
            logits = session.run(["logits"], feeds(window[None]))[0][0]
        except Exception as error:  # onnxruntime raises classes without a common base
            reason = str(error).splitlines()[0]
            raise UserError(
                f"ONNX Runtime can't run {directory.onnx_file} ({reason}); try another of --eps."
            ) from error
        yield logits.astype(np.float32)


def _record(logits: Iterator[Float32[np.ndarray, "L V"]], windows: int, file: Path) -> Float32[np.ndarray, "W L V"]:
    """Write logits to ``file`` as they come: 16 windows of 512 tokens fill 1.6 GB at 49,000 tokens of vocabulary."""
    first = next(logits)
    recorded = np.memmap(file, np.float32, "w+", shape=(windows, *first.shape))
    for number, current in enumerate(chain([first], logits)):
        recorded[number] = current
    return recorded


def _score_model(
    directory: ModelDirectory,
    expected: Float32[np.ndarray, "W L V"],
    logits: Iterator[Float32[np.ndarray, "L V"]],
    base: PreparedBase,
) -> ModelRow:
    scores: list[TokenScores] = []
    for wanted, current, tokens in zip(expected, logits, base.windows, strict=True):
        _check_logits(directory.folder, wanted, current)
        scores.append(score_window(*(torch.from_numpy(np.array(array)) for array in (wanted, current, tokens))))
    return ModelRow(
        name=directory.folder.name,
        bytes=stored_bytes(directory),
        accuracy=summarize(scores),
        widened=must_widen(ir.load(directory.onnx_file), base.settings.providers),
    )


def _vocabulary(directory: ModelDirectory) -> int | None:
    """Width of the logits, None where the graph leaves it open."""
    logits = next((value for value in ir.load(directory.onnx_file).graph.outputs if value.name == "logits"), None)
    if logits is None:
        raise UserError(f"{directory.onnx_file} has no output 'logits'; pass a text decoder.")
    width = logits.shape[-1] if logits.shape is not None else None
    return width if isinstance(width, int) else None


def _check_vocabulary(folder: Path, base: int | None, model: int | None) -> None:
    if base is not None and model is not None and base != model:
        raise UserError(f"{folder} has {model} tokens in its vocabulary and --base {base}; pass models of this base.")


def _check_logits(folder: Path, base: Float32[np.ndarray, "L V"], logits: Float32[np.ndarray, "L W"]) -> None:
    _check_vocabulary(folder, base.shape[-1], logits.shape[-1])
    if not np.isfinite(logits).all():
        raise UserError(
            f"{folder} gives logits that are not finite: its weights, or float16 on this execution provider, overflow; "
            "build it in fp32 or try another of --eps."
        )
