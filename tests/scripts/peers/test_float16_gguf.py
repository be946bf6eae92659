"""A checkpoint written as GGUF is what transformers, which llama.cpp's files are read with here, reads back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import load_file

from scripts.peers.llama_cpp.float16_gguf import write_float16_gguf

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_SIZE, VOCABULARY = 2, 32, 64, 4, 2, 8, 50


def write_metadata(file: Path, architecture: str) -> None:
    """Write what a GGUF file says of a model besides its weights, and the tensor that a checkpoint lacks."""
    writer = GGUFWriter(file, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_SIZE)
    writer.add_value_length(HEAD_SIZE)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCABULARY)
    writer.add_token_list([f"t{number}" for number in range(VOCABULARY)])
    writer.add_file_type(15)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def save_random(folder: Path, architecture: str) -> dict[str, torch.Tensor]:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

    sizes = {
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_SIZE,
        "vocab_size": VOCABULARY,
    }
    torch.manual_seed(0)
    is_llama = architecture == "llama"
    model = LlamaForCausalLM(LlamaConfig(**sizes)) if is_llama else Gemma3ForCausalLM(Gemma3TextConfig(**sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_transformers_reads_the_same_weights_back(architecture: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    weights = save_random(tmp_path / "checkpoint", architecture)
    write_metadata(tmp_path / "source.gguf", architecture)
    write_float16_gguf(tmp_path / "source.gguf", tmp_path / "checkpoint", tmp_path / "f16.gguf")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="f16.gguf", dtype=torch.float32).state_dict()
    for name, weight in weights.items():
        assert torch.allclose(read[name], weight, atol=2e-4), name
    found = GGUFReader(tmp_path / "f16.gguf")
    assert {tensor.tensor_type.name for tensor in found.tensors if len(tensor.shape) == 2} == {"F16"}
    assert found.fields["general.file_type"].contents() == 1
    assert found.fields["tokenizer.ggml.tokens"].contents()[7] == "t7"
