"""Windows that pass all blocks come out as ONNX Runtime computes them from the tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from stages.runtime.blocks.cut import cut_block
from stages.runtime.blocks.module import BlockModule
from stages.runtime.blocks.stream import BlockRunner, read_inputs
from tests.stages.runtime.blocks.blocks import CPU, OpenModel, open_model
from tests.support.tiny_models import VOCABULARY

_TOKENS = np.random.default_rng(0).integers(2, VOCABULARY, (5, 24))


def _error_behind_all_blocks(opened: OpenModel) -> float:
    """Return the error of the stream behind the last block, from the tokens on, relative to its largest value."""
    cuts = [cut_block(opened.model, block) for block in opened.blocks]
    shared = tuple(dict.fromkeys(name for cut in cuts for name in cut.shared))
    first, last = opened.blocks[0].stream_in, opened.blocks[-1].stream_out
    # Batches of two windows leave one over.
    inputs = read_inputs(opened.model, opened.directory, _TOKENS, first, shared, frozenset({2, 1}))
    stream = inputs.stream
    for block, cut in zip(opened.blocks, cuts, strict=True):
        run = BlockRunner(module=BlockModule(cut, CPU), shared=inputs.shared, batch_size=2)
        stream = run.over(stream, opened.weights(block))
    expected = opened.tap((last,), _TOKENS)[last]
    return float((stream - expected).abs().max() / expected.abs().max())


def test_windows_pass_all_blocks(tiny_model: Path) -> None:
    """Float32's rounding through two layers."""
    assert _error_behind_all_blocks(open_model(tiny_model)) < 1e-5


def test_float16_graphs_with_positions_flow_in_float32(tiny_model_dml: Path) -> None:
    """ONNX Runtime rounds every value to float16, 5e-4 each."""
    opened = open_model(tiny_model_dml)
    assert _error_behind_all_blocks(opened) < 5e-3
    inputs = read_inputs(
        opened.model, opened.directory, _TOKENS, opened.blocks[0].stream_in, ("position_ids",), frozenset({3})
    )
    assert inputs.stream.dtype == torch.float32
    assert torch.equal(inputs.shared[3]["position_ids"], torch.arange(24).repeat(3, 1))
