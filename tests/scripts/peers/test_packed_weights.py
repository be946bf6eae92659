"""Codes, scales and zero points come out of a checkpoint as its tool packed them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from scripts.peers.checkpoints.packed_weights import PackedWeight, open_checkpoint
from stages.errors import UserError

OUTPUTS, INPUTS, BLOCK = 16, 80, 32
"""The last block is half empty."""
LAYER = "model.layers.0.mlp.up_proj"


def random_weight(*, symmetric: bool) -> PackedWeight:
    generator = torch.Generator().manual_seed(0)
    blocks = -(-INPUTS // BLOCK)
    zeros = torch.randint(0, 16, (OUTPUTS, blocks), generator=generator, dtype=torch.uint8)
    return PackedWeight(
        codes=torch.randint(0, 16, (OUTPUTS, INPUTS), generator=generator, dtype=torch.uint8),
        scales=torch.rand((OUTPUTS, blocks), generator=generator),
        zero_points=torch.full_like(zeros, 8) if symmetric else zeros,
    )


def into_words(codes: Tensor) -> Tensor:
    """Eight codes of a row in each int32, the first in the lowest bits."""
    rows, columns = codes.shape
    words = torch.zeros((rows, columns // 8), dtype=torch.int64)
    for place in range(8):
        words |= codes[:, place::8].long() << (4 * place)
    return words.to(torch.int32)


def into_bytes(codes: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return padded[:, 0::2] | (padded[:, 1::2] << 4)


def as_gptq(weight: PackedWeight, offset: int) -> dict[str, Tensor]:
    return {
        f"{LAYER}.qweight": into_words(weight.codes).T.contiguous(),
        f"{LAYER}.qzeros": into_words((weight.zero_points.T - offset) & 15),
        f"{LAYER}.scales": weight.scales.T.contiguous(),
        f"{LAYER}.g_idx": (torch.arange(INPUTS) // BLOCK).to(torch.int32),
    }


def as_olive(weight: PackedWeight) -> dict[str, Tensor]:
    zeros = {} if weight.is_symmetric else {f"{LAYER}.qzeros": into_bytes(weight.zero_points)}
    return {f"{LAYER}.qweight": into_bytes(weight.codes), f"{LAYER}.scales": weight.scales, **zeros}


def save(folder: Path, tensors: dict[str, Tensor], **settings: object) -> Path:
    config = {"quantization_config": {"bits": 4, "group_size": BLOCK, **settings}}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2", "olive"])
def test_every_packing_gives_the_same_numbers(form: str, symmetric: bool, tmp_path: Path) -> None:
    weight = random_weight(symmetric=symmetric)
    tensors = as_olive(weight) if form == "olive" else as_gptq(weight, offset=1 if form == "gptq" else 0)
    save(tmp_path, tensors, quant_method=form.removesuffix("_v2"), checkpoint_format=form)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.holds(LAYER)
    assert not checkpoint.holds("lm_head")
    found = checkpoint.read(LAYER)
    assert torch.equal(found.codes, weight.codes)
    assert torch.equal(found.scales, weight.scales)
    assert torch.equal(found.zero_points, weight.zero_points)
    assert found.is_symmetric == symmetric


def test_reordered_inputs_are_refused(tmp_path: Path) -> None:
    tensors = as_gptq(random_weight(symmetric=True), offset=1)
    tensors[f"{LAYER}.g_idx"] = tensors[f"{LAYER}.g_idx"].flip(0)
    with pytest.raises(UserError, match="another order"):
        open_checkpoint(save(tmp_path, tensors, quant_method="gptq")).read(LAYER)


def test_blocks_of_another_size_are_refused(tmp_path: Path) -> None:
    tensors = as_olive(random_weight(symmetric=True))
    checkpoint = open_checkpoint(save(tmp_path, tensors, quant_method="olive", group_size=16))
    with pytest.raises(UserError, match="blocks of 16"):
        checkpoint.read(LAYER)


@pytest.mark.parametrize("settings", [{"quant_method": "awq"}, {"quant_method": "gptq", "bits": 3}])
def test_other_checkpoints_are_refused(settings: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no INT4 weights of GPTQ's or Olive's form"):
        open_checkpoint(save(tmp_path, {}, **settings))
