from dataclasses import replace

import pytest

from stages.quantization.plan.sensitivity import output_sections, residual_sensitivities
from stages.records.sites import ActivationGroup, HeadSharing, LinearAbsorber, NormAbsorber, ValueAbsorber
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
