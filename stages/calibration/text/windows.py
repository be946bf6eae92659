"""Turn text into token windows: deterministic, packed full, fingerprinted, and split into calibration and held-out."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64

from stages.calibration.text.chat import as_conversation, require_chat_template
from stages.calibration.text.documents import (
    HUB_SOURCES,
    SELF_GENERATED,
    STAND_IN,
    ChosenText,
    HubSource,
    TextDocument,
    choose_text,
    dataset_names,
    open_documents,
)
from stages.calibration.text.self_generated import GenerationRequest, TextGenerator, why_it_cannot_write
from stages.calibration.text.tokenizer import FoundTokenizer, find_tokenizer
from stages.commands.calibrate_options import CalibrateConfig, TextOptions
from stages.errors import UserError
from stages.model.directory import ModelDirectory
from stages.records.quantities import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOGGER = logging.getLogger(__name__)
_HELD_OUT_SHARE = 10
_WINDOWS = 128
_STAND_IN_WINDOWS = 32
"""Half of them the model writes, token by token: a minute for 135 million weights, and 15 % less KL than without."""
_TALKATIVE = ("datasets", "huggingface_hub", "transformers", "httpx", "fsspec")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenWindows:
    """Token ids without padding; held-out windows come from later documents than calibration windows."""

    calibration: Int64[np.ndarray, "calibration_windows seq_len"]
    held_out: Int64[np.ndarray, "held_out_windows seq_len"]
    source: str
    """The text's origin in words, for tables."""
    tokenizer: str
    """The tokenizer's origin in words, for tables."""
    fingerprint: str
    """sha256 hex over token ids, shapes and split."""


def choose_dataset(config: TextOptions, directory: ModelDirectory) -> ChosenText:
    """Return what ``config`` calibrates on: what it names, or the default, or what stands in for that."""
    with nullcontext() if config.dataset is not None else _quiet_libraries():
        return choose_text(config.dataset, lambda: why_it_cannot_write(directory))


def load_windows(
    config: CalibrateConfig,
    directory: ModelDirectory,
    dataset: str,
    providers: tuple[str, ...],
    hub_sources: Mapping[str, HubSource] = HUB_SOURCES,
) -> TokenWindows:
    """Read, tokenize and pack as much text as ``config`` asks for; a tenth of the windows (at least one) is held out.

    Each document is tokenized with the special tokens its tokenizer adds, and ends with the tokenizer's EOS where there
    is one; as a conversation it gets what the chat template writes, and nothing else. Several data sets give the same
    number of windows each (the first ones one more where that doesn't come out even), alternately, a tenth of each held
    out. The same options on the same data give the same windows.

    Args:
        config: names the tokenizer, and gives the number and length of windows.
        directory: the model; its folder's tokenizer is used where none is named or the hub can't give it.
        dataset: the data sets, separated by commas.
        providers: with which the model may write the data set "self", by ONNX Runtime's names.
        hub_sources: data sets of the hub by their short names.

    Raises:
        UserError: the data or tokenizer can't be read, the text is too short, or its ids don't fit the vocabulary.
    """
    if config.use_random_calib:
        random_tokens = _random_windows(config, directory.vocab_size)
        return _split([_Part(title="random tokens", windows=random_tokens)], tokenizer="none")
    shares = windows_by_dataset(config, dataset)
    own_folder = str(directory.folder)
    parts: list[_Part] = []
    with _quiet_libraries():
        found = find_tokenizer(config.model_name or own_folder, own_folder, trust_remote_code=config.trust_remote_code)
        for name, count in shares.items():
            if name != SELF_GENERATED:
                parts.append(_part(name, config, count, found.tokenizer, hub_sources))
                continue
            try:
                parts.append(_self_generated_part(config, directory, providers, count, found.tokenizer))
            except UserError as error:
                if config.dataset is not None:
                    raise
                # Nobody asked for it, and the other text will do.
                _LOGGER.info("calibrating without text that the model writes: %s", error)
    for part in parts:
        _check_vocabulary(part.windows, found, directory.vocab_size)
    return _split(parts, tokenizer=found.title)


def windows_by_dataset(config: TextOptions, dataset: str) -> dict[str, int]:
    """Return how many windows each data set gives.

    Args:
        config: gives the number of windows, or leaves it to the data sets.
        dataset: the data sets, separated by commas.

    Raises:
        UserError: there are fewer than two windows for each data set, or ``dataset`` isn't a list of names.
    """
    names = dataset_names(dataset)
    windows = config.calib_size or (_STAND_IN_WINDOWS if dataset == STAND_IN else _WINDOWS)
    if windows < 2 * len(names):
        raise UserError(
            f"--calib_size {windows} is too small for {len(names)} data sets; each needs a window to "
            f"calibrate on and one held out, so pass {2 * len(names)} or more."
        )
    return {name: len(range(index, windows, len(names))) for index, name in enumerate(names)}


def held_out_windows(windows: int) -> int:
    """Return how many of so many windows of one data set are held out."""
    return max(1, round(windows / _HELD_OUT_SHARE))


