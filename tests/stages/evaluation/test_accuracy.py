"""Perplexity, divergence and agreement against a float64 reference, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from stages.evaluation.accuracy import by_position, score_window, summarize, worst_of_all, worst_of_window
from tests.reference import accuracy as reference


def random_logits(tokens: int, vocabulary: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed))


# 64 predictions fill a chunk: one less, exactly one chunk, one more, several.
@pytest.mark.parametrize("length", [2, 64, 65, 66, 150])
def test_scores_equal_the_reference(length: int) -> None:
    base = random_logits(length, 37, seed=0)
    model = base + 0.3 * random_logits(length, 37, seed=1)
    tokens = torch.randint(37, (length,), generator=torch.Generator().manual_seed(2))
    result = summarize([score_window(base, model, tokens)])
    rows, base_rows = model.double().tolist(), base.double().tolist()
    assert result.tokens == length - 1
    # Both sides compute in float64; only the order of sums differs.
    assert result.perplexity == pytest.approx(reference.perplexity(rows, tokens.tolist()), rel=1e-12)
    assert result.mean_divergence == pytest.approx(reference.mean_divergence(base_rows, rows), rel=1e-9)
    assert result.top1_agreement == pytest.approx(reference.top1_agreement(base_rows, rows), rel=1e-12)
    divergences = [reference.divergence(*pair) for pair in zip(base_rows[:-1], rows[:-1], strict=True)]
    assert result.divergence_99 == pytest.approx(reference.percentile(divergences, 0.99), rel=1e-9)


def test_windows_are_weighted_by_their_tokens() -> None:
    base, model = random_logits(40, 11, seed=3), random_logits(40, 11, seed=4)
    tokens = torch.arange(40) % 11
    whole = score_window(base, model, tokens)
    parts = [score_window(base[:31], model[:31], tokens[:31]), score_window(base[30:], model[30:], tokens[30:])]
    assert summarize(parts).mean_divergence == pytest.approx(summarize([whole]).mean_divergence, rel=1e-12)
    assert summarize(parts).tokens == 39


def test_divergence_is_zero_only_for_the_same_distribution() -> None:
    base = random_logits(20, 11, seed=5)
    tokens = torch.zeros(20, dtype=torch.int64)
    # A constant added to all logits of a row changes no probability; float32 keeps it to about 1e-7 of a logit.
    same = score_window(base, base + 7.0, tokens)
    assert same.divergence.abs().max() < 1e-10
    assert same.agrees.all()
    assert (score_window(base, base.flip(1), tokens).divergence > 0).all()


def test_uniform_logits_have_the_vocabulary_as_perplexity() -> None:
    flat = torch.zeros(10, 50)
    result = summarize([score_window(flat, flat, torch.arange(10))])
    assert result.perplexity == pytest.approx(50, rel=1e-12)


def test_a_token_that_a_model_never_says_costs_a_number() -> None:
    never = torch.zeros(10, 50)
    never[:, 3] = torch.finfo(torch.float32).min
    result = summarize([score_window(never, never, torch.full((10,), 3))])
    assert result.perplexity == pytest.approx(math.exp(700))
    assert result.mean_divergence == 0


# 40 predictions fill 20 bins of two; 33 fill 17, of which the last has one; 5 are 5 bins.
@pytest.mark.parametrize(("predictions", "bins", "last"), [(40, 20, (39, 40)), (33, 17, (33, 33)), (5, 5, (5, 5))])
def test_positions_are_binned_over_all_windows(predictions: int, bins: int, last: tuple[int, int]) -> None:
    length = predictions + 1
    tokens = torch.arange(length) % 11
    pairs = [(random_logits(length, 11, seed=seed), random_logits(length, 11, seed=seed + 10)) for seed in range(3)]
    found = by_position([score_window(base, model, tokens) for base, model in pairs])
    assert len(found) == bins
    assert (found[-1].first, found[-1].last) == last
    assert [part.first for part in found[1:]] == [part.last + 1 for part in found[:-1]]
    for part in found:
        divergences = [
            reference.divergence(base[place - 1].double().tolist(), model[place - 1].double().tolist())
            for base, model in pairs
            for place in range(part.first, part.last + 1)
        ]
        assert part.tokens == len(divergences)
        assert part.mean_divergence == pytest.approx(sum(divergences) / len(divergences), rel=1e-9)
        assert part.divergence_99 == pytest.approx(reference.percentile(divergences, 0.99), rel=1e-9)


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
