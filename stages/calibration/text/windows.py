"""Turn text into token windows: deterministic, packed full, fingerprinted, and split into calibration and held-out."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64

from stages.calibration.text.chat import ChatTemplate, as_conversation, require_chat_template
from stages.calibration.text.documents import (
    HUB_SOURCES,
    ChosenText,
    Documents,
    TextDocument,
    choose_text,
    open_documents,
)
from stages.calibration.text.mix import (
    LEAST_WINDOWS,
    MIX,
    RANDOM,
    SELF_GENERATED,
    dataset_names,
    dataset_parts,
    held_out_windows,
    windows_by_dataset,
)
from stages.calibration.text.self_generated import OWN_TITLE, GenerationRequest, TextGenerator
from stages.calibration.text.tokenizer import FoundTokenizer, first_tokens, tokenizer_of
from stages.commands.calibrate_options import CalibrateConfig, TextOptions
from stages.errors import UserError
from stages.model.directory import ModelDirectory
from stages.records.quantities import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOGGER = logging.getLogger(__name__)
_WINDOWS = 128
_MIX_WINDOWS = 48
"""Nearly half of them the model writes, token by token: that takes longer than all else."""
_TOKENS_PER_CHANNEL = 3
"""Fewer leave directions of the widest MatMul's input unseen, or seen by chance."""
_CALIBRATION_SHARE = 0.9
_PLENTIFUL = frozenset({MIX, SELF_GENERATED, *HUB_SOURCES})
"""Data sets of which the widest model gets as much as it needs."""
_RANDOM_TITLE = "random tokens"
_MOST_REFUSED = 100
"""Conversations; a template that refuses so many before the first it writes is taken to refuse all."""
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

    @property
    def seq_len(self) -> int:
        """Return the number of tokens in each window."""
        return int(self.calibration.shape[1])

    def batches(self, part: str, batch_size: int) -> list[Int64[np.ndarray, "batch seq_len"]]:
        """Return what is run of a part, ``batch_size`` windows at a time."""
        tokens = self.held_out if part == "held_out" else self.calibration
        return [tokens[start : start + batch_size] for start in range(0, len(tokens), batch_size)]

    def in_whole_batches(self, size: int) -> TokenWindows:
        """Return these windows, the first of each part repeated at its end where the last batch isn't full."""

        def filled(windows: Int64[np.ndarray, "windows seq_len"]) -> Int64[np.ndarray, "more_windows seq_len"]:
            return np.resize(windows, (len(windows) + -len(windows) % size, windows.shape[1]))

        return replace(self, calibration=filled(self.calibration), held_out=filled(self.held_out))


def choose_dataset(config: TextOptions) -> ChosenText:
    """Return what ``config`` calibrates on: what it names, or the default, or what stands in for that."""
    with nullcontext() if config.dataset is not None else _quiet_libraries():
        return choose_text(config.dataset)


def window_count(config: TextOptions, dataset: str, channels: int) -> int:
    """Return the number of windows, the held-out ones included: what ``config`` says, or the default.

    Other text than plentiful one may be too short for the widest models, so its default stays as it is.

    Args:
        config: gives the number and length of windows.
        dataset: the data sets, separated by commas.
        channels: input channels of the widest MatMul, for each of which the default has some tokens.
    """
    least = _MIX_WINDOWS if dataset == MIX else _WINDOWS
    fixed = config.calib_size or config.use_random_calib
    if fixed or not _PLENTIFUL.issuperset(dataset_names(dataset)):
        return config.calib_size or least
    tokens = _TOKENS_PER_CHANNEL * channels / _CALIBRATION_SHARE
    return max(least, ceil(tokens / config.seq_len))


def window_counts(config: TextOptions, dataset: str, channels: int) -> tuple[int, int]:
    """Return how many windows are calibrated on and how many are held out, where no part of mix is too short.

    Args:
        config: gives the number and length of windows.
        dataset: the data sets, separated by commas.
        channels: input channels of the widest MatMul.
    """
    windows = window_count(config, dataset, channels)
    held_out = sum(held_out_windows(windows_by_dataset(dataset, windows)).values())
    return windows - held_out, held_out


