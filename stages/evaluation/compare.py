"""Run a base model and others on the same windows of text and compare their logits, one session at a time."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from stages.calibration.text.documents import read_text
from stages.calibration.text.tokenizer import first_tokens, load_tokenizer
from stages.calibration.text.windows import beginning_token, pack_windows
from stages.commands.evaluate_options import EvaluateConfig
from stages.commands.progress import Progress
from stages.errors import OptionError, UserError
from stages.evaluation.accuracy import (
    Accuracy,
    TokenScores,
    WorstToken,
    by_position,
    score_window,
    summarize,
    worst_of_all,
    worst_of_window,
)
from stages.evaluation.records import Comparison, Evaluation, ModelRow
from stages.evaluation.speed import describe_accuracy_level, with_shipped_level
from stages.evaluation.texts import BUILT_IN
from stages.model.directory import DECODER, ModelDirectory, has_logits, locate_model, logits_among
from stages.model.load import fingerprint_model, read_graph
from stages.model.sizes import model_bytes
from stages.model.unquantized import is_quantized
from stages.records.quantities import counted
from stages.runtime.cpu.norms import must_write_out_norms
from stages.runtime.cpu.upcast import must_upcast
from stages.runtime.decoder import open_decoder
from stages.runtime.graph_inputs import WindowShape, inputs_of_graph
from stages.runtime.providers import choose_providers
from stages.runtime.session import SessionSettings, loadable
from stages.system.json_file import explained
from stages.system.paths import from_here

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOGGER = logging.getLogger(__name__)
Windows = Int64[np.ndarray, "windows seq_len"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedBase:
    """A base model and the windows of text to run it on."""

    directory: ModelDirectory
    windows: Windows
    settings: SessionSettings
    """Its accuracy level is None where each model runs at its own."""
    worst: int
    """How many of the predictions farthest from the base's are kept for each model."""
    decode: Callable[[Sequence[int]], str]
    """Turns token ids into text."""

    @property
    def tokens(self) -> str:
        """Return the sha256 of the windows."""
        return hashlib.sha256(repr(self.windows.shape).encode() + self.windows.tobytes()).hexdigest()

    def settings_of(self, model: ModelDirectory) -> SessionSettings:
        """Return the settings to run ``model`` with: where no level is forced, at the one that its files set."""
        return with_shipped_level(self.settings, model)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedEvaluation:
    """A base model with its text, and the models to compare with it."""

    base: PreparedBase
    models: tuple[ModelDirectory, ...]
    comparison: Comparison

    @property
    def all_models(self) -> tuple[ModelDirectory, ...]:
        """Return all models, the base first."""
        return self.base.directory, *self.models


def prepare_base(config: EvaluateConfig) -> PreparedBase:
    """Find the base and tokenize the text with its tokenizer.

    Raises:
        UserError: the base, its tokenizer or the text can't be read, or the text is too short.
    """
    config.validate()
    directory = locate_model(config.base, config.component)
    config = _fit_to_graph(config, directory)
    tokenizer = load_tokenizer(config.model_name or str(directory.folder))
    return PreparedBase(
        directory=directory,
        windows=_read_windows(config, tokenizer),
        settings=settings_of(config),
        worst=config.worst,
        decode=lambda tokens: str(tokenizer.decode(list(tokens))),
    )


def settings_of(config: EvaluateConfig) -> SessionSettings:
    """Return how sessions are opened: on those of --eps that load on this machine. A warning names the others."""
    choice = loadable(choose_providers(config.eps, "--eps"))
    for name, reason in choice.missing:
        _LOGGER.warning("--eps %s isn't used: %s.", name, reason)
    return SessionSettings(providers=choice.names, accuracy_level=config.accuracy_level)


def _fit_to_graph(config: EvaluateConfig, directory: ModelDirectory) -> EvaluateConfig:
    """Return ``config`` with windows no longer than those that the base takes, where its graph fixes them."""
    length = WindowShape.of(inputs_of_graph(read_graph(directory.onnx_file), directory)).length
    if length is None or config.seq_len <= length:
        return config
    _LOGGER.info(
        "%s takes windows of fixed length: --seq_len %d in place of %d",
        directory.onnx_file.name, length, config.seq_len,
    )  # fmt: skip
    return replace(config, seq_len=length)


