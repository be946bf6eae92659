"""Affine quantization against the float64 reference and the replaced tool; blocks are cut and joined exactly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from stages.quantization.search.affine import (
    choose_parameters,
    diagonal_blocks,
    join,
    quantize,
    round_to_storage,
    round_trip,
    spec_for,
    split,
)
from stages.records.formats import PerBlock, QuantSpec
from tests.reference.rounding import compat7_codes
from tests.reference.rounding import round_trip as reference_round_trip
from tests.stages.quantization.search.problems import spec
from tests.support.pairwise import pairwise

NUMPY = {"float32": np.float32, "float16": np.float16}


@pytest.mark.parametrize(
    ("scale_type", "bits", "rule", "symmetric", "in_features"),
    pairwise(["float32", "float16"], [4, 8], ["signed", "full", "compat7"], [True, False], [64, 72]),
)
def test_round_trip_matches_the_reference(
    scale_type: str, bits: int, rule: str, symmetric: bool, in_features: int
) -> None:
    weight = torch.randn(11, in_features, generator=torch.Generator().manual_seed(bits)) * 0.05
    weight[3] = weight[3].abs()  # blocks of one sign
    weight[4] = -weight[4].abs()
    weight[5] = 0
    ratios = torch.linspace(0.5, 1, 11 * -(-in_features // 32)).reshape(11, -1)
    number = QuantSpec(bits=bits, symmetric=symmetric, granularity=PerBlock(block_size=32), scale_dtype=scale_type)
    blocks = split(weight, 32)
    ours = join(round_trip(blocks, choose_parameters(blocks, number, rule, ratios), number), in_features)
    reference = reference_round_trip(
        weight.numpy(), 32, bits, symmetric=symmetric, rule=rule, ratios=ratios.numpy(), scale_type=NUMPY[scale_type]
    )
    # float32 against float64: one code may fall on the other side of a tie; nothing else may differ.
    step = np.abs(reference).max() / 2**bits
    differs = np.abs(ours.numpy() - reference) > 1e-5 * np.abs(weight.numpy()).max()
    assert differs.mean() < 0.002
    assert np.abs(ours.numpy() - reference).max() < 3 * step


def test_codes_of_a_hand_made_block_with_ties_to_even() -> None:
    block = torch.tensor([[[7.0, -8.0, 3.5, 2.5, 0.5, -0.5, 1.5, 0.0]]])
    parameters = choose_parameters(block, spec(block_size=8))
    assert parameters.scales.item() == 1.0
    assert quantize(block, parameters, spec(block_size=8)).flatten().tolist() == [7, -8, 4, 2, 0, 0, 2, 0]


def test_all_zero_block_has_scale_one_and_zero_codes() -> None:
    blocks = torch.zeros(2, 1, 16)
    for symmetric in (True, False):
        parameters = choose_parameters(blocks, spec(symmetric=symmetric))
        assert torch.equal(parameters.scales, torch.ones(2, 1))
        assert torch.equal(round_trip(blocks, parameters, spec(symmetric=symmetric)), blocks)


def test_an_all_zero_block_takes_the_smallest_scale_of_its_row() -> None:
    blocks = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(0)) * 0.01
    blocks[0, 2] = blocks[1, 0] = blocks[1, 5] = 0
    for symmetric in (True, False):
        number = spec(symmetric=symmetric)
        scales = choose_parameters(blocks, number).scales
        whole = scales.where(blocks.abs().amax(dim=-1) > 0, torch.inf)
        assert torch.equal(scales, whole.minimum(whole.amin(dim=1, keepdim=True).where(whole == torch.inf, whole)))
        assert torch.equal(round_trip(blocks, choose_parameters(blocks, number), number)[0, 2], torch.zeros(16))


def test_storage_keeps_scales_normal() -> None:
    tiny = round_to_storage(torch.tensor([1e-9, 1e9]), "float16")
    assert tiny.tolist() == [2.0**-14, 65504.0]


@pytest.mark.parametrize(("size", "kept"), [(1.0, True), (1e-2, True), (1e-4, False), (1e6, False)])
def test_a_weight_without_room_in_narrow_scales_has_wide_ones(size: float, kept: bool) -> None:
    weight = size * torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    weight[0] = 1e-9  # a block without numbers that count decides nothing
    narrow = replace(spec(), scale_dtype="float16")
    assert spec_for(weight, narrow, "float32") == (narrow if kept else spec())
    assert spec_for(weight, narrow, "float16") == narrow


@pytest.mark.parametrize("scale_type", ["float32", "float16", "bfloat16"])
def test_storage_keeps_signs(scale_type: str) -> None:
    scales = torch.tensor([-1e-39, -0.5, -3e38, 1e-39, 0.5, 3e38])
    stored = round_to_storage(scales, scale_type)
    assert torch.equal(stored.sign(), scales.sign())
    assert torch.equal(stored[:3], -stored[3:])
    assert stored.abs().min() >= torch.finfo(getattr(torch, scale_type)).tiny


def test_a_signed_block_that_reaches_up_has_the_codes_of_its_mirror_image() -> None:
    block = torch.tensor([[[8.0, -7.0, 3.0, 0.0]]])
    parameters, mirrored = (choose_parameters(each, spec(block_size=4), "signed") for each in (block, -block))
    assert (parameters.scales.item(), mirrored.scales.item()) == (-1.0, 1.0)
    assert quantize(block, parameters, spec(block_size=4)).flatten().tolist() == [-8, 7, -3, 0]
    assert torch.equal(round_trip(block, parameters, spec(block_size=4)), block)


def test_full_range_uses_all_levels_where_compat7_wastes_one() -> None:
    blocks = torch.randn(2000, 1, 32, generator=torch.Generator().manual_seed(0))
    errors = {
        rule: (round_trip(blocks, choose_parameters(blocks, spec(), rule), spec()) - blocks).square().mean().item()
        for rule in ("signed", "full", "compat7")
    }
    # Both halves then have their level more; ALGORITHMS.md section 3.2 says 0.785.
    assert 0.75 < errors["signed"] / errors["compat7"] < 0.82
    # Positive full range helps the half of the blocks whose extreme is negative; measured about 0.9.
    assert errors["full"] < 0.93 * errors["compat7"]


@pytest.mark.parametrize("scale_type", ["float32", "float16"])
def test_compat7_is_the_replaced_tools_rounding(scale_type: str) -> None:
    theirs = (np.random.default_rng(0).standard_normal((96, 400)) / 20).astype(NUMPY[scale_type])  # [K, N]
    number = QuantSpec(bits=4, symmetric=True, granularity=PerBlock(block_size=32), scale_dtype=scale_type)
    blocks = split(torch.from_numpy(theirs.T.astype(np.float32)), 32)
    parameters = choose_parameters(blocks, number, "compat7")
    codes, scales = compat7_codes(theirs, 32)
    assert scales.dtype == theirs.dtype
    np.testing.assert_array_equal(parameters.scales.numpy().T, scales)
    ours = join(quantize(blocks, parameters, number), 96).numpy().T
    differs = ours != codes
    # A float16 quotient has 11 bits: it can be rounded onto a tie, and then to the wrong side. Ours never is.
    assert differs.mean() < (0.005 if scale_type == "float16" else 1e-12)
    quotient = theirs.astype(np.float64) / np.repeat(scales, 32, axis=0).astype(np.float64)
    assert (np.abs(ours - quotient)[differs] <= np.abs(codes - quotient)[differs]).all()


@pytest.mark.parametrize(("in_features", "block_size"), [(64, 16), (80, 32), (5, 16), (16, 16)])
def test_join_is_the_exact_inverse_of_split(in_features: int, block_size: int) -> None:
    weight = torch.randn(3, 7, in_features)
    blocks = split(weight, block_size)
    assert blocks.shape == (3, 7, -(-in_features // block_size), block_size)
    assert torch.equal(join(blocks, in_features), weight)


def test_blocks_are_contiguous_along_the_inputs() -> None:
    # The competitor groups channels strided by K / B: channel 0's block must hold channels 0 to 3.
    weight = torch.arange(8.0).repeat(3, 1)
    assert torch.equal(split(weight, 4)[0], torch.tensor([[0.0, 1, 2, 3], [4, 5, 6, 7]]))


@pytest.mark.parametrize("in_features", [12, 10])
def test_diagonal_blocks_are_the_gram_matrix_of_each_block(in_features: int) -> None:
    tokens = torch.randn(30, in_features, dtype=torch.float64)
    blocks = diagonal_blocks(tokens.T @ tokens, 4)
    for index in range(3):
        part = torch.zeros(30, 4, dtype=torch.float64)
        channels = tokens[:, 4 * index : 4 * index + 4]
        part[:, : channels.shape[1]] = channels
        assert torch.equal(blocks[index], part.T @ part) or torch.allclose(blocks[index], part.T @ part, rtol=1e-12)