def load_windows(
    config: CalibrateConfig,
    directory: ModelDirectory,
    dataset: str,
    providers: tuple[str, ...],
    channels: int,
) -> TokenWindows:
    """Read, tokenize and pack as much text as ``config`` asks for; a tenth of the windows (at least one) is held out.

    Each document is tokenized with the special tokens its tokenizer adds, and ends with the tokenizer's EOS where there
    is one; as a conversation it gets what the chat template writes. Each window begins with the token that the
    tokenizer puts before any text. Several data sets give windows as their weights say, in turn, a tenth of each held
    out. The same options on the same data give the same windows.

    Args:
        config: names the tokenizer, and gives the number and length of windows.
        directory: the model; its folder's tokenizer is used where none is named or the hub can't give it.
        dataset: the data sets, separated by commas.
        providers: with which the model may write the data set "self", by ONNX Runtime's names.
        channels: input channels of the widest MatMul.

    Raises:
        UserError: the data or tokenizer can't be read, the text is too short, or its ids don't fit the vocabulary.
    """
    count = window_count(config, dataset, channels)
    if config.use_random_calib:
        windows = _random_windows(config, count, directory.vocab_size)
        return _split({RANDOM: _Part(title=_RANDOM_TITLE, windows=windows)}, tokenizer="none")
    shares, named, parts = windows_by_dataset(dataset, count), dataset_names(dataset), dict[str, _Part]()
    with _quiet_libraries():
        found = tokenizer_of(config, directory)
        if SELF_GENERATED in shares:
            try:
                request = shares[SELF_GENERATED]
                parts[SELF_GENERATED] = _self_generated_part(config, directory, providers, request, found.tokenizer)
            except UserError as error:
                if SELF_GENERATED in named:
                    raise
                _LOGGER.info("%s goes without text that the model writes: %s", MIX, error)
                shares = windows_by_dataset(dataset, count, without=(SELF_GENERATED,))
        for name, share in shares.items():
            if name == RANDOM:
                vocabulary = min(len(found.tokenizer), directory.vocab_size or len(found.tokenizer))
                windows = _random_windows(config, share, vocabulary)
                if (begin := beginning_token(found.tokenizer)) is not None:
                    windows[:, 0] = begin
                parts[name] = _Part(title=_RANDOM_TITLE, windows=windows)
            elif name != SELF_GENERATED:
                parts[name] = _part(name, config, share, count, found.tokenizer, is_named=name in named)
    for part in parts.values():
        _check_vocabulary(part.windows, found, directory.vocab_size)
    return _split({name: parts[name] for name in shares}, tokenizer=found.title)


def may_be_source(source: str, config: TextOptions, dataset: str) -> bool:
    """Return whether ``load_windows`` may call its text ``source``, as far as that is known before it is read.

    Args:
        source: the origin in words.
        config: how documents become text.
        dataset: the data sets, separated by commas; parts of mix may be missing.

    Raises:
        UserError: a data set doesn't exist.
    """
    named, pattern = dataset_names(dataset), ""
    for name in dataset_parts(dataset):
        if name == SELF_GENERATED:
            title = f"{OWN_TITLE}.+"
        else:
            title = re.escape(_RANDOM_TITLE if name == RANDOM else _title(open_documents(name, config.seed), config))
        pattern += f"({title} \\+ ){'' if name in named else '?'}"
    return re.fullmatch(pattern, f"{source} + ") is not None