def prepare(config: EvaluateConfig) -> PreparedEvaluation:
    """Find the base and the models, and tokenize the text with the base's tokenizer.

    Raises:
        UserError: a model, the tokenizer or the text can't be read, a model gives no logits, or the text is too short.
    """
    if not config.model:
        raise UserError("--model names no model; pass one or more folders to compare with --base.")
    directories = tuple(locate_model(path, config.component) for path in (config.base, *config.model))
    graph = read_graph(directories[0].onnx_file)
    _require_text(directories[0], graph)
    vocabulary = _vocabulary(directories[0], graph)
    for directory in directories[1:]:
        _check_vocabulary(directory.folder, vocabulary, _vocabulary(directory, read_graph(directory.onnx_file)))
    if is_quantized(graph):
        _LOGGER.warning(
            "--base %s is a quantized model, which the others are compared with; for what quantization costs pass the "
            "model in floating point as --base.",
            from_here(config.base),
        )
    base = prepare_base(config)
    comparison = Comparison(
        models=tuple((directory.folder.name, fingerprint_model(directory)) for directory in directories),
        text=config.text,
        tokens=base.tokens,
        windows=config.windows,
        seq_len=base.windows.shape[1],
        accuracy_level=config.accuracy_level,
        accuracy_levels=tuple(base.settings_of(directory).accuracy_level for directory in directories),
        providers=base.settings.providers,
        worst=config.worst,
    )
    return PreparedEvaluation(base=base, models=directories[1:], comparison=comparison)


