"""Sample text from the model through onnxruntime-genai, a batch of windows at a time, from the whole distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Int64

from stages.calibration.text.generation_script import GenerationScript, WindowWriter
from stages.errors import UserError, with_class_name
from stages.model.directory import ModelDirectory
from stages.model.genai_config import GENAI_CONFIG, end_tokens_of, read_genai_config
from stages.runtime.genai import import_genai, load_genai
from stages.runtime.providers import SHORT_NAMES

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
    """A model that onnxruntime-genai has loaded."""

    runtime: ModuleType
    model: object
    vocabulary: int
    """Token ids that may be sampled: those below it."""
    suppressed_token: int
    """A token that never comes out: the runtime stops at an end token and leaves padding out, and takes it for both."""
    shortest_cache: int
    """Tokens that the runtime must hold room for: the window of attention that slides."""

    def generate(
        self,
        scripts: Sequence[GenerationScript],
        uniforms: Float[np.ndarray, "windows seq_len"],
        on_tokens: Callable[[int], None],
    ) -> Int64[np.ndarray, "windows seq_len"]:
        """Return one window for each script, written all at once, at temperature 1 and from the whole vocabulary.

        Args:
            scripts: at most LARGEST_BATCH.
            uniforms: numbers from [0, 1): the only randomness. A window's first token is always given.
            on_tokens: called after each step with the number of tokens that it has added.

        Raises:
            UserError: the runtime can't run the model.
        """
        writers = [WindowWriter(script) for script in scripts]
        windows = np.zeros(uniforms.shape, np.int64)
        try:
            generator = self._generator(*uniforms.shape)
            windows[:, 0] = [writer.next(self.suppressed_token) for writer in writers]
            generator.append_tokens(windows[:, :1].astype(np.int32))
            on_tokens(len(writers))
            for step in range(1, uniforms.shape[1]):
                logits = generator.get_logits()
                sampled = sample(self._allowed(logits), uniforms[:, step])
                windows[:, step] = [writer.next(int(token)) for writer, token in zip(writers, sampled, strict=True)]
                generator.set_logits(_only(windows[:, step], logits.shape))
                generator.generate_next_token()
                on_tokens(len(writers))
        except RuntimeError as error:
            raise UserError(
                f"--dataset self: onnxruntime-genai stops while it writes ({with_class_name(error)}); {_INSTEAD}."
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


def open_sampler(
    directory: ModelDirectory, providers: Sequence[str], scripts: Sequence[GenerationScript], token_count: int
) -> Sampler:
    """Load the model with the first of ``providers`` that onnxruntime-genai can run it with.

    Args:
        directory: the model.
        providers: ONNX Runtime's names, in the order in which they are tried.
        scripts: all that will be used.
        token_count: token ids that the tokenizer has; a model's vocabulary may have more rows.

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
                filename=directory.onnx_name,
                end_token=suppressed_token,
                provider=SHORT_NAMES[provider],
            )
        except Exception as error:  # RuntimeError mostly, by no promise
            reasons.append(f"{SHORT_NAMES[provider]}: {with_class_name(error)}")
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
    """Return the tokens at which the model's genai_config.json ends generation.

    Raises:
        UserError: there is no such file.
    """
    if not directory.has_genai_config:
        raise UserError(
            f"--dataset self: {directory.folder} has no {GENAI_CONFIG}, without which onnxruntime-genai can't run the "
            f"model; put it there, or {_INSTEAD}."
        )
    return end_tokens_of(read_genai_config(directory.folder))


def sample(
    logits: Float32[np.ndarray, "windows vocabulary"], uniforms: Float[np.ndarray, " windows"]
) -> Int64[np.ndarray, " windows"]:
    """Return a token for each row, drawn from softmax(logits): where the running sum passes ``uniforms`` of the whole.

    Raises:
        UserError: a row holds NaN or infinity.
    """
    largest = logits.max(axis=1, keepdims=True)
    if not np.isfinite(largest).all():
        raise UserError(f"--dataset self: the model's logits are NaN or infinite; {_INSTEAD}.")
    sums = np.cumsum(np.exp(logits - largest), axis=1, dtype=np.float64)
    wanted = uniforms * sums[:, -1]
    found = [np.searchsorted(row, value, side="right") for row, value in zip(sums, wanted, strict=True)]
    return np.array(found, np.int64)


def _suppressed_token(vocabulary: int, scripts: Sequence[GenerationScript]) -> int:
    """Return the last token that no script gives: a row without a token, a spare special one, or the rarest word."""
    given = frozenset[int]().union(*(script.given for script in scripts))
    return next(token for token in reversed(range(vocabulary)) if token not in given)


def _only(tokens: Int64[np.ndarray, " windows"], shape: tuple[int, ...]) -> Float32[np.ndarray, "windows 1 rows"]:
    """Return logits that leave each row no choice but its token."""
    logits = np.zeros(shape, np.float32)
    logits[np.arange(len(tokens)), -1, tokens] = 1
    return logits
