"""Sensitivities from statistics by hand, and measured ones on a builder-made model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.calibration.cache import CalibrationCache, open_cache
from stages.errors import UserError
from stages.model.directory import locate_model
from stages.model.load import fingerprint_model, load_graph
from stages.model.sites import find_groups
from stages.quantization.plan.sensitivity import (
    GroupSensitivity,
    SensitivityMeasure,
    divergence,
    output_sections,
    residual_sensitivities,
    unmeasured,
)
from stages.records.formats import PerBlock, QuantSpec
from stages.records.results import ActivationStats, TokenStats
from stages.records.sites import (
    ActivationGroup,
    HeadSharing,
    LinearAbsorber,
    MatMulSite,
    NormAbsorber,
    ValueAbsorber,
)
from stages.runtime.weight_trials import TrialRunner
from tests.stages.quantization.search.problems import site

HEADS = HeadSharing(kv_heads=2, group_size=3, head_size=8)
NORM = NormAbsorber(output="n", parameters=("gain",))


def _layer(index: int) -> tuple[ActivationGroup, ...]:
    """Packed qkv (48 + 16 + 16 channels), o_proj, gate and up, down_proj over a stream of 40 channels."""
    names = {kind: f"layers.{index}/{kind}" for kind in ("qkv", "o", "gate", "up", "down")}

    def group(absorber: object, width: int, inner: int, *kinds: str) -> ActivationGroup:
        sites = tuple(site(names[kind], width, inner) for kind in kinds)
        return ActivationGroup(activation=f"x of {kinds[0]}", in_features=inner, sites=sites, absorber=absorber)

    return (
        group(NORM, 80, 40, "qkv"),
        group(ValueAbsorber(site=names["qkv"], first_channel=64, heads=HEADS), 40, 48, "o"),
        group(NORM, 96, 40, "gate", "up"),
        group(LinearAbsorber(site=names["up"]), 40, 96, "down"),
    )


HEAD = ActivationGroup(
    activation="final",
    in_features=40,
    sites=(replace(site("lm_head", 300, 40), feeds_logits=True),),
    absorber=NORM,
)
GROUPS = (*_layer(0), *_layer(1), HEAD)


def _energies(**of_writers: float) -> dict[str, float]:
    names = [member.name for group in GROUPS for member in group.sites]
    return {name: of_writers.get(name.replace("layers.", "l").replace("/", "_"), 7.0) for name in names}


def test_writers_have_their_share_of_the_stream_so_far_and_readers_the_median() -> None:
    shares = residual_sensitivities(GROUPS, _energies(l0_o=1.0, l0_down=3.0, l1_o=1.0, l1_down=5.0))
    expected = {"layers.0/o": 1.0, "layers.0/down": 3 / 4, "layers.1/o": 1 / 5, "layers.1/down": 5 / 10}
    assert {name: shares[name] for name in expected} == pytest.approx(expected)
    usual = (1 / 2 + 3 / 4) / 2
    for name in ("layers.0/qkv", "layers.1/gate", "layers.1/up"):
        assert shares[name] == pytest.approx(usual)
    assert shares["lm_head"] == 1.0
    assert set(shares) == {member.name for group in GROUPS for member in group.sites}


def test_a_few_loud_tokens_count_where_they_are_made_and_do_not_drown_the_rest() -> None:
    shares = residual_sensitivities(GROUPS, _energies(l0_o=2.0, l0_down=2e6, l1_o=2.0, l1_down=2.0))
    # R holds four times the median (2) for the loud block.
    assert shares["layers.0/down"] == pytest.approx(2e6 / (2 + 8))
    assert shares["layers.1/o"] == pytest.approx(2 / (2 + 8 + 2))


def test_without_writers_every_error_counts_the_same() -> None:
    groups = tuple(group for group in GROUPS if isinstance(group.absorber, NormAbsorber))
    assert set(residual_sensitivities(groups, _energies()).values()) == {1.0}


def test_sections_are_those_of_a_packed_qkv() -> None:
    assert output_sections(GROUPS)["layers.1/qkv"] == (slice(0, 48), slice(48, 64), slice(64, 80))
    apart = replace(GROUPS[1], absorber=ValueAbsorber(site="v", first_channel=0, heads=HEADS))
    assert output_sections((apart,)) == {}


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


def test_nats_are_those_of_a_unit_of_error_and_none_without_error() -> None:
    assert GroupSensitivity(divergence=0.3, error=0.1).per_error == pytest.approx(3)
    assert GroupSensitivity(divergence=0.0, error=0.0).per_error == 0


@pytest.fixture
def cache(tiny_model: Path, tiny_cache: Path, tmp_path: Path) -> CalibrationCache:
    """Return a copy, since sensitivities are kept in it."""
    folder = Path(shutil.copytree(tiny_cache, tmp_path / "cache"))
    return open_cache(folder, fingerprint_model(locate_model(tiny_model)))


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
        sections={},
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
    monkeypatch.setattr(TrialRunner, "logits", lambda *_: pytest.fail("the model runs again"))
    assert measure.measure(groups) == found


def test_a_nat_for_a_unit_of_error_hardly_depends_on_the_size_of_the_error(
    tiny_model: Path, cache: CalibrationCache
) -> None:
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
    nothing = ActivationStats(calibration=silent, held_out=silent)
    monkeypatch.setattr(CalibrationCache, "read", lambda *_: nothing)
    assert set(measure.measure(groups).values()) == {0.0}


def test_a_folder_that_can_not_be_written_is_named(tiny_model: Path, cache: CalibrationCache) -> None:
    measure, groups = _measure(tiny_model, cache)
    (cache.folder / "sensitivity.json").mkdir()
    with pytest.raises(UserError, match=r"--sensitivity measured can't keep its results in .*sensitivity\.json"):
        measure.measure(groups)