def _require_text(base: ModelDirectory, graph: ir.Model) -> None:
    """Raise OptionError for another component than a decoder, which only samples can be run on."""
    if base.component != DECODER and not has_logits((str(value.name) for value in graph.graph.outputs), base):
        raise OptionError(
            f"The component {base.component} ({base.onnx_file}) gives no logits that could be compared on text; pass "
            "--samples with files that fill its inputs."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The base's logits, in a file, that models are scored against."""

    base: PreparedBase
    logits: Float32[np.ndarray, "W L V"]
    row: ModelRow
    """The base's own scores."""
    scratch: Path

    def score(self, directory: ModelDirectory, progress: Progress) -> ModelRow:
        """Run a model on the same windows and score it.

        Raises:
            UserError: its vocabulary isn't the base's, its logits aren't finite, or it can't be run.
        """
        return _score_model(directory, self.logits, _run_model(directory, self.base, self.scratch, progress), self.base)

    def score_logits(self, folder: Path, logits: Iterator[Float32[np.ndarray, "L V"]]) -> Accuracy:
        """Score what another runtime computed on the same windows.

        Args:
            folder: the model's, for messages.
            logits: of each window.

        Raises:
            UserError: the vocabulary isn't the base's, or the logits aren't finite.
        """
        return summarize([scores for _, scores in _score_windows(folder, self.logits, logits, self.base)])


@contextmanager
def open_reference(base: PreparedBase, progress: Progress) -> Iterator[Reference]:
    """Run the base on its text and keep its logits in a temporary file while the block runs."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        logits = _record(_run_model(base.directory, base, folder, progress), len(base.windows), folder / "base_logits")
        row = _score_model(base.directory, logits, iter(logits), base)
        yield Reference(base=base, logits=logits, row=row, scratch=folder)


def compare(prepared: PreparedEvaluation, progress: Progress) -> Evaluation:
    """Score the base and every model.

    Raises:
        UserError: a model's vocabulary isn't the base's, its logits aren't finite, or it can't be run.
    """
    with open_reference(prepared.base, progress) as reference:
        rows = [reference.row, *(reference.score(model, progress) for model in prepared.models)]
    return Evaluation(comparison=prepared.comparison, rows=tuple(rows))


def _run_model(
    directory: ModelDirectory, base: PreparedBase, scratch: Path, progress: Progress
) -> Iterator[Float32[np.ndarray, "L V"]]:
    """Yield the model's logits on each window, with a progress bar of its own."""
    task = progress.add_task(directory.folder.name, total=len(base.windows), unit="windows")
    with open_decoder(directory, base.settings_of(directory), scratch) as decoder:
        for window in base.windows:
            yield decoder.logits(window[None])[0]
            progress.advance(task)
    progress.remove_task(task)


def _read_windows(config: EvaluateConfig, tokenizer: PreTrainedTokenizerBase) -> Windows:
    text = read_evaluation_text(config.text)
    tokens = first_tokens(tokenizer, text, config.windows * config.seq_len)
    windows = pack_windows(tokens, config.windows, config.seq_len, beginning_token(tokenizer))
    if len(windows) < config.windows or config.windows < 1:
        raise UserError(
            f"--text {config.text} gives {counted(len(windows), 'window')} of {config.seq_len} tokens and --windows is "
            f"{config.windows}; pass at least 1 and at most that many windows, or a longer text."
        )
    return windows


def read_evaluation_text(name: str) -> str:
    """Return a built-in text, or that of a file.

    Raises:
        UserError: it is neither, or can't be read.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]()
    path = Path(name)
    try:
        return read_text(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--text {path} can't be read ({error}); pass a UTF-8 text file, or {', '.join(BUILT_IN)}."
        ) from error


def _record(logits: Iterator[Float32[np.ndarray, "L V"]], windows: int, file: Path) -> Float32[np.ndarray, "W L V"]:
    """Write logits to ``file`` as they come.

    They are too many for memory: 16 windows of 512 tokens fill 1.6 GB at 49,000 tokens of vocabulary.

    Raises:
        UserError: the disk is full.
    """
    first = next(logits)
    fix = "free space there, lower --windows, or set TMPDIR to another folder"
    with explained(f"The base's logits can't be kept in {file.parent.parent}", fix):
        # A mapped file takes its place only when it is filled, and a full disk ends the process then.
        with file.open("wb") as kept:
            for current in chain([first], logits):
                kept.write(np.ascontiguousarray(current).data)
        return np.memmap(file, np.float32, "r", shape=(windows, *first.shape))


def _score_model(
    directory: ModelDirectory,
    expected: Float32[np.ndarray, "W L V"],
    logits: Iterator[Float32[np.ndarray, "L V"]],
    base: PreparedBase,
) -> ModelRow:
    scores: list[TokenScores] = []
    worst: list[WorstToken] = []
    for number, (window, found) in enumerate(_score_windows(directory.folder, expected, logits, base)):
        scores.append(found)
        worst += worst_of_window(number, *window, found, base.worst, base.decode)
    graph, providers = ir.load(directory.onnx_file), base.settings.providers
    return ModelRow(
        name=directory.folder.name,
        bytes=model_bytes(directory),
        accuracy=summarize(scores),
        positions=by_position(scores),
        worst=worst_of_all(worst, base.worst),
        widened=must_upcast(graph, providers),
        norms_written_out=must_write_out_norms(graph, providers),
        accuracy_level=describe_accuracy_level(directory, base.settings.accuracy_level),
    )


def _score_windows(
    folder: Path,
    expected: Float32[np.ndarray, "W L V"],
    logits: Iterator[Float32[np.ndarray, "L V"]],
    base: PreparedBase,
) -> Iterator[tuple[tuple[Tensor, Tensor, Tensor], TokenScores]]:
    """Yield the base's logits, the model's and the token ids of each window, with the scores."""
    for wanted, current, tokens in zip(expected, logits, base.windows, strict=True):
        _check_logits(folder, wanted, current)
        of_base, of_model, ids = (torch.from_numpy(np.array(array)) for array in (wanted, current, tokens))
        yield (of_base, of_model, ids), score_window(of_base, of_model, ids)


def _vocabulary(directory: ModelDirectory, model: ir.Model) -> int | None:
    """Return the width of the logits, None where the graph leaves it open."""
    outputs = {str(value.name): value for value in model.graph.outputs}
    logits = outputs[logits_among(outputs, directory)]
    width = logits.shape[-1] if logits.shape is not None else None
    return width if isinstance(width, int) else None


def _check_vocabulary(folder: Path, base: int | None, model: int | None) -> None:
    if base is not None and model is not None and base != model:
        raise UserError(
            f"{folder} has {model} tokens in its vocabulary and --base {base}; pass models made from this base."
        )


def _check_logits(folder: Path, base: Float32[np.ndarray, "L V"], logits: Float32[np.ndarray, "L W"]) -> None:
    _check_vocabulary(folder, base.shape[-1], logits.shape[-1])
    if not np.isfinite(logits).all():
        raise UserError(
            f"{folder} gives logits that are not finite: its weights overflow, or float16 does on this execution "
            "provider; build it in fp32, or pass other --eps."
        )
