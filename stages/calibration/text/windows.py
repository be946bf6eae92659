"""Text to token windows: deterministic, packed full, fingerprinted, and split into calibration and held-out windows."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, zip_longest

import datasets
import numpy as np
from jaxtyping import Int64
from transformers import PreTrainedTokenizerBase

from stages.calibration.text.chat import as_conversation, require_chat_template
from stages.calibration.text.documents import HUB_SOURCES, SELF, Document, HubSource, dataset_names, open_documents
from stages.calibration.text.self_generated import OwnTextRequest, OwnTextSource
from stages.calibration.text.tokenizer import FoundTokenizer, find_tokenizer
from stages.errors import UserError

_HELD_OUT_SHARE = 10
_TALKATIVE = ("datasets", "huggingface_hub", "transformers", "httpx", "fsspec")


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowRequest:
    """Which tokens to calibrate on.

    ``dataset`` may name several, separated by commas. ``tokenizer_path`` is a folder or hub name; ``stand_in_path`` is
    a folder whose tokenizer is taken where the hub can't give that one. ``vocab_size`` is the model's (None: unknown),
    ``calib_size`` counts windows of ``seq_len`` tokens, held-out ones included. ``apply_chat_template`` makes a
    conversation of each document, ``use_random`` replaces text by uniform token ids.
    """

    dataset: str
    tokenizer_path: str
    stand_in_path: str | None = None
    vocab_size: int | None
    calib_size: int
    seq_len: int
    seed: int
    apply_chat_template: bool = False
    use_random: bool
    trust_remote_code: bool


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


def load_windows(
    request: WindowRequest,
    hub_sources: Mapping[str, HubSource] = HUB_SOURCES,
    *,
    own_text: OwnTextSource | None = None,
) -> TokenWindows:
    """Read, tokenize and pack as much text as ``request`` needs; a tenth of the windows (at least one) is held out.

    Each document is tokenized with the special tokens its tokenizer adds, and ends with the tokenizer's EOS where there
    is one; as a conversation it gets what the chat template writes, and nothing else. Several data sets give the same
    number of windows each (the first ones one more where that doesn't come out even), by turns, a tenth of each held
    out. The same request on the same data gives the same windows.

    Args:
        request: what is asked for.
        hub_sources: data sets of the hub by their short names.
        own_text: who writes the data set "self".

    Raises:
        UserError: the data or tokenizer can't be read, the text is too short, or its ids don't fit the vocabulary.
    """
    if request.use_random:
        return _split([_Part(title="random tokens", windows=_random_windows(request))], tokenizer="none")
    names = dataset_names(request.dataset)
    if request.calib_size < 2 * len(names):
        raise UserError(
            f"--calib_size {request.calib_size} is too small for {len(names)} data sets; each needs a window to "
            f"calibrate on and one held out, so pass {2 * len(names)} or more."
        )
    with _quiet_libraries():
        found = find_tokenizer(
            request.tokenizer_path, request.stand_in_path, trust_remote_code=request.trust_remote_code
        )
        parts = [
            _own_part(own_text, request, count, found)
            if name == SELF
            else _part(name, request, count, found, hub_sources)
            for name, count in zip(names, window_shares(request.calib_size, len(names)), strict=True)
        ]
    for part in parts:
        _check_vocabulary(part.windows, found.source, request.vocab_size)
    return _split(parts, tokenizer=found.title)


def window_shares(windows: int, sources: int) -> list[int]:
    """How many of so many windows each data set gives."""
    return [len(range(index, windows, sources)) for index in range(sources)]


def held_out_windows(windows: int) -> int:
    """How many of so many windows of one data set are held out."""
    return max(1, round(windows / _HELD_OUT_SHARE))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """The windows of one data set."""

    title: str
    windows: Int64[np.ndarray, "windows seq_len"]

    @property
    def held_out_count(self) -> int:
        return held_out_windows(len(self.windows))


def _part(
    dataset: str, request: WindowRequest, count: int, found: FoundTokenizer, hub_sources: Mapping[str, HubSource]
) -> _Part:
    chat = request.apply_chat_template
    documents = open_documents(dataset, request.seed, hub_sources, with_messages=chat)
    tokens = (_chat_stream if chat else _token_stream)(found.tokenizer, documents.texts)
    windows = pack_windows(tokens, count, request.seq_len)
    if len(windows) < count:
        asked = "--calib_size is" if count == request.calib_size else "its share of --calib_size is"
        raise UserError(
            f"--dataset {dataset} gives {len(windows)} windows of {request.seq_len} tokens and {asked} {count}; lower "
            "--calib_size or --seq_len, or pass more text."
        )
    return _Part(title=f"{documents.title}, as chats" if chat else documents.title, windows=windows)


def _own_part(own_text: OwnTextSource | None, request: WindowRequest, count: int, found: FoundTokenizer) -> _Part:
    assert own_text is not None, "whoever lets a user ask for it brings it along"
    written = own_text.write(
        found.tokenizer,
        OwnTextRequest(count=count, seq_len=request.seq_len, seed=request.seed, chats_only=request.apply_chat_template),
    )
    return _Part(title=written.title, windows=written.windows)


def pack_windows(tokens: Iterable[int], count: int, seq_len: int) -> Int64[np.ndarray, "windows seq_len"]:
    """The first ``count`` full windows of a token stream, or as many as there are; the remainder is dropped."""
    flat = np.fromiter(islice(tokens, count * seq_len), np.int64)
    full = len(flat) // seq_len
    return flat[: full * seq_len].reshape(full, seq_len)


def _chat_stream(tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document]) -> Iterator[int]:
    template = require_chat_template(tokenizer)
    for document in documents:
        yield from template.tokens(as_conversation(document) if isinstance(document, str) else document)


def _token_stream(tokenizer: PreTrainedTokenizerBase, texts: Iterable[Document]) -> Iterator[int]:
    for text in texts:
        # verbose warns of texts longer than the model's context; windows are cut afterwards.
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
        yield from ids
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            yield tokenizer.eos_token_id


def _random_windows(request: WindowRequest) -> Int64[np.ndarray, "windows seq_len"]:
    if request.vocab_size is None:
        raise UserError("--use_random_calib needs the model's vocab_size; put genai_config.json beside the model.")
    generator = np.random.default_rng(request.seed)
    try:
        return generator.integers(request.vocab_size, size=(request.calib_size, request.seq_len), dtype=np.int64)
    except (ValueError, MemoryError) as error:
        raise UserError(
            f"--calib_size {request.calib_size} windows of --seq_len {request.seq_len} don't fit the memory; lower one."
        ) from error


def _check_vocabulary(windows: Int64[np.ndarray, "windows seq_len"], tokenizer: str, vocab_size: int | None) -> None:
    largest = int(windows.max())
    if vocab_size is not None and largest >= vocab_size:
        raise UserError(
            f"The tokenizer of {tokenizer} gives token {largest}, but the model's vocabulary has {vocab_size}; pass "
            "the model's own tokenizer as --model_name."
        )


def _split(parts: Sequence[_Part], *, tokenizer: str) -> TokenWindows:
    # The last windows, not scattered ones: neighbours in one document would be no test.
    calibration = _by_turns([part.windows[: -part.held_out_count] for part in parts])
    held_out = _by_turns([part.windows[-part.held_out_count :] for part in parts])
    return TokenWindows(
        calibration=calibration,
        held_out=held_out,
        source=" + ".join(part.title for part in parts),
        tokenizer=tokenizer,
        fingerprint=_fingerprint(np.concatenate([calibration, held_out]), len(held_out)),
    )


def _by_turns(parts: Sequence[Int64[np.ndarray, "_ seq_len"]]) -> Int64[np.ndarray, "windows seq_len"]:
    """The first window of each part, then the second of each, and so on: the first few hold something of all."""
    turns = zip_longest(*parts)
    return np.stack([window for turn in turns for window in turn if window is not None])


def _fingerprint(windows: Int64[np.ndarray, "windows seq_len"], held_out: int) -> str:
    digest = hashlib.sha256(json.dumps([windows.shape, held_out]).encode())
    digest.update(windows.astype("<i8").tobytes())
    return digest.hexdigest()


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Hide the progress bars and warnings of the libraries that fetch and tokenize; what fails is raised."""
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
