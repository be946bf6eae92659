"""GroupQueryAttention against ONNX Runtime's CPU kernel, for every form that onnxruntime-genai's builder writes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.quantization.blocks.converters.attention import LEFT_OUT, GroupQueryAttention, GroupQueryRule
from tests.stages.quantization.blocks.one_node import OneNode, assert_same

BATCH, LENGTH, HEADS, KV_HEADS, SIZE = 2, 11, 6, 2, 32
_CUT = frozenset({"past_key", "past_value", "seqlens_k", "total_sequence_length"})


def _node(rng: np.random.Generator, attributes: dict, *, packed: bool, **others: np.ndarray) -> OneNode:
    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    widths = HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE
    past = np.zeros((BATCH, KV_HEADS, 0, SIZE), np.float32)
    angles = rng.uniform(0, 6, (32, SIZE // 2)).astype(np.float32)
    rotary = attributes.get("do_rotary", 0)
    return OneNode(
        operator="GroupQueryAttention",
        inputs={
            "query": random(BATCH, LENGTH, sum(widths) if packed else widths[0]),
            "key": None if packed else random(BATCH, LENGTH, widths[1]),
            "value": None if packed else random(BATCH, LENGTH, widths[2]),
            "past_key": past,
            "past_value": past.copy(),
            "seqlens_k": np.full((BATCH,), LENGTH - 1, np.int32),
            "total_sequence_length": np.array([LENGTH], np.int32),
            "cos_cache": others.get("cos", np.cos(angles)) if rotary else None,
            "sin_cache": others.get("sin", np.sin(angles)) if rotary else None,
            "position_ids": None,
            "attention_bias": others.get("bias"),
            "head_sink": others.get("sink"),
        },
        attributes={"num_heads": HEADS, "kv_num_heads": KV_HEADS, **attributes},
        further=("present_key", "present_value"),
    )


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "apart"])
@pytest.mark.parametrize(
    "attributes",
    [
        {"do_rotary": 0},
        {"do_rotary": 1},
        {"do_rotary": 1, "rotary_interleaved": 1},
        {"do_rotary": 1, "scale": 0.7},
        {"do_rotary": 1, "local_window_size": 4},
        {"do_rotary": 1, "local_window_size": 20},
        {"do_rotary": 0, "softcap": 2.0},
        {"do_rotary": 1, "softcap": 1.5, "local_window_size": 3},
        {"do_rotary": 0, "smooth_softmax": 1},
    ],
    ids=str,
)
def test_agrees_with_onnxruntime(attributes: dict, packed: bool) -> None:
    assert_same(_node(np.random.default_rng(0), attributes, packed=packed), _CUT)


def test_partial_rotation_leaves_the_other_channels() -> None:
    angles = np.random.default_rng(1).uniform(0, 6, (32, SIZE // 4)).astype(np.float32)
    node = _node(np.random.default_rng(0), {"do_rotary": 1}, packed=True, cos=np.cos(angles), sin=np.sin(angles))
    assert_same(node, _CUT)


def test_bias_and_sinks() -> None:
    rng = np.random.default_rng(2)
    bias = rng.standard_normal((1, HEADS, LENGTH, LENGTH)).astype(np.float32)
    assert_same(_node(rng, {"do_rotary": 1}, packed=True, bias=bias), _CUT)
    assert_same(_node(rng, {"do_rotary": 1}, packed=True, sink=np.linspace(-2, 3, HEADS).astype(np.float32)), _CUT)


def test_norms_of_query_and_key_come_before_the_rotation() -> None:
    """ONNX Runtime's CPU kernel refuses them, so the oracle is the same node behind norms made by hand."""
    rng = np.random.default_rng(3)
    query, key, value = (torch.from_numpy(rng.standard_normal((1, 5, n * SIZE)).astype(np.float32)) for n in (4, 2, 2))
    gains = [torch.from_numpy(rng.uniform(0.5, 2, SIZE).astype(np.float32)) for _ in range(2)]
    angles = torch.from_numpy(rng.uniform(0, 6, (5, SIZE // 2)).astype(np.float32))
    module = GroupQueryAttention(GroupQueryRule(num_heads=4, kv_num_heads=2, do_rotary=True, qk_norm_epsilon=0.1))

    def normed(hidden: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        heads = hidden.reshape(1, 5, -1, SIZE)
        return (heads / (heads.pow(2).mean(-1, keepdim=True) + 0.1).sqrt() * gain).flatten(2)

    tables = {"cos_cache": angles.cos(), "sin_cache": angles.sin()}
    found = module(query, key, value, **tables, q_norm_weight=gains[0], k_norm_weight=gains[1])
    expected = module(normed(query, gains[0]), normed(key, gains[1]), value, **tables)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, module(query, key, value, **tables), atol=1e-3)


def test_a_past_is_refused() -> None:
    """A cut leaves it out; whoever hands one over must not have it ignored."""
    node = _node(np.random.default_rng(0), {"do_rotary": 0}, packed=True)
    with pytest.raises(NotImplementedError, match="input 3, 'past_key'"):
        node.run_torch()
    assert 3 in LEFT_OUT
