"""Text to token windows: deterministic, packed full, fingerprinted, and split into calibration and held-out windows."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import datasets
import numpy as np
from jaxtyping import Int64
from transformers import PreTrainedTokenizerBase

from stages.errors import UserError
from stages.observe.documents import HUB_SOURCES, HubSource, open_documents
from stages.observe.tokenizer import find_tokenizer

_HELD_OUT_SHARE = 10
_TALKATIVE = ("datasets", "huggingface_hub", "transformers", "httpx", "fsspec")


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowRequest:
    """Which tokens to calibrate on.

    ``tokenizer_path`` is a folder or hub name; ``stand_in_path`` is a folder whose tokenizer is taken where the hub
    can't give that one. ``vocab_size`` is the model's (None: unknown), ``calib_size`` counts windows of ``seq_len``
    tokens, held-out ones included; ``use_random`` replaces text by uniform token ids.
    """

    dataset: str
    tokenizer_path: str
    stand_in_path: str | None = None
    vocab_size: int | None
    calib_size: int
    seq_len: int
    seed: int
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


def load_windows(request: WindowRequest, hub_sources: Mapping[str, HubSource] = HUB_SOURCES) -> TokenWindows:
    """Read, tokenize and pack as much text as ``request`` needs; a tenth of the windows (at least one) is held out.

    Each document is tokenized with the special tokens its tokenizer adds, and ends with the tokenizer's EOS where there
    is one. The same request on the same data gives the same windows.

    Raises:
        UserError: the data or tokenizer can't be read, the text is too short, or its ids don't fit the vocabulary.
    """
    if request.use_random:
        return _split(_random_windows(request), source="random tokens", tokenizer="none")
    with _quiet_libraries():
        documents = open_documents(request.dataset, request.seed, hub_sources)
        found = find_tokenizer(
            request.tokenizer_path, request.stand_in_path, trust_remote_code=request.trust_remote_code
        )
        stream = _token_stream(found.tokenizer, documents.texts)
        windows = pack_windows(stream, request.calib_size, request.seq_len)
    if len(windows) < request.calib_size:
        raise UserError(
            f"--dataset {request.dataset} gives {len(windows)} windows of {request.seq_len} tokens and --calib_size is "
            f"{request.calib_size}; lower --calib_size or --seq_len, or pass more text."
        )
    _check_vocabulary(windows, found.source, request.vocab_size)
    return _split(windows, source=documents.title, tokenizer=found.title)


def pack_windows(tokens: Iterable[int], count: int, seq_len: int) -> Int64[np.ndarray, "windows seq_len"]:
    """The first ``count`` full windows of a token stream, or as many as there are; the remainder is dropped."""
    flat = np.fromiter(islice(tokens, count * seq_len), np.int64)
    full = len(flat) // seq_len
    return flat[: full * seq_len].reshape(full, seq_len)


def _token_stream(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[int]:
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
    return generator.integers(request.vocab_size, size=(request.calib_size, request.seq_len), dtype=np.int64)


def _check_vocabulary(windows: Int64[np.ndarray, "windows seq_len"], tokenizer: str, vocab_size: int | None) -> None:
    largest = int(windows.max())
    if vocab_size is not None and largest >= vocab_size:
        raise UserError(
            f"The tokenizer of {tokenizer} gives token {largest}, but the model's vocabulary has {vocab_size}; pass "
            "the model's own tokenizer as --model_name."
        )


def _split(windows: Int64[np.ndarray, "windows seq_len"], *, source: str, tokenizer: str) -> TokenWindows:
    # The last windows, not scattered ones: neighbours in one document would be no test.
    held_out = max(1, round(len(windows) / _HELD_OUT_SHARE))
    return TokenWindows(
        calibration=windows[:-held_out],
        held_out=windows[-held_out:],
        source=source,
        tokenizer=tokenizer,
        fingerprint=_fingerprint(windows, held_out),
    )


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
