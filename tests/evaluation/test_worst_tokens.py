"""The predictions that lost most: which, in which words, with which probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from stages.evaluation.accuracy import score_window
from stages.evaluation.worst_tokens import worst_of_all, worst_of_window
from tests.reference import accuracy as reference

VOCABULARY = 13


def words(tokens: Sequence[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)


def test_the_worst_predictions_are_found_and_told_in_words() -> None:
    generator = torch.Generator().manual_seed(0)
    length = 70
    base = 3 * torch.randn(length, VOCABULARY, generator=generator)
    model = base + 0.5 * torch.randn(length, VOCABULARY, generator=generator)
    tokens = torch.randint(VOCABULARY, (length,), generator=generator)
    rows, base_rows = model.double().tolist(), base.double().tolist()
    divergences = [reference.divergence(*pair) for pair in zip(base_rows[:-1], rows[:-1], strict=True)]
    expected = sorted(range(length - 1), key=lambda place: -divergences[place])[:4]
    found = list(worst_of_window(5, base, model, tokens, score_window(base, model, tokens), 4, words))
    assert [token.position for token in found] == [place + 1 for place in expected]
    for token, place in zip(found, expected, strict=True):
        of_base, of_model = reference.probabilities(base_rows[place]), reference.probabilities(rows[place])
        assert token.window == 5
        assert token.divergence == pytest.approx(divergences[place], rel=1e-9)
        assert token.context == words(tokens[max(0, place - 31) : place + 1].tolist())
        following = int(tokens[place + 1])
        assert token.following.token == f"w{following}"
        assert token.following.base == pytest.approx(of_base[following], rel=1e-9)
        assert token.following.model == pytest.approx(of_model[following], rel=1e-9)
        for guesses, probabilities in ((token.base_first, of_base), (token.model_first, of_model)):
            order = sorted(range(VOCABULARY), key=lambda word: -probabilities[word])[:3]
            assert [guess.token for guess in guesses] == [f"w{word}" for word in order]
            assert [guess.base for guess in guesses] == pytest.approx([of_base[word] for word in order], rel=1e-9)
            assert [guess.model for guess in guesses] == pytest.approx([of_model[word] for word in order], rel=1e-9)


def test_windows_compete_and_what_lost_nothing_is_left_out() -> None:
    base = torch.zeros(4, VOCABULARY)
    tokens = torch.arange(4)
    found = []
    for window, change in enumerate((0.5, 2.0)):
        model = base.clone()
        model[1, 3] += change
        found += worst_of_window(window, base, model, tokens, score_window(base, model, tokens), 3, words)
    assert [token.window for token in found] == [0, 1]
    assert [token.window for token in worst_of_all(found, 5)] == [1, 0]
    assert [token.window for token in worst_of_all(found, 1)] == [1]
