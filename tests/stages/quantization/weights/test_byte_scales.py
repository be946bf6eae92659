"""Scales as bytes: close to what they were, none of them 0, and only where they save bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stages.quantization.weights.byte_scales import has_byte_scales, in_bytes, saved_bytes
from stages.records.formats import PerBlock, PerChannel, QuantSpec, WeightForm
from tests.export.builders import site_of

SITE = site_of("y", "x", 640, 100)
SPEC = QuantSpec(bits=4, symmetric=False, granularity=PerBlock(block_size=32), scale_dtype="float16")


def test_a_scale_moves_by_half_a_step_at_most() -> None:
    scales = torch.rand(50, 20, generator=torch.Generator().manual_seed(0)) + 0.1
    scales[3] *= 1e-6
    stored = in_bytes(scales.half())
    wanted = scales.half().float()
    assert stored.multiples.dtype == torch.uint8
    assert (stored.multiples.amax(dim=1) == 255).all()
    assert ((stored.scales - wanted).abs() <= 0.501 * wanted.amax(dim=1, keepdim=True) / 255).all()
    assert (stored.scales.amax(dim=1) - wanted.amax(dim=1)).abs().max() <= 1e-6


def test_a_scale_beside_a_huge_one_is_not_lost() -> None:
    assert in_bytes(torch.tensor([[1.0, 1e-6]])).multiples.tolist() == [[255, 1]]


@pytest.mark.parametrize(
    ("site", "spec", "form"),
    [
        (SITE, replace(SPEC, bits=8), WeightForm.DQ),
        (SITE, replace(SPEC, symmetric=True), WeightForm.DQ),
        (SITE, replace(SPEC, granularity=PerChannel()), WeightForm.DQ),
        (SITE, replace(SPEC, granularity=PerBlock(block_size=256)), WeightForm.DQ),
        (SITE, replace(SPEC, scale_dtype="float32"), WeightForm.DQ),
        (replace(SITE, dtype="float16"), SPEC, WeightForm.DQ),
        (replace(SITE, out_features=20), SPEC, WeightForm.DQ),
        (SITE, SPEC, WeightForm.QDQ),
        (SITE, SPEC, WeightForm.DQ_COLUMN_MAJOR),
    ],
)
def test_others_stay_as_they_are(site: object, spec: QuantSpec, form: WeightForm) -> None:
    assert not has_byte_scales(site, spec, form)  # type: ignore[arg-type]


def test_a_byte_less_for_each_block_but_four_for_a_row() -> None:
    assert has_byte_scales(SITE, SPEC, WeightForm.DQ)
    assert has_byte_scales(SITE, SPEC, WeightForm.MATMUL_NBITS)
    assert saved_bytes(SITE, SPEC) == 100 * (20 - 4) - 400
