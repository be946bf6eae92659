"""Accuracy from logits: perplexity, KL divergence from the base, top-1 agreement, and the tokens that lost most."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

_CHUNK_TOKENS = 64
_MAX_BINS = 32
_TOP_TOKENS = 3
"""Tokens shown of those that a model finds most likely."""
_CONTEXT_TOKENS = 32
"""Tokens shown before a prediction."""
_MOST_SURPRISE = 700.0
"""Nats whose exponential is still a number, and so can be written as JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """Scores of T predictions, in nats, and whether both models put the same token first."""

    surprise: Float[Tensor, " T"]
    """-log p(next token), float64."""
    divergence: Float[Tensor, " T"]
    """KL(base || model), float64."""
    agrees: Bool[Tensor, " T"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """A model's scores over a text."""

    tokens: int
    perplexity: float
    """exp(mean surprise)."""
    mean_divergence: float
    """Mean KL(base || model) per token, nats."""
    top1_agreement: float
    """Share of tokens, 0 to 1."""
    divergence_99: float | None = None
    """99th percentile of KL(base || model), nats; None in records of earlier versions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionBin:
    """Divergence over the predictions of tokens at some neighbouring positions, all windows together."""

    first: int
    """Position in the window of the first token predicted; 1 is the earliest there is."""
    last: int
    """The last, inclusive."""
    tokens: int
    mean_divergence: float
    """Mean KL(base || model), nats."""
    divergence_99: float
    """Its 99th percentile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """A token and its probability in both models, 0 to 1."""

    token: str
    base: float
    model: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstToken:
    """A prediction far from the base's."""

    window: int
    """Index of the window of text."""
    position: int
    """Index in the window of the token that is predicted."""
    divergence: float
    """KL(base || model), nats."""
    context: str
    """The text before it, up to 32 tokens."""
    following: Guess
    """The token that comes next in the text."""
    base_first: tuple[Guess, ...]
    """The base's most likely tokens."""
    model_first: tuple[Guess, ...]
    """The model's most likely tokens."""


def score_window(
    base_logits: Float[Tensor, "L V"], logits: Float[Tensor, "L V"], tokens: Int64[Tensor, " L"]
) -> TokenScores:
    """Score the L - 1 predictions that have a next token in the window.

    Computed in float64 for 64 tokens at a time: the extra memory is a few hundred MB even for 256,000 tokens.
    """
    predictions = len(tokens) - 1
    chunks = [slice(i, min(i + _CHUNK_TOKENS, predictions)) for i in range(0, predictions, _CHUNK_TOKENS)]
    following = tokens[1:]
    return _join([_score_chunk(base_logits[chunk], logits[chunk], following[chunk]) for chunk in chunks])


def _score_chunk(
    base_logits: Float[Tensor, "T V"], logits: Float[Tensor, "T V"], following: Int64[Tensor, " T"]
) -> TokenScores:
    base = torch.log_softmax(base_logits.double(), dim=-1)
    model = torch.log_softmax(logits.double(), dim=-1)
    return TokenScores(
        surprise=-model.gather(1, following[:, None])[:, 0],
        divergence=torch.nn.functional.kl_div(model, base, reduction="none", log_target=True).sum(dim=-1),
        agrees=base_logits.argmax(dim=-1) == logits.argmax(dim=-1),
    )


def _join(parts: list[TokenScores]) -> TokenScores:
    return TokenScores(
        surprise=torch.cat([part.surprise for part in parts]),
        divergence=torch.cat([part.divergence for part in parts]),
        agrees=torch.cat([part.agrees for part in parts]),
    )


def summarize(windows: list[TokenScores]) -> Accuracy:
    """Return the means over the predictions of all windows."""
    scores = _join(windows)
    return Accuracy(
        tokens=len(scores.surprise),
        perplexity=math.exp(min(scores.surprise.mean().item(), _MOST_SURPRISE)),
        mean_divergence=scores.divergence.mean().item(),
        top1_agreement=scores.agrees.double().mean().item(),
        divergence_99=_percentile_99(scores.divergence),
    )


def by_position(windows: list[TokenScores]) -> tuple[PositionBin, ...]:
    """Return the divergence by position for windows of one length, in at most 32 bins; the last may be narrower."""
    divergences = torch.stack([window.divergence for window in windows])
    positions = divergences.shape[1]
    width = -(-positions // _MAX_BINS)
    return tuple(
        PositionBin(
            first=start + 1,
            last=min(start + width, positions),
            tokens=part.numel(),
            mean_divergence=part.mean().item(),
            divergence_99=_percentile_99(part),
        )
        for start in range(0, positions, width)
        for part in (divergences[:, start : start + width],)
    )


def _percentile_99(values: Tensor) -> float:
    # numpy's, because torch's takes 16 million numbers at most.
    return float(np.percentile(values.numpy(), 99))


def worst_of_window(
    window: int,
    base_logits: Float[Tensor, "L V"],
    logits: Float[Tensor, "L V"],
    tokens: Int64[Tensor, " L"],
    scores: TokenScores,
    count: int,
    decode: Callable[[Sequence[int]], str],
) -> Iterator[WorstToken]:
    """Yield the predictions of one window with the largest divergence above 0, the largest first.

    Args:
        window: index of the window.
        base_logits: the base's logits.
        logits: the model's logits.
        tokens: the window's token ids.
        scores: what ``score_window`` gave for the same window.
        count: predictions at most.
        decode: turns token ids into text.
    """
    found = scores.divergence.topk(min(count, len(scores.divergence)))
    for divergence, place in zip(found.values.tolist(), found.indices.tolist(), strict=True):
        if divergence > 0:
            base = torch.softmax(base_logits[place].double(), dim=-1)
            model = torch.softmax(logits[place].double(), dim=-1)
            yield WorstToken(
                window=window,
                position=place + 1,
                divergence=divergence,
                context=decode(tokens[max(0, place + 1 - _CONTEXT_TOKENS) : place + 1].tolist()),
                following=_guess(int(tokens[place + 1]), base, model, decode),
                base_first=tuple(_guess(token, base, model, decode) for token in _top_tokens(base)),
                model_first=tuple(_guess(token, base, model, decode) for token in _top_tokens(model)),
            )


def _guess(
    token: int, base: Float[Tensor, " V"], model: Float[Tensor, " V"], decode: Callable[[Sequence[int]], str]
) -> Guess:
    return Guess(token=decode([token]), base=base[token].item(), model=model[token].item())


def _top_tokens(probabilities: Float[Tensor, " V"]) -> list[int]:
    return [int(token) for token in probabilities.topk(min(_TOP_TOKENS, len(probabilities))).indices]


def worst_of_all(found: Sequence[WorstToken], count: int) -> tuple[WorstToken, ...]:
    """Return the ``count`` of ``found`` with the largest divergence, the largest first."""
    return tuple(sorted(found, key=lambda token: -token.divergence)[:count])
