"""Open a model in ONNX Runtime: the logits of whole windows, and greedy continuation token by token."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort
from jaxtyping import Float32, Int64

from stages.errors import UserError
from stages.model.directory import ModelDirectory, logits_among
from stages.runtime.cpu.runnable import open_file
from stages.runtime.feeds import CausalFeeds, as_values
from stages.runtime.session import SessionSettings, runtime_reason

PAST = re.compile(r"past(_key_values)?")
"""What names of cache inputs have where those of the outputs that follow them have ``present``."""
_Values = Mapping[str, ort.OrtValue]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """An open session of a model, and the feeds of its inputs."""

    directory: ModelDirectory
    feeds: CausalFeeds
    others: _Values = field(default_factory=dict)
    """Inputs that are the same in every run and don't come from the tokens."""

    def logits(self, tokens: Int64[np.ndarray, "B L"]) -> Float32[np.ndarray, "B L V"]:
        """Return the logits of windows, past key/values empty; where the graph takes longer ones, they are filled up.

        Raises:
            UserError: the graph takes shorter windows, gives logits of some tokens only, or ONNX Runtime stops.
        """
        windows = self.feeds.window.filled(tokens)
        found = [self._run([self._logits], as_values(self.feeds(each)))[0] for each in windows]
        logits = np.concatenate([part.numpy() for part in found]).astype(np.float32, copy=False)
        batch, length = tokens.shape
        if logits.ndim != 3 or logits.shape[1] < length:
            raise UserError(
                f"{self.directory.onnx_file} gives logits {list(logits.shape)} of {batch} x {length} tokens, not "
                "those of each token, which are compared; build it without a pruned lm_head."
            )
        return logits[:batch, :length]

    def continuation(self, tokens: list[int]) -> Iterator[int]:
        """Yield the most likely tokens behind ``tokens``, without end; each is computed when it is asked for.

        Keys and values are kept from step to step. Where attention drops old tokens itself, or a cache has no
        output of its own, everything is computed again for each token.

        Raises:
            UserError: ONNX Runtime stops.
        """
        present_of = self._present_of_past()
        return self._recomputed(tokens) if present_of is None else self._cached(tokens, present_of)

    def _recomputed(self, tokens: list[int]) -> Iterator[int]:
        known = list(tokens)
        while True:
            known.append(int(self.logits(np.array([known]))[0, -1].argmax()))
            yield known[-1]

    def _cached(self, tokens: list[int], present_of: Mapping[str, str]) -> Iterator[int]:
        feeds, length = as_values(self.feeds(np.array([tokens]))), len(tokens)
        while True:
            logits, *presents = self._run([self._logits, *present_of.values()], feeds)
            token = int(logits.numpy()[0, -1].argmax())
            yield token
            next_feeds = as_values(self.feeds(np.array([[token]]), past=length))
            feeds = next_feeds | dict(zip(present_of, presents, strict=True))
            length += 1

    @property
    def _logits(self) -> str:
        return logits_among((node.name for node in self.feeds.session.get_outputs()), self.directory)

    def _present_of_past(self) -> dict[str, str] | None:
        """Return the output that becomes each cache input in the next step; None where a cache slides or has none."""
        outputs = {node.name for node in self.feeds.session.get_outputs()}
        pairs = {name: PAST.sub("present", name) for name in self.feeds.states}
        fixed = self.feeds.window.length or self.feeds.hidden_past or self.directory.windowed_caches
        return pairs if set(pairs.values()) <= outputs and not fixed else None

    def _run(self, outputs: list[str], feeds: _Values) -> list[ort.OrtValue]:
        try:
            return list(self.feeds.session.run_with_ort_values(outputs, {**feeds, **self.others}))
        except Exception as error:  # onnxruntime raises classes without a common base
            raise UserError(
                f"ONNX Runtime can't run {self.directory.onnx_file} ({runtime_reason(error)}); try another of --eps."
            ) from error


@contextmanager
def open_decoder(
    directory: ModelDirectory,
    settings: SessionSettings,
    scratch: Path | None,
    fed_otherwise: frozenset[str] = frozenset(),
) -> Iterator[Decoder]:
    """Open the model in ``directory``; meanwhile ``scratch`` holds a float32 copy of a bfloat16 one.

    Args:
        directory: the model.
        settings: how its session is opened.
        scratch: folder for the copy; None is the system's folder for temporary files.
        fed_otherwise: inputs that don't come from the tokens.

    Raises:
        GraphError: ONNX Runtime refuses the model.
    """
    with open_file(directory.onnx_file, settings, scratch) as session:
        feeds = CausalFeeds.of(
            session, directory, fed_otherwise, advice="evaluate it with the program that it was made for"
        )
        yield Decoder(directory=directory, feeds=feeds)