def pack_windows(tokens: Iterable[int], count: int, seq_len: int) -> Int64[np.ndarray, "windows seq_len"]:
    """Return the first ``count`` full windows of a token stream, or as many as there are; the remainder is dropped."""
    flat = np.fromiter(islice(tokens, count * seq_len), np.int64)
    full = len(flat) // seq_len
    return flat[: full * seq_len].reshape(full, seq_len)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """The windows of one data set."""

    title: str
    windows: Int64[np.ndarray, "windows seq_len"]

    @property
    def split(self) -> int:
        """Return where the held-out windows begin: they are the last ones, as neighbours in a document are no test."""
        return len(self.windows) - held_out_windows(len(self.windows))


def _part(
    dataset: str,
    config: CalibrateConfig,
    count: int,
    tokenizer: PreTrainedTokenizerBase,
    hub_sources: Mapping[str, HubSource],
) -> _Part:
    chat = config.apply_chat_template
    documents = open_documents(dataset, config.seed, hub_sources, with_messages=chat)
    tokens = (_chat_stream if chat else _token_stream)(tokenizer, documents.texts)
    windows = pack_windows(tokens, count, config.seq_len)
    if len(windows) < count:
        asked = "--calib_size is" if config.calib_size else "the default of --calib_size is"
        if count != (config.calib_size or _WINDOWS):
            asked = "its share of --calib_size is"
        raise UserError(
            f"--dataset {dataset} gives {counted(len(windows), 'window')} of {config.seq_len} tokens and {asked} "
            f"{count}; lower --calib_size or --seq_len, or pass more text."
        )
    return _Part(title=f"{documents.title}, as chats" if chat else documents.title, windows=windows)


def _self_generated_part(
    config: CalibrateConfig,
    directory: ModelDirectory,
    providers: tuple[str, ...],
    count: int,
    tokenizer: PreTrainedTokenizerBase,
) -> _Part:
    generator = TextGenerator(directory=directory, providers=providers, folder=config.cache_path.absolute().parent)
    request = GenerationRequest(
        count=count, seq_len=config.seq_len, seed=config.seed, chats_only=config.apply_chat_template
    )
    text = generator.generate(tokenizer, request)
    return _Part(title=text.title, windows=text.windows)


def _chat_stream(tokenizer: PreTrainedTokenizerBase, documents: Iterable[TextDocument]) -> Iterator[int]:
    template = require_chat_template(tokenizer)
    for document in documents:
        yield from template.tokens(as_conversation(document) if isinstance(document, str) else document)


def _token_stream(tokenizer: PreTrainedTokenizerBase, texts: Iterable[TextDocument]) -> Iterator[int]:
    for text in texts:
        # verbose warns of texts longer than the model's context; windows are cut afterwards.
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
        yield from ids
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            yield tokenizer.eos_token_id


def _random_windows(config: CalibrateConfig, vocab_size: int | None) -> Int64[np.ndarray, "windows seq_len"]:
    if vocab_size is None:
        raise UserError("--use_random_calib needs the model's vocab_size; put genai_config.json into its folder.")
    generator, windows = np.random.default_rng(config.seed), config.calib_size or _WINDOWS
    try:
        return generator.integers(vocab_size, size=(windows, config.seq_len), dtype=np.int64)
    except (ValueError, MemoryError) as error:
        raise UserError(
            f"--calib_size {windows} windows of --seq_len {config.seq_len} don't fit the memory; lower one."
        ) from error


def _check_vocabulary(
    windows: Int64[np.ndarray, "windows seq_len"], found: FoundTokenizer, vocab_size: int | None
) -> None:
    largest = int(windows.max())
    if vocab_size is not None and largest >= vocab_size:
        raise UserError(
            f"The tokenizer of {found.source} gives token {largest}, but the model's vocabulary has {vocab_size}; pass "
            "the model's own tokenizer as --model_name."
        )


def _split(parts: Sequence[_Part], *, tokenizer: str) -> TokenWindows:
    calibration = _alternately([part.windows[: part.split] for part in parts])
    held_out = _alternately([part.windows[part.split :] for part in parts])
    return TokenWindows(
        calibration=calibration,
        held_out=held_out,
        source=" + ".join(part.title for part in parts),
        tokenizer=tokenizer,
        fingerprint=_fingerprint(np.concatenate([calibration, held_out]), len(held_out)),
    )


def _alternately(parts: Sequence[Int64[np.ndarray, "_ seq_len"]]) -> Int64[np.ndarray, "windows seq_len"]:
    """Return the first window of each part, then the second of each, and so on: the first few hold something of all."""
    rounds = zip_longest(*parts)
    return np.stack([window for windows in rounds for window in windows if window is not None])


def _fingerprint(windows: Int64[np.ndarray, "windows seq_len"], held_out: int) -> str:
    digest = hashlib.sha256(json.dumps([windows.shape, held_out]).encode())
    digest.update(windows.astype("<i8").tobytes())
    return digest.hexdigest()


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Hide the progress bars and warnings of the libraries that fetch and tokenize; what fails is raised."""
    import datasets  # here, because it takes seconds

    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    bars_were_on = not datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars_were_on:
            datasets.enable_progress_bars()
