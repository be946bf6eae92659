"""Measure on a builder-made model what forecasts are to be multiplied by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.calibration.cache import CalibrationCache
from stages.errors import UserError
from stages.model.directory import locate_model
from stages.model.load import load_graph
from stages.model.sites import find_groups
from stages.quantization.plan.budget.sensitivity import GroupSensitivity, SensitivityMeasure, divergence, unmeasured
from stages.records.formats import PerBlock, QuantSpec
from stages.records.results import ActivationStats, SearchStats, TokenStats
from stages.records.sites import ActivationGroup, MatMulSite
from stages.runtime.weight_trials import TrialRunner


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def test_the_divergence_is_the_mean_over_all_tokens() -> None:
    draw = np.random.default_rng(0)
    # 3 x 50 tokens: more than are held at once.
    base, other = (draw.normal(size=(3, 50, 30)).astype(np.float32) for _ in range(2))
    p, q = _log_softmax(base.astype(np.float64)), _log_softmax(other.astype(np.float64))
    expected = (np.exp(p) * (p - q)).sum(axis=-1).mean()
    assert divergence(torch.from_numpy(base), torch.from_numpy(other)) == pytest.approx(expected, rel=1e-9)
    assert divergence(torch.from_numpy(base), torch.from_numpy(base + 5)) == pytest.approx(0, abs=1e-6)


def test_forecasts_are_scaled_to_what_was_measured_and_to_nothing_without_one() -> None:
    assert GroupSensitivity(divergence=0.3, forecast=0.1).factor == pytest.approx(3)
    assert GroupSensitivity(divergence=0.0, forecast=0.0).factor == 0


def _measure(
    tiny_model: Path, cache: CalibrationCache, bits: int = 4
) -> tuple[SensitivityMeasure, list[ActivationGroup]]:
    """Return a measure of the groups of two sites each: gate and up of both layers."""
    directory = locate_model(tiny_model)
    model = load_graph(directory)
    groups = [group for group in find_groups(model) if len(group.sites) == 2]
    assert len(groups) == 2
    return SensitivityMeasure(
        model=model,
        directory=directory,
        cache=cache,
        device=torch.device("cpu"),
        rough_format=_rough(bits),
        rule="full",
    ), groups


def _rough(bits: int) -> Callable[[MatMulSite], QuantSpec]:
    def rough(of: MatMulSite) -> QuantSpec:
        return QuantSpec(bits=bits, symmetric=True, granularity=PerBlock(block_size=64), scale_dtype=of.dtype)

    return rough


def test_a_group_is_run_with_its_own_sites_replaced_and_no_other(
    tiny_model: Path, cache: CalibrationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[list[str]] = []
    original = TrialRunner.logits

    def noted(self, tokens, replaced=()):
        runs.append([site.name for site, _ in replaced])
        return original(self, tokens, replaced)

    monkeypatch.setattr(TrialRunner, "logits", noted)
    measure, groups = _measure(tiny_model, cache)
    found = measure.measure(groups)
    names = [[member.name for member in group.sites] for group in groups]
    assert runs == [[], *names]
    assert set(found) == {name for group in names for name in group}
    for gate, up in names:
        assert found[gate] == found[up] > 0


def test_what_is_kept_is_not_run_again_and_another_format_is(
    tiny_model: Path, cache: CalibrationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, groups = _measure(tiny_model, cache)
    assert unmeasured(cache, groups, _rough(4)) == groups
    measure.measure(groups[:1])
    assert unmeasured(cache, groups, _rough(4)) == groups[1:]
    found = measure.measure(groups)
    assert unmeasured(cache, groups, _rough(4)) == []
    assert unmeasured(cache, groups, _rough(8)) == groups
    path = cache.folder / "sensitivity.json"
    kept = path.read_text(encoding="utf-8")
    path.write_text(kept.replace('"forecast"', '"error"'), encoding="utf-8")  # an earlier version's, in another unit
    assert unmeasured(cache, groups, _rough(4)) == groups
    path.write_text(kept, encoding="utf-8")
    monkeypatch.setattr(TrialRunner, "logits", lambda *_: pytest.fail("the model runs again"))
    assert measure.measure(groups) == found


def test_a_factor_hardly_depends_on_the_size_of_the_error(tiny_model: Path, cache: CalibrationCache) -> None:
    coarse, groups = _measure(tiny_model, cache)
    at_four, at_eight = coarse.measure(groups), _measure(tiny_model, cache, bits=8)[0].measure(groups)
    # INT8's errors are hundreds of times smaller; divergence grows with the square of small changes, as errors do.
    for name, nats in at_four.items():
        assert nats / 3 < at_eight[name] < nats * 3


def test_a_group_that_no_token_reaches_has_no_weight(
    tiny_model: Path, cache: CalibrationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, groups = _measure(tiny_model, cache)
    size = groups[0].in_features
    silent = TokenStats(num_tokens=0, abs_mean=torch.zeros(size), gram=torch.zeros(size, size))
    nothing = SearchStats(tokens=ActivationStats(calibration=silent, held_out=silent), channel_weights={})
    monkeypatch.setattr(CalibrationCache, "read_for_search", lambda *_: nothing)
    assert set(measure.measure(groups).values()) == {0.0}


def test_a_folder_that_can_not_be_written_is_named(tiny_model: Path, cache: CalibrationCache) -> None:
    measure, groups = _measure(tiny_model, cache)
    (cache.folder / "sensitivity.json").mkdir()
    with pytest.raises(UserError, match=r"--sensitivity measured can't keep its results in .*sensitivity\.json"):
        measure.measure(groups)
