"""Free writing through onnxruntime-genai: a batch of windows at a time, sampled from the model's whole distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Int64

from stages.calibration.text.generation_script import GenerationScript, WindowWriter
from stages.errors import UserError, named
from stages.model.directory import ModelDirectory
from stages.model.genai_config import GENAI_CONFIG, read_genai_config
from stages.runtime.genai import import_genai, load_genai
from stages.runtime.providers import SHORT_NAMES
from stages.system.hardware import threads

LARGEST_BATCH = 32
"""onnxruntime-genai takes no more sequences at once."""
_INSTEAD = "choose another --dataset"


@runtime_checkable
class _Generator(Protocol):
    """What is needed of onnxruntime-genai's Generator; token ids are int32, logits [windows, 1, rows] float32."""

    def append_tokens(self, tokens: np.ndarray) -> None: ...

    def get_logits(self) -> np.ndarray: ...

    def set_logits(self, logits: np.ndarray) -> None: ...

    def generate_next_token(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """A model that onnxruntime-genai has loaded to write.

    ``vocabulary`` counts the token ids that may be sampled. ``suppressed_token`` is one that never comes out: the
    runtime, which stops at an end token and leaves padding out, is told that it is both.
    """

    runtime: ModuleType
    model: object
    vocabulary: int
    suppressed_token: int
    shortest_cache: int
    """Tokens that the runtime must hold room for: the window of attention that slides."""

    def write(
        self,
        scripts: Sequence[GenerationScript],
        uniforms: Float[np.ndarray, "windows seq_len"],
        on_tokens: Callable[[int], None],
    ) -> Int64[np.ndarray, "windows seq_len"]:
        """One window for each script, all at once, at temperature 1 and from the whole vocabulary.

        Args:
            scripts: at most LARGEST_BATCH.
            luck: uniform numbers from [0, 1): the only randomness. A window's first token is always given.
            on_tokens: told how many tokens each step has added.

        Raises:
            UserError: the runtime can't run the model.
        """
        scribes = [WindowWriter(script) for script in scripts]
        windows = np.zeros(uniforms.shape, np.int64)
        try:
            generator = self._generator(*uniforms.shape)
            windows[:, 0] = [scribe.next(self.suppressed_token) for scribe in scribes]
            generator.append_tokens(windows[:, :1].astype(np.int32))
            on_tokens(len(scribes))
            for step in range(1, uniforms.shape[1]):
                logits = generator.get_logits()
                sampled = sample(self._allowed(logits), uniforms[:, step])
                windows[:, step] = [scribe.next(int(token)) for scribe, token in zip(scribes, sampled, strict=True)]
                generator.set_logits(_only(windows[:, step], logits.shape))
                generator.generate_next_token()
                on_tokens(len(scribes))
        except RuntimeError as error:
            raise UserError(
                f"--dataset self: onnxruntime-genai can't go on writing ({named(error)}); {_INSTEAD}."
            ) from error
        return windows

    def _generator(self, batch_size: int, seq_len: int) -> _Generator:
        settings = self.runtime.GeneratorParams(self.model)
        # The runtime's own sampler sorts the whole vocabulary where nothing is to be cut off (more than twice as
        # slow on a CPU), so it searches greedily among logits that leave it no choice.
        settings.set_search_options(
            batch_size=batch_size,
            max_length=max(seq_len, self.shortest_cache),
            min_length=0,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
        )
        generator: _Generator = self.runtime.Generator(self.model, settings)
        return generator

    def _allowed(self, logits: Float32[np.ndarray, "windows 1 rows"]) -> Float32[np.ndarray, "windows allowed"]:
        allowed = logits[:, -1, : self.vocabulary].copy()
        if self.suppressed_token < self.vocabulary:
            allowed[:, self.suppressed_token] = -np.inf
        return allowed


def open_writer(
    directory: ModelDirectory, providers: Sequence[str], scripts: Sequence[GenerationScript], token_count: int
) -> Sampler:
    """Load the model with the first of ``providers`` that onnxruntime-genai can run it with.

    Args:
        directory: the model.
        providers: ONNX Runtime's names, in the order in which they are tried.
        scripts: all that will be written by.
        token_count: ids that the tokenizer has; a model's vocabulary may have more rows.

    Raises:
        UserError: onnxruntime-genai isn't installed, or can't run the model.
    """
    if directory.vocab_size is None:
        raise UserError(
            f"--dataset self: {directory.genai_config_path} gives no vocab_size, without which onnxruntime-genai can't "
            f"run the model; put it there, or {_INSTEAD}."
        )
    runtime = import_genai("--dataset self")
    suppressed_token = _suppressed_token(directory.vocab_size, scripts)
    reasons: list[str] = []
    for provider in providers:
        try:
            model = load_genai(
                runtime,
                directory.folder,
                threads=threads(),
                filename=directory.onnx_file.name,
                end_token=suppressed_token,
                provider=SHORT_NAMES[provider],
            )
        except Exception as error:  # RuntimeError mostly, by no promise
            reasons.append(f"{SHORT_NAMES[provider]}: {named(error)}")
            continue
        return Sampler(
            runtime=runtime,
            model=model,
            vocabulary=min(directory.vocab_size, token_count),
            suppressed_token=suppressed_token,
            shortest_cache=max(directory.windowed_caches.values(), default=0),
        )
    raise UserError(
        f"--dataset self: onnxruntime-genai can't run {directory.onnx_file} here ({'; '.join(reasons)}); {_INSTEAD}."
    )


def end_tokens(directory: ModelDirectory) -> frozenset[int]:
    """The tokens at which the model's genai_config.json ends generation.

    Raises:
        UserError: there is no such file.
    """
    if not directory.has_genai_config:
        raise UserError(
            f"--dataset self: {directory.folder} has no {GENAI_CONFIG}, without which onnxruntime-genai can't run the "
            f"model; put it there, or {_INSTEAD}."
        )
    named = read_genai_config(directory.folder).get("model", {}).get("eos_token_id", [])
    return frozenset(named if isinstance(named, list) else [named])


def sample(
    logits: Float32[np.ndarray, "windows vocabulary"], uniforms: Float[np.ndarray, " windows"]
) -> Int64[np.ndarray, " windows"]:
    """A token for each row, with probability softmax(logits): where the cumulated sum passes ``uniforms`` of the whole.

    Raises:
        UserError: a row holds NaN or infinity.
    """
    largest = logits.max(axis=1, keepdims=True)
    if not np.isfinite(largest).all():
        raise UserError(f"--dataset self: the model's logits are no numbers (NaN or infinite); {_INSTEAD}.")
    sums = np.cumsum(np.exp(logits - largest), axis=1, dtype=np.float64)
    wanted = uniforms * sums[:, -1]
    found = [np.searchsorted(row, value, side="right") for row, value in zip(sums, wanted, strict=True)]
    return np.array(found, np.int64)


def _suppressed_token(vocabulary: int, scripts: Sequence[GenerationScript]) -> int:
    """The last token that no script gives: a row without a token, a spare special one, or the rarest word."""
    given = frozenset[int]().union(*(script.given for script in scripts))
    return next(token for token in reversed(range(vocabulary)) if token not in given)


def _only(tokens: Int64[np.ndarray, " windows"], shape: tuple[int, ...]) -> Float32[np.ndarray, "windows 1 rows"]:
    """Logits of which each row's best is its token."""
    logits = np.zeros(shape, np.float32)
    logits[np.arange(len(tokens)), -1, tokens] = 1
    return logits
