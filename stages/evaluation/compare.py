"""Run a base model and others on the same windows of text and compare their logits, one session at a time."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
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
from stages.config import EvaluateConfig
from stages.errors import UserError
from stages.evaluation.accuracy import Accuracy, TokenScores, score_window, summarize
from stages.external_data import external_tensors
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
class PreparedEvaluation:
    """Models found and text cut into windows; nothing has run yet."""

    directories: tuple[ModelDirectory, ...]
    """The base first."""
    windows: Windows
    settings: SessionSettings
    comparison: Comparison


_REPORTS = TypeAdapter(Report)


def prepare(config: EvaluateConfig) -> PreparedEvaluation:
    """Find the models and tokenize the text with the base's tokenizer.

    Raises:
        UserError: a model, the tokenizer or the text can't be read, or the text is too short.
    """
    if not config.model:
        raise UserError("--model names no model; pass one or more folders to compare with --base.")
    directories = tuple(locate_model(path) for path in (config.base, *config.model))
    for directory in directories[1:]:
        _check_vocabulary(directory.folder, _vocabulary(directories[0]), _vocabulary(directory))
    windows = _read_windows(config, directories[0].folder)
    settings = SessionSettings(
        providers=choose_providers(config.eps, "--eps").names, accuracy_level=config.accuracy_level
    )
    comparison = Comparison(
        models=tuple((directory.folder.name, fingerprint_model(directory)) for directory in directories),
        tokens=hashlib.sha256(repr(windows.shape).encode() + windows.tobytes()).hexdigest(),
        accuracy_level=config.accuracy_level,
        providers=settings.providers,
    )
    return PreparedEvaluation(directories=directories, windows=windows, settings=settings, comparison=comparison)


def evaluate(prepared: PreparedEvaluation, progress: Progress) -> Report:
    """Score the base and every model; the base's logits wait in a temporary file meanwhile.

    Raises:
        UserError: a model has another vocabulary than the base, or logits that aren't finite.
    """
    task = progress.add_task("evaluate", total=len(prepared.directories) * len(prepared.windows))

    def watched(directory: ModelDirectory) -> Iterator[Float32[np.ndarray, "L V"]]:
        with runnable_file(directory.onnx_file, prepared.settings.providers, Path(scratch)) as onnx_file:
            for logits in _logits(onnx_file, directory, prepared):
                progress.update(task, advance=1, description=directory.folder.name)
                yield logits

    base, *others = prepared.directories
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        expected = _record(watched(base), len(prepared.windows), Path(scratch) / "base_logits")
        rows = [_score_model(base, expected, iter(expected), prepared)]
        rows += [_score_model(other, expected, watched(other), prepared) for other in others]
    return Report(comparison=prepared.comparison, rows=tuple(rows))


def stored_bytes(directory: ModelDirectory) -> int:
    """Bytes of the .onnx file and of every file of external data that it refers to."""
    tensors = external_tensors(ir.load(directory.onnx_file))
    files = {directory.onnx_file, *(Path(tensor.path) for tensor in tensors)}
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


def _logits(
    onnx_file: Path, directory: ModelDirectory, prepared: PreparedEvaluation
) -> Iterator[Float32[np.ndarray, "L V"]]:
    session = open_session(onnx_file, prepared.settings)
    feeds = CausalFeeds(session, directory.kv_heads, directory.head_size, directory.windowed_caches)
    for window in prepared.windows:
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
    prepared: PreparedEvaluation,
) -> ModelRow:
    scores: list[TokenScores] = []
    for base, current, tokens in zip(expected, logits, prepared.windows, strict=True):
        _check_logits(directory.folder, base, current)
        scores.append(score_window(*(torch.from_numpy(np.array(array)) for array in (base, current, tokens))))
    return ModelRow(
        name=directory.folder.name,
        bytes=stored_bytes(directory),
        accuracy=summarize(scores),
        widened=must_widen(ir.load(directory.onnx_file), prepared.settings.providers),
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
