"""Codes, scales and zero points come out of a checkpoint as its tool packed them; what can't be taken over is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.errors import UserError
from stages.quantization.checkpoints.checkpoint import layer_number, open_checkpoint
from tests.stages.quantization.checkpoints.packers import SCHEMAS, Rounded, rounded, save_checkpoint

LAYER = "model.layers.0.mlp.up_proj"
OUTPUTS, INPUTS, BLOCK = 16, 64, 32


def a_weight(bits: int = 4, *, symmetric: bool = False, block: int = BLOCK) -> Rounded:
    weight = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0)) + 0.3
    return rounded(weight, block, bits, symmetric=symmetric)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("schema", "bits"),
    [(schema, 8 if schema == "int-quantized" else 4) for schema in SCHEMAS]
    + [("gptq", 8), ("compressed-tensors", 8), ("olive", 8)],
)
def test_every_packing_gives_the_same_numbers(schema: str, bits: int, symmetric: bool, tmp_path: Path) -> None:
    weight = a_weight(bits, symmetric=symmetric)
    checkpoint = open_checkpoint(save_checkpoint(tmp_path, {LAYER: weight}, schema))
    assert checkpoint.modules == (LAYER,)
    found = checkpoint.read(LAYER)
    assert torch.equal(found.packed.codes, weight.codes)
    assert torch.equal(found.packed.scales, weight.scales)
    assert torch.equal(found.packed.zero_points, weight.zeros)
    assert (found.packed.bits, found.block_size, found.packed.is_symmetric) == (bits, BLOCK, symmetric)
    assert torch.equal(found.packed.floats(BLOCK), weight.floats)


def test_a_scale_a_row_and_a_short_last_block_are_read(tmp_path: Path) -> None:
    (tmp_path / "row").mkdir()
    row = save_checkpoint(tmp_path / "row", {LAYER: a_weight(block=INPUTS)}, "gptq", group_size=-1)
    assert open_checkpoint(row).read(LAYER).block_size == INPUTS
    short = a_weight(block=48)
    found = open_checkpoint(save_checkpoint(tmp_path / "short", {LAYER: short}, "olive")).read(LAYER)
    assert torch.equal(found.packed.floats(found.block_size), short.floats)


def test_settings_of_older_tools_lie_beside_the_model(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {LAYER: a_weight()}, "gptq")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": False}))
    assert torch.equal(open_checkpoint(tmp_path).read(LAYER).packed.codes, a_weight().codes)


def test_an_order_that_was_set_is_refused_and_one_that_says_nothing_is_not(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {LAYER: a_weight()}, "gptq", desc_act=True)
    assert open_checkpoint(tmp_path).read(LAYER).block_size == BLOCK
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{LAYER}.g_idx"] = tensors[f"{LAYER}.g_idx"].flip(0)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"'model.layers.0.mlp.up_proj' has its inputs in another order"):
        open_checkpoint(tmp_path).read(LAYER)


def test_zero_points_between_codes_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {LAYER: a_weight()}, "gptq")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{LAYER}.qzeros"] = tensors[f"{LAYER}.qzeros"].half()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="zero points between the codes"):
        open_checkpoint(tmp_path).read(LAYER)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"quant_method": "hqq"}, "quantized by 'hqq'"),
        ({"quant_method": "awq", "version": "gemv"}, "AWQ's kernel gemv"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "format 'float-quantized'"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "transform_config": {"config_groups": {"R3": {"apply": [{"location": "q_attn"}]}}},
            },
            "rotates activations",
        ),
    ],
)
def test_other_methods_are_refused(settings: dict[str, object], fault: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=fault):
        open_checkpoint(save_checkpoint(tmp_path, {LAYER: a_weight()}, "gptq", **settings))


@pytest.mark.parametrize("bits", [2, 3])
def test_other_widths_are_refused(bits: int, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {LAYER: a_weight()}, "gptq")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{LAYER}.qzeros"] = torch.zeros(2, OUTPUTS * bits // 32 + (bits == 3), dtype=torch.int32)
    tensors[f"{LAYER}.scales"] = torch.ones(2, OUTPUTS if bits == 2 else 21, dtype=torch.float16)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"{bits}\.?\d* bits for each weight; quantize it with 4 or 8"):
        open_checkpoint(tmp_path).read(LAYER)


def test_a_folder_without_quantized_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="says nothing about quantization"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UserError, match=r"has no \*.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_text("cut short")
    with pytest.raises(UserError, match=r"model.safetensors can't be read"):
        open_checkpoint(tmp_path)


def test_another_checkpoint_has_another_fingerprint(tmp_path: Path) -> None:
    first = open_checkpoint(save_checkpoint(tmp_path / "a", {LAYER: a_weight()}, "gptq"))
    again = open_checkpoint(save_checkpoint(tmp_path / "b", {LAYER: a_weight()}, "gptq"))
    other = open_checkpoint(save_checkpoint(tmp_path / "c", {LAYER: a_weight(symmetric=True)}, "gptq"))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


def test_the_first_number_of_a_name_is_the_layer() -> None:
    assert layer_number("model.layers.3.mlp.experts.5.up_proj") == 3
    assert layer_number("lm_head") is None
