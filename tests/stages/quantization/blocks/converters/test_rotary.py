from __future__ import annotations

import numpy as np
import pytest

from tests.stages.quantization.blocks.one_node import OneNode, assert_same

BATCH, LENGTH, HEADS, SIZE = 2, 7, 3, 8


def _node(shape: tuple[int, ...], positions: np.ndarray, half: int, attributes: dict) -> OneNode:
    rng = np.random.default_rng(0)
    angles = rng.uniform(0, 6, (32, half)).astype(np.float32)
    return OneNode(
        operator="RotaryEmbedding",
        inputs={
            "input": rng.standard_normal(shape).astype(np.float32),
            "position_ids": positions,
            "cos_cache": np.cos(angles),
            "sin_cache": np.sin(angles),
        },
        attributes=attributes,
    )


_EACH = np.stack([np.arange(LENGTH), np.arange(LENGTH)[::-1] + 3]).astype(np.int64)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("shape", [(BATCH, LENGTH, HEADS * SIZE), (BATCH, HEADS, LENGTH, SIZE)], ids=str)
def test_agrees_with_onnxruntime(shape: tuple[int, ...], interleaved: int) -> None:
    assert_same(_node(shape, _EACH, SIZE // 2, {"interleaved": interleaved}))


def test_one_position_is_where_the_window_begins() -> None:
    assert_same(_node((BATCH, LENGTH, HEADS * SIZE), np.array([5], np.int64), SIZE // 2, {}))


def test_partial_rotation() -> None:
    attributes = {"num_heads": HEADS, "rotary_embedding_dim": SIZE // 2}
    assert_same(_node((BATCH, LENGTH, HEADS * SIZE), _EACH, SIZE // 4, attributes))
