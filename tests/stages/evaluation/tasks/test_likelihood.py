"""Batched log-likelihoods equal those of each request by itself, token by token."""

from __future__ import annotations

import numpy as np
import pytest

from stages.evaluation.tasks.likelihood import Continuation, likelihoods
from tests.reference import accuracy as reference

VOCABULARY = 17


class CausalModel:
    """Logits that depend on the token, its place and the sum of all before it; remembers the shapes it was given."""

    def __init__(self) -> None:
        self.table = np.random.default_rng(0).normal(size=(97, VOCABULARY)).astype(np.float32)
        self.shapes: list[tuple[int, int]] = []

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        self.shapes.append(tokens.shape)
        state = np.cumsum(tokens * (np.arange(tokens.shape[1]) + 3), axis=1) % 97
        return self.table[state]


def requests(count: int, longest: int) -> list[Continuation]:
    generator = np.random.default_rng(1)
    made = []
    for _ in range(count):
        context, continuation = (generator.integers(1, longest, endpoint=True) for _ in range(2))
        draw = [tuple(generator.integers(VOCABULARY, size=size).tolist()) for size in (context, continuation)]
        made.append(Continuation(context=draw[0], tokens=draw[1]))
    return made


# 1 token a batch: every request by itself; 40: some together; 10,000: all in one.
@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
# 30 tokens hold every request; with 8 most contexts are cut from the left, never a continuation.
@pytest.mark.parametrize("max_length", [30, 8])
def test_batches_equal_single_requests(batch_tokens: int, max_length: int) -> None:
    asked = requests(count=23, longest=8)
    model = CausalModel()
    found = dict(likelihoods(asked, model, max_length, batch_tokens))
    assert sorted(found) == list(range(len(asked)))
    assert all(batch * length <= batch_tokens or batch == 1 for batch, length in model.shapes)
    assert [length for _, length in model.shapes] == sorted((length for _, length in model.shapes), reverse=True)
    for index, request in enumerate(asked):
        read = [*request.context, *request.tokens][:-1][-max_length:]
        rows = CausalModel()(np.array([read]))[0][-len(request.tokens) :].astype(np.float64).tolist()
        expected = reference.log_likelihood(rows, list(request.tokens))
        assert found[index].log_probability == pytest.approx(expected, rel=1e-9)
        best = [row.index(max(row)) for row in rows]
        assert found[index].is_greedy == (best == list(request.tokens))


def test_greedy_continuations_are_recognised() -> None:
    model = CausalModel()
    tokens = [3, 5]
    for _ in range(4):
        tokens.append(int(model(np.array([tokens]))[0, -1].argmax()))
    greedy = Continuation(context=tuple(tokens[:2]), tokens=tuple(tokens[2:]))
    other = Continuation(context=tuple(tokens[:2]), tokens=(*tokens[2:-1], (tokens[-1] + 1) % VOCABULARY))
    found = dict(likelihoods([greedy, other], model, 100, 100))
    assert found[0].is_greedy
    assert not found[1].is_greedy


def test_nothing_asked_is_nothing_run() -> None:
    model = CausalModel()
    assert list(likelihoods([], model, 10, 10)) == []
    assert model.shapes == []
