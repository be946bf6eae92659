"""Rounding from the file in one pass gives the bits of rounding whole weights in float32."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from stages.errors import SolveError
from stages.quantization.search.affine import RangeRule, spec_for
from stages.quantization.search.choices import full_range, stored_weight
from stages.quantization.search.problem import IDENTITY
from stages.quantization.search.rounding import round_to_nearest
from stages.records.formats import Granularity, PerBlock, PerChannel, QuantSpec
from stages.records.results import QuantizedWeight
from stages.records.sites import FloatName
from tests.export.builders import site_of

TYPES: dict[FloatName, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def rounded(weight: Tensor, spec: QuantSpec, rule: RangeRule, dtype: FloatName) -> QuantizedWeight:
    with ThreadPoolExecutor(2) as pool:
        site = replace(site_of("y", "x", *weight.shape[::-1]), dtype=dtype)
        return round_to_nearest(weight, site, spec, rule, pool)


def expected(weight: Tensor, found: QuantizedWeight, rule: RangeRule, spec: QuantSpec) -> QuantizedWeight:
    wide = weight.float().contiguous()
    fitting = spec_for(wide, spec, found.site.dtype)
    return stored_weight(found.site, wide, fitting, full_range(wide, fitting, rule, IDENTITY))


def require_same(found: QuantizedWeight, wanted: QuantizedWeight) -> None:
    assert found.spec == wanted.spec
    for one, other in ((found.codes, wanted.codes), (found.scales, wanted.scales)):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    if wanted.zero_points is None:
        assert found.zero_points is None
    else:
        assert found.zero_points is not None
        assert torch.equal(found.zero_points, wanted.zero_points)


@pytest.mark.parametrize("inputs_first", [True, False])
@pytest.mark.parametrize("granularity", [PerBlock(block_size=16), PerBlock(block_size=128), PerChannel()])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rule", ["signed", "full", "asymmetric"])
@pytest.mark.parametrize("dtype", list(TYPES))
def test_every_bit_is_that_of_the_whole_weight(
    dtype: FloatName, rule: str, bits: Literal[4, 8], granularity: Granularity, inputs_first: bool
) -> None:
    channels, inputs = (1100, 600) if granularity == PerBlock(block_size=16) else (70, 300)
    weight = torch.randn(channels, inputs, generator=torch.Generator().manual_seed(0)).to(TYPES[dtype])
    weight[3] = 0
    weight[:, 5] *= 40
    if inputs_first:
        weight = weight.T.contiguous().T
    scales: FloatName = "float16" if dtype == "float32" else dtype
    spec = QuantSpec(bits=bits, symmetric=rule != "asymmetric", granularity=granularity, scale_dtype=scales)
    how: RangeRule = "signed" if rule == "signed" else "full"
    found = rounded(weight, spec, how, dtype)
    require_same(found, expected(weight, found, how, spec))


def test_scales_that_have_no_room_are_wide() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 1e-7
    spec = QuantSpec(bits=4, symmetric=False, granularity=PerBlock(block_size=16), scale_dtype="float16")
    found = rounded(weight, spec, "full", "float32")
    assert found.spec.scale_dtype == "float32"
    require_same(found, expected(weight, found, "full", spec))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(wrong: float) -> None:
    weight = torch.randn(64, 64)
    weight[63, 63] = wrong
    spec = QuantSpec(bits=4, symmetric=True, granularity=PerBlock(block_size=16), scale_dtype="float32")
    with pytest.raises(SolveError, match="The weight of y/MatMul holds NaN or infinite values"):
        rounded(weight, spec, "full", "float32")