def beginning_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that the tokenizer puts before any text, None where it puts nothing.

    A model that was trained with one gives it much of its attention, and answers worse without it.
    """
    begin: int | None = tokenizer.bos_token_id
    added: list[int] = tokenizer("")["input_ids"]
    return begin if added[:1] == [begin] else None


def pack_windows(
    tokens: Iterable[int], count: int, seq_len: int, begin: int | None = None
) -> Int64[np.ndarray, "windows seq_len"]:
    """Return the first ``count`` full windows of a token stream, or as many as there are; the remainder is dropped.

    Args:
        tokens: the stream.
        count: of windows, at most.
        seq_len: tokens of each.
        begin: the first token of each window, put before the stream's where that is another one; None: nothing is.
    """
    stream, windows = iter(tokens), list[list[int]]()
    while len(windows) < count:
        window = list(islice(stream, 1))
        if begin is not None and window != [begin]:
            window.insert(0, begin)
        window += islice(stream, seq_len - len(window))
        if len(window) < seq_len:
            break
        windows.append(window[:seq_len])
    return np.array(windows, np.int64).reshape(-1, seq_len)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """The windows of one data set."""

    title: str
    windows: Int64[np.ndarray, "windows seq_len"]


def _part(
    dataset: str,
    config: CalibrateConfig,
    share: int,
    count: int,
    tokenizer: PreTrainedTokenizerBase,
    *,
    is_named: bool,
) -> _Part:
    """Return ``share`` windows, of ``count`` in all, of one data set; fewer of a short part of mix."""
    chat = config.apply_chat_template
    documents = open_documents(dataset, config.seed, with_messages=chat)
    enough = share * config.seq_len
    chats = _Chats(template=require_chat_template(tokenizer), enough=enough) if chat else None
    tokens = _token_stream(tokenizer, documents.texts, enough) if chats is None else chats.tokens(documents.texts)
    windows = pack_windows(tokens, share, config.seq_len, beginning_token(tokenizer))
    left_out = "" if chats is None else chats.left_out
    if len(windows) < (share if is_named else LEAST_WINDOWS):
        asked = "--calib_size is" if config.calib_size else "the default of --calib_size is"
        if share != count:
            asked = "its share of --calib_size is"
        without = f" without {left_out}" if left_out else ""
        raise UserError(
            f"--dataset {dataset} gives {counted(len(windows), 'window')} of {config.seq_len} tokens{without} and "
            f"{asked} {share}; lower --calib_size or --seq_len, or pass more text."
        )
    if left_out:
        _LOGGER.warning("--dataset %s is read without %s", dataset, left_out)
    return _Part(title=_title(documents, config), windows=windows)


def _title(documents: Documents, config: TextOptions) -> str:
    return f"{documents.title}, as chats" if config.apply_chat_template else documents.title


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


@dataclass(slots=True, kw_only=True)
class _Chats:
    """Write conversations by a template, and count those that it refuses."""

    template: ChatTemplate
    enough: int
    """Tokens."""
    written: int = 0
    refused: int = 0
    reason: str = ""

    def tokens(self, documents: Iterable[TextDocument]) -> Iterator[int]:
        """Yield the tokens of the conversations that the template doesn't refuse.

        Raises:
            UserError: it refuses all, or so many before the first that it seems to.
        """
        for document in documents:
            conversation = as_conversation(document) if isinstance(document, str) else document
            try:
                tokens = self.template.tokens(conversation, self.enough)
            except UserError as error:
                if self.refused == _MOST_REFUSED and not self.written:
                    raise
                self.refused += 1
                self.reason = self.reason or str(error)
            else:
                self.written += 1
                yield from tokens
        if self.refused and not self.written:
            raise UserError(self.reason)

    @property
    def left_out(self) -> str:
        """Return in words how many conversations were refused, and why; "" where none was."""
        if not self.refused:
            return ""
        reason = self.reason.partition(";")[0].removeprefix("The tokenizer's chat template refuses a conversation ")
        return f"{counted(self.refused, 'conversation')} that the tokenizer's chat template refuses {reason}"


def _token_stream(tokenizer: PreTrainedTokenizerBase, texts: Iterable[TextDocument], enough: int) -> Iterator[int]:
    for text in texts:
        assert isinstance(text, str), "conversations are asked for only with a chat template"
        ids = first_tokens(tokenizer, text, enough)
        yield from ids
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            yield tokenizer.eos_token_id


def _random_windows(
    config: CalibrateConfig, windows: int, vocab_size: int | None
) -> Int64[np.ndarray, "windows seq_len"]:
    if vocab_size is None:
        raise UserError("--use_random_calib needs the model's vocab_size; put genai_config.json into its folder.")
    try:
        return np.random.default_rng(config.seed).integers(vocab_size, size=(windows, config.seq_len), dtype=np.int64)
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


def _split(parts: Mapping[str, _Part], *, tokenizer: str) -> TokenWindows:
    """Hold the last windows of each part out, as neighbours in a document are no test."""
    held = held_out_windows({name: len(part.windows) for name, part in parts.items()})
    ends = {name: len(part.windows) - held[name] for name, part in parts.items()}
    calibration = _in_turn([part.windows[: ends[name]] for name, part in parts.items()])
    held_out = _in_turn([part.windows[ends[name] :] for name, part in parts.items()])
    return TokenWindows(
        calibration=calibration,
        held_out=held_out,
        source=" + ".join(part.title for part in parts.values()),
        tokenizer=tokenizer,
        fingerprint=_fingerprint(np.concatenate([calibration, held_out]), len(held_out)),
    )


def _in_turn(parts: Sequence[Int64[np.ndarray, "_ seq_len"]]) -> Int64[np.ndarray, "windows seq_len"]:
    """Return the windows of all parts, those of each spread evenly: the first few hold something of all large ones."""
    placed = [((index + 0.5) / len(part), window) for part in parts for index, window in enumerate(part)]
    return np.stack([window for _, window in sorted(placed, key=lambda each: each[0])])


def _fingerprint(windows: Int64[np.ndarray, "windows seq_len"], held_out: int) -> str:
    digest = hashlib.sha256(json.dumps([windows.shape, held_out]).encode())
    digest.update(windows.astype("<i8").tobytes())
    return digest.hexdigest()


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Hide the warnings of the libraries that fetch and tokenize; what fails is raised."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
