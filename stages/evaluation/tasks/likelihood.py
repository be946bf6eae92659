"""Compute log-likelihoods of continuations in batches of similar lengths, without a key/value cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int64

LogitsOf = Callable[[Int64[np.ndarray, "B L"]], Float32[np.ndarray, "B L V"]]
_PADDING = 0
"""Any token does: it comes after all others, and attention only looks back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """At least one token of context, and the tokens whose likelihood is asked for."""

    context: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """Sum of log p(token | all before it), in nats, and whether each token is the most likely one in its place."""

    log_probability: float
    is_greedy: bool


def likelihoods(
    requests: Sequence[Continuation], logits_of: LogitsOf, max_length: int, batch_tokens: int
) -> Iterator[tuple[int, Likelihood]]:
    """Yield (index of the request, its likelihood), the longest requests first.

    The model reads all tokens but the last; where they are more than ``max_length``, the context's first tokens are
    left out. A batch is padded on the right to at most ``batch_tokens`` tokens, or holds a single request.

    Args:
        requests: continuations of at most ``max_length`` tokens.
        logits_of: logits of full windows [B, L].
        max_length: tokens that the model reads at most.
        batch_tokens: tokens in a batch, padding included.
    """
    read = [(*request.context, *request.tokens)[-(max_length + 1) :][:-1] for request in requests]
    order = sorted(range(len(requests)), key=lambda index: -len(read[index]))
    for batch in _batches(order, [len(tokens) for tokens in read], batch_tokens):
        logits = logits_of(_padded([read[index] for index in batch]))
        for index, row in zip(batch, logits, strict=True):
            yield index, _likelihood(row[: len(read[index])], requests[index].tokens)


def _batches(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield neighbours in ``order``, whose lengths fall: the first of a batch is the longest."""
    batch: list[int] = []
    for index in order:
        if batch and lengths[batch[0]] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _padded(windows: Sequence[tuple[int, ...]]) -> Int64[np.ndarray, "B L"]:
    padded = np.full((len(windows), max(map(len, windows))), _PADDING, np.int64)
    for row, window in zip(padded, windows, strict=True):
        row[: len(window)] = window
    return padded


def _likelihood(logits: Float32[np.ndarray, "L V"], tokens: tuple[int, ...]) -> Likelihood:
    scores = torch.from_numpy(logits[len(logits) - len(tokens) :]).double().log_softmax(dim=-1)
    wanted = torch.tensor(tokens)
    return Likelihood(
        log_probability=scores.gather(1, wanted[:, None]).sum().item(),
        is_greedy=bool((scores.argmax(dim=-1) == wanted).all()),
    )
