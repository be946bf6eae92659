"""A checkpoint's weights stand in the graph as they are, packed qkv too; those of another model are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from scripts.peers.checkpoints.graph import write_graph
from stages.commands.quantize_options import QuantizeConfig
from stages.errors import UserError
from stages.model.directory import locate_model
from stages.runtime.decoder import open_decoder
from stages.runtime.session import SessionSettings

BLOCK = 32


def quantized(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Olive's form of a weight in blocks of 32 with zero points, and what it stands for."""
    blocks = weight.unflatten(1, (-1, BLOCK))
    scales = (blocks.amax(-1) - blocks.amin(-1)) / 15
    zeros = (-blocks.amin(-1) / scales).round()
    codes = (blocks / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
    packed = {
        "qweight": into_bytes(codes.flatten(1)),
        "qzeros": into_bytes(torch.nn.functional.pad(zeros, (0, zeros.shape[1] % 2))),
        "scales": scales,
    }
    return packed, ((codes - zeros[..., None]) * scales[..., None]).flatten(1)


def into_bytes(codes: Tensor) -> Tensor:
    whole = codes.to(torch.uint8)
    return whole[:, 0::2] | (whole[:, 1::2] << 4)


def save_checkpoint(folder: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Quantize the decoder's layers of ``weights`` into ``folder``; return all weights as they then are."""
    tensors: dict[str, Tensor] = {}
    read = dict(weights)
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            packed, read[name] = quantized(weight)
            tensors |= {name.replace("weight", part): tensor for part, tensor in packed.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    settings = {"quant_method": "olive", "bits": 4, "group_size": BLOCK, "symmetric": False}
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    return read


def config_of(base: Path, output: Path) -> QuantizeConfig:
    return QuantizeConfig(
        onnx_path=base,
        output_path=output,
        algo="rtn_dq",
        target="any",
        lm_head="none",
        block_size=BLOCK,
        accuracy_level=1,
        verify="off",
        overwrite=True,
    )


def test_the_graph_computes_with_the_checkpoints_weights(tiny_hf: Path, tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    weights = save_checkpoint(tmp_path / "checkpoint", load_file(tiny_hf / "model.safetensors"))
    write_graph(tmp_path / "checkpoint", config_of(tiny_model, tmp_path / "out"), title="a test")
    expected = AutoModelForCausalLM.from_pretrained(tiny_hf)
    expected.load_state_dict(weights)
    tokens = torch.arange(3, 40)[None]
    settings = SessionSettings(accuracy_level=1)
    with torch.no_grad(), open_decoder(locate_model(tmp_path / "out"), settings, tmp_path) as decoder:
        logits = torch.from_numpy(decoder.logits(tokens.numpy()))
        assert torch.allclose(logits, expected(tokens).logits, atol=1e-3)


def test_weights_of_another_model_are_refused(tiny_hf: Path, tiny_model: Path, tmp_path: Path) -> None:
    weights = load_file(tiny_hf / "model.safetensors")
    queries = "model.layers.1.self_attn.q_proj.weight"
    save_checkpoint(tmp_path / "checkpoint", {**weights, queries: weights[queries].flip(0)})
    with pytest.raises(UserError, match=r"other weights than --base \(/model/layers\.1/attn/qkv_proj/MatMul is off"):
        write_graph(tmp_path / "checkpoint", config_of(tiny_model, tmp_path / "out"), title="a test")
    assert not (tmp_path / "out").exists()
