"""Check that greedy continuation with caches equals computing everything again, and transformers' own."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
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


def test_a_token_outside_the_vocabulary_is_one_sentence(tiny_model: Path) -> None:
    with (
        open_decoder(locate_model(tiny_model), SETTINGS, None) as decoder,
        pytest.raises(UserError, match=r"can't run .*model\.onnx .*try another of --eps"),
    ):
        decoder.logits(np.array([[100_000]]))
