"""Calibrate on text that the model writes itself, for models whose training text nobody has; what it writes is kept.

Liu et al. 2023 (LLM-QAT, arXiv 2305.17888) and Williams et al. 2024 (arXiv 2410.17170) calibrate on such text.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
from jaxtyping import Float64, Int64
from pydantic import TypeAdapter

from stages.calibration.text.chat import find_chat_template, require_chat_template
from stages.calibration.text.generation_script import GenerationScript, ScriptKind, chat_script, text_script
from stages.calibration.text.sampler import LARGEST_BATCH, end_tokens, open_sampler
from stages.commands.progress import progress_bar
from stages.model.directory import ModelDirectory
from stages.model.load import fingerprint_model
from stages.system.json_file import explained, write_whole
from stages.system.lock import exclusive
from stages.system.paths import from_here

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOGGER = logging.getLogger(__name__)
_WINDOW_OVER_QUESTION = 4
"""A question takes a quarter of a window at most."""
_VERSION = 1
"""Of how text is written: another version writes other text with the same seed."""
_DIGITS = 10
OWN_TITLE = "the model's own "
"""How the title of such text begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """``count`` windows of ``seq_len`` tokens; all of them chats where ``chats_only``."""

    count: int
    seq_len: int
    seed: int
    chats_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedText:
    """Windows, and what they are in words."""

    title: str
    windows: Int64[np.ndarray, "windows seq_len"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextGenerator:
    """A model that writes, and the folder where its text is kept."""

    directory: ModelDirectory
    providers: tuple[str, ...]
    """ONNX Runtime's names, in the order in which they are tried."""
    folder: Path
    tokens_at_once: int = 16384
    """Of which the runtime holds keys and values: 32 windows of 512, fewer of longer ones."""

    def generate(self, tokenizer: PreTrainedTokenizerBase, request: GenerationRequest) -> GeneratedText:
        """Return windows that begin alternately with a text's first word and, given a chat template, with a question.

        Each window has random numbers of its own, so that it is the same among others (up to the rounding of sums,
        which may depend on their number). Windows that are kept from an earlier run are not written again; new ones are
        kept as soon as their batch is whole.

        Raises:
            UserError: chats are asked for and there is no template, onnxruntime-genai isn't installed or can't run the
                model, or the text can't be kept.
        """
        scripts = self._scripts(tokenizer, request)
        file = GeneratedTextFile(self.folder / self._file_name(scripts, len(tokenizer), request))
        if file.missing(request.count):
            with exclusive(file.path, option="--cache_dir", waits=True):
                if missing := file.missing(request.count):  # another run may have written them meanwhile
                    self._fill(file, missing, scripts, tokenizer, request)
            _LOGGER.info("the model's own text is kept in %s, for other calibrations to read", from_here(file.path))
        written = sorted(file.read(), key=lambda line: line.window)[: request.count]
        return GeneratedText(title=_title(written), windows=np.array([line.tokens for line in written], np.int64))

    def _fill(
        self,
        file: GeneratedTextFile,
        missing: Sequence[int],
        scripts: Sequence[GenerationScript],
        tokenizer: PreTrainedTokenizerBase,
        request: GenerationRequest,
    ) -> None:
        sampler = open_sampler(self.directory, self.providers, scripts, len(tokenizer))
        with progress_bar() as bar:
            tokens = len(missing) * request.seq_len
            task = bar.add_task("the model writes", total=tokens, unit="tokens", keeps="windows")
            for batch in self._batches(missing, request.seq_len):
                cast = [scripts[window % len(scripts)] for window in batch]
                uniforms = _uniforms(request.seed, batch, request.seq_len)
                file.add(_lines(batch, cast, sampler.generate(cast, uniforms, partial(bar.advance, task)), tokenizer))

    def _batches(self, windows: Sequence[int], seq_len: int) -> Iterator[Sequence[int]]:
        size = max(1, min(LARGEST_BATCH, self.tokens_at_once // seq_len))
        return (windows[first : first + size] for first in range(0, len(windows), size))

    def _scripts(self, tokenizer: PreTrainedTokenizerBase, request: GenerationRequest) -> tuple[GenerationScript, ...]:
        template = require_chat_template(tokenizer) if request.chats_only else find_chat_template(tokenizer)
        marks = None if template is None else template.marks()
        ends = end_tokens(self.directory)
        texts = () if request.chats_only else (text_script(tokenizer, marks, ends),)
        if marks is None:
            return texts
        return *texts, chat_script(tokenizer, marks, ends, max(1, request.seq_len // _WINDOW_OVER_QUESTION))

    def _file_name(self, scripts: Sequence[GenerationScript], token_count: int, request: GenerationRequest) -> str:
        """Return a name with a digest of all that decides about the text, but the machine and the number of windows."""
        content = {
            "version": _VERSION,
            "model": fingerprint_model(self.directory),
            "scripts": [script.description() for script in scripts],
            "token_count": token_count,
            "seq_len": request.seq_len,
            "seed": request.seed,
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return f"{self.directory.folder.name}.own-text-{digest[:_DIGITS]}.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedWindow:
    """A line of the file."""

    window: int
    """Its number, which decides about its script and random numbers."""
    kind: ScriptKind
    text: str
    tokens: tuple[int, ...]


_WINDOWS = TypeAdapter(GeneratedWindow)


@dataclass(frozen=True, slots=True)
class GeneratedTextFile:
    """The windows that a model has written; it grows by whole batches and need not exist."""

    path: Path

    def read(self) -> tuple[GeneratedWindow, ...]:
        """Return all that is kept.

        Raises:
            UserError: the file is damaged.
        """
        if not self.path.is_file():
            return ()
        with explained(f"{self.path} can't be read as the model's own text", "delete it"):
            # Bytes end lines at line feeds only; text also at characters that the model may have written.
            return tuple(_WINDOWS.validate_json(line) for line in self.path.read_bytes().splitlines())

    def missing(self, count: int) -> list[int]:
        """Return the numbers of the first ``count`` windows that aren't kept yet."""
        return sorted(set(range(count)) - {line.window for line in self.read()})

    def add(self, windows: Sequence[GeneratedWindow]) -> None:
        """Keep these windows too: all of them or, where that fails, none.

        Raises:
            UserError: there is no room, or no right to write.
        """
        lines = [_WINDOWS.dump_json(window) for window in (*self.read(), *windows)]
        failure = f"The model's own text can't be kept in {self.path.parent}"
        with explained(failure, "free space there, or choose another place with --cache_dir"):
            write_whole(self.path, b"".join(line + b"\n" for line in lines))


def _title(written: Sequence[GeneratedWindow]) -> str:
    kinds = Counter(line.kind for line in written)
    return OWN_TITLE + " + ".join(f"{kinds[kind]} {kind}s" for kind in get_args(ScriptKind) if kinds[kind])


def _uniforms(seed: int, batch: Sequence[int], seq_len: int) -> Float64[np.ndarray, "windows seq_len"]:
    return np.stack([np.random.default_rng((seed, window)).random(seq_len) for window in batch])


def _lines(
    batch: Sequence[int],
    cast: Sequence[GenerationScript],
    windows: Int64[np.ndarray, "windows seq_len"],
    tokenizer: PreTrainedTokenizerBase,
) -> list[GeneratedWindow]:
    return [
        GeneratedWindow(window=window, kind=script.kind, text=str(tokenizer.decode(tokens)), tokens=tuple(tokens))
        for window, script, tokens in zip(batch, cast, windows.tolist(), strict=True)
    ]
