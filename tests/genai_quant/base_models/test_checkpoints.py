"""Gemma 3's configuration, however it is spelled, reaches onnxruntime-genai's builder in words that it reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from genai_quant.base_models.build import build
from genai_quant.base_models.checkpoints import as_builder_input
from genai_quant.base_models.options import BaseModelConfig
from stages.errors import UserError
from stages.model.directory import locate_model
from stages.runtime.feeds import CausalFeeds
from stages.runtime.session import SessionSettings, open_session

# Beyond the window of 16, so that the sliding layer's mask and both rotations count.
TOKENS = np.arange(40).reshape(1, 40) * 7 % 300
GLOBAL, LOCAL = 1_000_000.0, 10_000.0
FLAT = {"rope_theta": GLOBAL, "rope_local_base_freq": LOCAL, "rope_scaling": None}
LAYERED = {
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": GLOBAL},
        "sliding_attention": {"rope_type": "default", "rope_theta": LOCAL},
    }
}


@pytest.fixture
def gemma3(tmp_path: Path, tiny_tokenizer: Path) -> Path:
    """Write the Hugging Face folder of a random two-layer Gemma 3, as transformers 5 writes it."""
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=256,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    folder = tmp_path / "hf"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_tokenizer).save_pretrained(folder)
    return folder


def respell(folder: Path, rope: dict[str, object]) -> None:
    """Give config.json these rotation parameters and no others."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: value for name, value in config.items() if name not in (*FLAT, *LAYERED)}
    path.write_text(json.dumps(kept | rope), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    "rope",
    [
        pytest.param(LAYERED, id="transformers 5"),
        pytest.param(FLAT, id="transformers 4", marks=pytest.mark.thorough),
    ],
)
def test_the_built_model_computes_what_transformers_does(rope: dict[str, object], gemma3: Path, tmp_path: Path) -> None:
    respell(gemma3, rope)
    written = (gemma3 / "config.json").read_bytes()
    list(build(BaseModelConfig(source=str(gemma3), output=tmp_path / "onnx")))
    assert (gemma3 / "config.json").read_bytes() == written
    model = transformers.AutoModelForCausalLM.from_pretrained(gemma3, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(TOKENS)).logits.numpy()
    directory = locate_model(tmp_path / "onnx")
    session = open_session(directory.onnx_file, SessionSettings())
    feeds = CausalFeeds.of(session, directory)
    found = session.run(["logits"], feeds(TOKENS))[0]
    # Float32 sums in another order; the two bases exchanged give 1e-2 and more.
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def test_a_configuration_that_needs_nothing_is_left_where_it_is(tiny_hf: Path, gemma3: Path, tmp_path: Path) -> None:
    assert as_builder_input(tiny_hf, tmp_path / "scratch") == tiny_hf
    respelled = as_builder_input(gemma3, tmp_path / "scratch")
    assert respelled == tmp_path / "scratch"
    assert as_builder_input(respelled, tmp_path / "again") == respelled


def test_a_rotation_that_the_builder_would_get_wrong_is_refused(gemma3: Path, tmp_path: Path) -> None:
    respell(gemma3, FLAT | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    with pytest.raises(UserError, match="rotations of type 'linear' only in its full attention"):
        as_builder_input(gemma3, tmp_path / "scratch")
