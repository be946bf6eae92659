from __future__ import annotations

import numpy as np
import pytest

from tests.stages.quantization.blocks.one_node import OneNode, assert_same

BATCH, LENGTH, HEADS, SIZE = 2, 9, 4, 6


def _node(attributes: dict, **others: np.ndarray) -> OneNode:
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((BATCH, LENGTH, HEADS * SIZE)).astype(np.float32) for _ in range(3))
    return OneNode(
        operator="MultiHeadAttention",
        inputs={
            "query": query,
            "key": key,
            "value": value,
            "bias": others.get("bias"),
            "key_padding_mask": others.get("mask"),
            "attention_bias": others.get("attention_bias"),
        },
        attributes={"num_heads": HEADS, **attributes},
    )


@pytest.mark.parametrize("attributes", [{}, {"scale": 0.3}, {"unidirectional": 1}], ids=str)
def test_agrees_with_onnxruntime(attributes: dict) -> None:
    assert_same(_node(attributes))


@pytest.mark.parametrize("shape", [(BATCH, 1), (1, HEADS)], ids=str)
def test_an_additive_mask_that_a_graph_computes(shape: tuple[int, int]) -> None:
    """Causal masks reach this operator as numbers that are added to the scores."""
    bias = np.random.default_rng(1).standard_normal((*shape, LENGTH, LENGTH)).astype(np.float32)
    bias += np.triu(np.full((LENGTH, LENGTH), -1e4, np.float32), 1)
    assert_same(_node({}, attention_bias=bias))


def test_the_bias_of_the_input_projection() -> None:
    assert_same(_node({}, bias=np.random.default_rng(2).standard_normal(3 * HEADS * SIZE).astype(np.float32)))


def test_a_padding_mask_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="input 4, 'key_padding_mask'"):
        _node({}, mask=np.full((BATCH,), LENGTH, np.int32)).run_torch()
