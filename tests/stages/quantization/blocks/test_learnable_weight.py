"""A learnable weight begins exactly at its start, and what is tuned is what is stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stages.quantization.blocks.learnable_weight import LearnableWeight, effective_weight
from stages.quantization.search.affine import split
from stages.records.formats import PerBlock, PerChannel, QuantSpec
from stages.records.results import QuantizedWeight
from tests.reference import signround as reference
from tests.stages.quantization.search.problems import site

N, K, B = 5, 40, 16  # the last block is half full


def _spec(*, symmetric: bool, dtype: str = "float32", bits: int = 4, per_channel: bool = False) -> QuantSpec:
    granularity = PerChannel() if per_channel else PerBlock(block_size=B)
    return QuantSpec(bits=bits, symmetric=symmetric, granularity=granularity, scale_dtype=dtype)


def _start(spec: QuantSpec, *, scaled: bool, seed: int = 0) -> tuple[Tensor, QuantizedWeight]:
    """Return a weight, and codes that are anything but its rounding, as GPTQ leaves them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator)
    blocks = spec.num_blocks(K)
    scales = (torch.rand(N, blocks, generator=generator) * 0.3 + 0.1).to(getattr(torch, spec.scale_dtype))
    zero_points = None if spec.symmetric else torch.randint(3, 13, (N, blocks), generator=generator).to(torch.uint8)
    codes = torch.randint(spec.code_min, spec.code_max + 1, (N, K), generator=generator).to(spec.code_dtype)
    input_scale = torch.rand(K, generator=generator) + 0.5 if scaled else None
    quantized = QuantizedWeight(
        site=site("s", N, K), spec=spec, codes=codes, scales=scales, zero_points=zero_points, input_scale=input_scale
    )
    return weight, quantized


def _assert_equal(found: QuantizedWeight, expected: QuantizedWeight) -> None:
    for name in ("codes", "scales", "zero_points", "input_scale"):
        left, right = getattr(found, name), getattr(expected, name)
        assert (left is None) == (right is None), name
        assert left is None or (left.dtype == right.dtype and torch.equal(left, right)), name


FORMS = pytest.mark.parametrize(
    "spec",
    [
        _spec(symmetric=True),
        _spec(symmetric=False),
        _spec(symmetric=True, dtype="float16"),
        _spec(symmetric=False, dtype="bfloat16"),
        _spec(symmetric=True, bits=8, per_channel=True),
        _spec(symmetric=False, bits=8, per_channel=True),
    ],
    ids=lambda spec: f"{spec.label}-{'symmetric' if spec.symmetric else 'zero-points'}-{spec.scale_dtype}",
)


@FORMS
@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled"])
def test_it_begins_exactly_at_the_start(spec: QuantSpec, scaled: bool) -> None:
    """Codes, scales and zero points to the bit, whatever chose them; and the weight is what they stand for."""
    weight, start = _start(spec, scaled=scaled)
    learnable = LearnableWeight(weight, start)
    _assert_equal(learnable.quantized(), start)
    assert torch.equal(learnable.weight(), effective_weight(start, weight.device))


def test_codes_that_rounding_gives_start_without_offsets() -> None:
    """As published: V = 0. Others start a quarter inside their code's interval."""
    spec = _spec(symmetric=True)
    weight, start = _start(spec, scaled=False)
    ratios = split(weight, B) / start.scales.unsqueeze(-1)
    rounded = ratios.round().clamp(spec.code_min, spec.code_max) == split(start.codes.float(), B)
    assert 0 < int(rounded.sum()) < rounded.numel()
    learnable = LearnableWeight(weight, start)
    assert not learnable.offsets[rounded].any()
    place = (ratios + learnable.offsets.detach())[~rounded] - split(start.codes.float(), B)[~rounded]
    torch.testing.assert_close(place.abs(), torch.full_like(place, 0.25), rtol=0, atol=1e-5)


@FORMS
def test_what_is_tuned_is_what_is_stored(spec: QuantSpec) -> None:
    """After any steps, the weight that gradients see is to the bit what the stored numbers stand for."""
    weight, start = _start(spec, scaled=True)
    learnable = LearnableWeight(weight, start)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        (learnable.weight() * torch.randn(N, K, generator=generator)).sum().backward()
        learnable.step(0.2)
    found = learnable.quantized()
    assert not torch.equal(found.codes, start.codes)
    assert not torch.equal(found.scales, start.scales)
    assert found.scales.dtype == start.scales.dtype
    assert torch.equal(learnable.weight(), effective_weight(found, weight.device))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero-points"])
def test_gradients_are_those_of_straight_through_rounding(symmetric: bool) -> None:
    """Against the definition in float64, at offsets and factors away from the start; some codes are clamped."""
    spec = _spec(symmetric=symmetric)
    weight, start = _start(spec, scaled=False)
    learnable = LearnableWeight(weight, start)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for leaf in learnable.leaves:
            leaf.add_(0.2 * torch.rand(leaf.shape, generator=generator) - 0.1)
    upstream = torch.randn(N, K, generator=generator)
    learnable.weight().backward(upstream)
    zero_points = None if start.zero_points is None else start.zero_points.double()
    leaves = [leaf.detach().double().requires_grad_() for leaf in learnable.leaves]
    low = None if symmetric else leaves[2]
    expected = reference.weight(
        split(weight.double(), B),
        leaves[0],
        start.scales.double(),
        leaves[1],
        low,
        zero_points,
        spec.code_min,
        spec.code_max,
    )
    expected.backward(split(upstream.double(), B))
    assert (leaves[0].grad == 0).any()
    for found, leaf in zip(learnable.leaves, leaves, strict=True):
        assert found.grad is not None
        # Sums of sixteen terms in float32.
        torch.testing.assert_close(found.grad.double(), leaf.grad, rtol=1e-4, atol=1e-5)


def test_a_step_goes_against_the_gradients_sign() -> None:
    weight, start = _start(_spec(symmetric=True), scaled=False)
    learnable = LearnableWeight(weight, start)
    before = [leaf.detach().clone() for leaf in learnable.leaves]
    learnable.weight().sum().backward()
    signs = [leaf.grad.sign() for leaf in learnable.leaves]
    learnable.step(0.125)
    for leaf, old, sign in zip(learnable.leaves, before, signs, strict=True):
        torch.testing.assert_close(leaf.detach(), old - 0.125 * sign)
        assert leaf.grad is None


def test_factors_stay_in_their_bounds() -> None:
    weight, start = _start(_spec(symmetric=False), scaled=False)
    learnable = LearnableWeight(weight, start)
    for _ in range(4):
        learnable.weight().square().sum().backward()
        learnable.step(1.0)
    assert all(((factor >= 0.25) & (factor <= 1.5)).all() for factor in learnable.leaves[1:])
