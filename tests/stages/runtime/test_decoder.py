"""Check that greedy continuation with caches equals computing everything again, and transformers' own."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers

from stages.errors import UserError
from stages.model.directory import locate_model
from stages.runtime.decoder import open_decoder
from stages.runtime.session import SessionSettings

SETTINGS = SessionSettings(accuracy_level=1)
TOKENS = [0, 71, 33, 250, 18]


@pytest.fixture(params=["tiny_model", "tiny_model_dml", pytest.param("tiny_model_bf16", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest) -> Path:
    """Return fp32 with packed qkv; fp16 with position_ids; bf16, which the CPU runs as a float32 copy."""
    found: Path = request.getfixturevalue(request.param)
    return found


def test_caches_change_nothing(folder: Path) -> None:
    directory = locate_model(folder)
    with open_decoder(directory, SETTINGS, None) as decoder:
        stepwise = list(islice(decoder.continuation(TOKENS), 12))
        sliding = replace(decoder, directory=replace(directory, windowed_caches={"past": 8}))
        again = list(islice(sliding.continuation(TOKENS), 12))
    assert stepwise == again
    assert len(set(stepwise)) > 1


def test_continuation_is_that_of_transformers(tiny_model: Path, tiny_hf: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_hf)
    expected = model.generate(torch.tensor([TOKENS]), max_new_tokens=10, do_sample=False, eos_token_id=None)
    with open_decoder(locate_model(tiny_model), SETTINGS, None) as decoder:
        found = list(islice(decoder.continuation(TOKENS), 10))
        logits = decoder.logits(np.array([TOKENS, TOKENS[::-1]]))
    assert found == expected[0, len(TOKENS) :].tolist()
    with torch.no_grad():
        wanted = model(torch.tensor([TOKENS, TOKENS[::-1]])).logits.numpy()
    # Two float32 implementations of a two-layer model.
    np.testing.assert_allclose(logits, wanted, atol=1e-4)


@pytest.mark.parametrize("past", ["past_sequence_length", 16])
def test_a_graph_of_fixed_shape_gives_what_an_open_one_does(tiny_model: Path, tmp_path: Path, past: str | int) -> None:
    """Windows of two times eight tokens; a key/value cache that is a buffer of sixteen."""
    folder = shutil.copytree(tiny_model, tmp_path / "fixed")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        dims[0].dim_value = 2
        if value.name == "input_ids":
            dims[1].dim_value = 8
        elif isinstance(past, int) and "past" in value.name:
            dims[2].dim_value = past
    onnx.save(model, folder / "model.onnx")
    tokens = np.array([TOKENS, TOKENS[::-1], TOKENS[:1] * 5])
    with open_decoder(locate_model(tiny_model), SETTINGS, None) as opened:
        expected, following = opened.logits(tokens), list(islice(opened.continuation(TOKENS), 3))
    with open_decoder(locate_model(folder), SETTINGS, None) as decoder:
        # Sums in another order.
        np.testing.assert_allclose(decoder.logits(tokens), expected, atol=1e-5)
        assert list(islice(decoder.continuation(TOKENS), 3)) == following
        with pytest.raises(UserError, match="windows of 8 tokens, not 9; pass --seq_len 8"):
            decoder.logits(np.ones((1, 9), np.int64))


def test_logits_of_the_last_token_only_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "last")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1]), "last"))
    head = next(node for node in model.graph.node if "lm_head" in node.name)
    gather = onnx.helper.make_node("Gather", [head.input[0], "last"], ["last row"], axis=1)
    head.input[0] = "last row"
    nodes = list(model.graph.node)
    nodes.insert(nodes.index(head), gather)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, folder / "model.onnx")
    with (
        open_decoder(locate_model(folder), SETTINGS, None) as decoder,
        pytest.raises(UserError, match=r"logits \[1, 1, 300\] of 1 x 5 tokens, not those of each"),
    ):
        decoder.logits(np.array([TOKENS]))


def test_a_token_outside_the_vocabulary_is_one_sentence(tiny_model: Path) -> None:
    with (
        open_decoder(locate_model(tiny_model), SETTINGS, None) as decoder,
        pytest.raises(UserError, match=r"can't run .*model\.onnx .*try another of --eps"),
    ):
        decoder.logits(np.array([[100_000]]))
