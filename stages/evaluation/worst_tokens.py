"""The predictions in which a model is farthest from its base, as a person reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from stages.evaluation.accuracy import TokenScores

_FIRST = 3
"""Tokens shown of those that a model puts first."""
_CONTEXT = 32
"""Tokens shown before a prediction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """A token, and how likely both hold it: probabilities, 0 to 1."""

    token: str
    base: float
    model: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstToken:
    """One prediction."""

    window: int
    """Index of the window of text."""
    position: int
    """Index in the window of the token that is predicted."""
    divergence: float
    """KL(base || model), nats."""
    context: str
    """The text before it, up to 32 tokens."""
    following: Guess
    """What the text goes on with."""
    base_first: tuple[Guess, ...]
    """What the base holds most likely."""
    model_first: tuple[Guess, ...]
    """What the model holds most likely."""


def worst_of_window(
    window: int,
    base_logits: Float[Tensor, "L V"],
    logits: Float[Tensor, "L V"],
    tokens: Int64[Tensor, " L"],
    scores: TokenScores,
    count: int,
    decode: Callable[[Sequence[int]], str],
) -> Iterator[WorstToken]:
    """The ``count`` predictions of one window with the largest divergence above 0, the largest first.

    ``decode`` turns token ids into text.
    """
    found = scores.divergence.topk(min(count, len(scores.divergence)))
    for divergence, place in zip(found.values.tolist(), found.indices.tolist(), strict=True):
        if divergence > 0:
            base = torch.softmax(base_logits[place].double(), dim=-1)
            model = torch.softmax(logits[place].double(), dim=-1)
            guesses = _Guesses(base=base, model=model, decode=decode)
            yield WorstToken(
                window=window,
                position=place + 1,
                divergence=divergence,
                context=decode(tokens[max(0, place + 1 - _CONTEXT) : place + 1].tolist()),
                following=guesses.of(int(tokens[place + 1])),
                base_first=guesses.first(base),
                model_first=guesses.first(model),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Guesses:
    base: Float[Tensor, " V"]
    model: Float[Tensor, " V"]
    decode: Callable[[Sequence[int]], str]

    def of(self, token: int) -> Guess:
        return Guess(token=self.decode([token]), base=self.base[token].item(), model=self.model[token].item())

    def first(self, probabilities: Float[Tensor, " V"]) -> tuple[Guess, ...]:
        return tuple(self.of(token) for token in probabilities.topk(min(_FIRST, len(probabilities))).indices.tolist())


def worst_of_all(found: Sequence[WorstToken], count: int) -> tuple[WorstToken, ...]:
    """The ``count`` of ``found`` with the largest divergence, the largest first."""
    return tuple(sorted(found, key=lambda token: -token.divergence)[:count])
