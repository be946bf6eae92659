"""A tiny model goes the whole way; what stops it is part of the result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from scripts.architectures.cell import Work, take_the_whole_way
from scripts.architectures.configs import ARCHITECTURES, Architecture, qwen3_5
from scripts.architectures.random_models import save_architecture

BY_NAME = {one.name: one for one in ARCHITECTURES}


def work(architecture: Architecture, build: str, folder: Path, text: Path, tokenizer: Path) -> Work:
    save_architecture(architecture, folder / "hf", tokenizer)
    return Work(architecture=architecture, build=build, source=folder / "hf", text=text, folder=folder / "models")


@pytest.mark.slow
def test_linear_attention_and_positions_of_three_axes(tmp_path: Path, tiny_text: Path, tiny_tokenizer: Path) -> None:
    whole = BY_NAME["Qwen3_5ForConditionalGeneration"]
    small = replace(whole, config=lambda: qwen3_5(("linear_attention", "full_attention")))
    cell = take_the_whole_way(work(small, "cpu", tmp_path, tiny_text, tiny_tokenizer))
    assert (cell.stopped_at, cell.reason, cell.unweighted) == (None, "", "")
    assert cell.fused == cell.sites
    assert cell.sites == 14
    assert cell.base_generates
    # Random weights of four layers, in INT4 but for the head; codes in a wrong place give whole nats.
    assert cell.divergence is not None
    assert 0.001 < cell.divergence < 0.3


def test_what_the_builder_raises_is_the_result(tmp_path: Path, tiny_text: Path, tiny_tokenizer: Path) -> None:
    cell = take_the_whole_way(work(BY_NAME["PhiMoEForCausalLM"], "cpu", tmp_path, tiny_text, tiny_tokenizer))
    assert cell.stopped_at == "build"
    assert cell.reason.startswith("NotImplementedError: The longrope RoPE style")
    assert not (tmp_path / "models" / "int4").exists()
