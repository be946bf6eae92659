"""Attention and rotary embedding against ONNX Runtime's CPU kernels, in every form that onnxruntime-genai writes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.runtime.blocks.converters.attention import GroupQueryAttention, GroupQueryRule
from tests.stages.runtime.blocks.one_node import OneNode, assert_same, random

BATCH, LENGTH, HEADS, KV_HEADS, SIZE = 2, 11, 6, 2, 32


def _tables(half: int) -> dict[str, np.ndarray]:
    angles = np.random.default_rng(1).uniform(0, 6, (32, half)).astype(np.float32)
    return {"cos_cache": np.cos(angles), "sin_cache": np.sin(angles)}


def group_query(
    *, packed: bool = True, half: int = SIZE // 2, bias: bool = False, sink: bool = False, **attributes: float
) -> OneNode:
    """Return a node with an empty past, which a cut leaves out; ``half`` is half of the channels that rotate."""
    widths = HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE
    rotary = _tables(half) if attributes.get("do_rotary") else {}
    return OneNode(
        operator="GroupQueryAttention",
        inputs={
            "query": random(BATCH, LENGTH, sum(widths) if packed else widths[0]),
            "key": None if packed else random(BATCH, LENGTH, widths[1], seed=2),
            "value": None if packed else random(BATCH, LENGTH, widths[2], seed=3),
            "past_key": np.zeros((BATCH, KV_HEADS, 0, SIZE), np.float32),
            "past_value": np.zeros((BATCH, KV_HEADS, 0, SIZE), np.float32),
            "seqlens_k": np.full((BATCH,), LENGTH - 1, np.int32),
            "total_sequence_length": np.array([LENGTH], np.int32),
            "cos_cache": rotary.get("cos_cache"),
            "sin_cache": rotary.get("sin_cache"),
            "position_ids": None,
            "attention_bias": random(1, HEADS, LENGTH, LENGTH, seed=4) if bias else None,
            "head_sink": np.linspace(-2, 3, HEADS).astype(np.float32) if sink else None,
        },
        attributes={"num_heads": HEADS, "kv_num_heads": KV_HEADS, **attributes},
        further=("present_key", "present_value"),
        left_out=frozenset({"past_key", "past_value", "seqlens_k", "total_sequence_length"}),
    )


def multi_head(
    *, mask: tuple[int, int] | None = None, bias: bool = False, padding: bool = False, **attributes: float
) -> OneNode:
    """Return a node; ``mask`` is the batch and heads of an additive causal mask that a graph computes."""
    hidden = None if mask is None else random(*mask, LENGTH, LENGTH, seed=4)
    return OneNode(
        operator="MultiHeadAttention",
        inputs={
            **{name: random(BATCH, LENGTH, HEADS * SIZE, seed=seed) for seed, name in enumerate(["q", "k", "v"])},
            "bias": random(3 * HEADS * SIZE, seed=5) if bias else None,
            "key_padding_mask": np.full((BATCH,), LENGTH, np.int32) if padding else None,
            "attention_bias": None if hidden is None else hidden + np.triu(np.full_like(hidden, -1e4), 1),
        },
        attributes={"num_heads": HEADS, **attributes},
    )


EACH = np.stack([np.arange(LENGTH), np.arange(LENGTH)[::-1] + 3]).astype(np.int64)
JOINED, SPLIT = (BATCH, LENGTH, HEADS * SIZE), (BATCH, HEADS, LENGTH, SIZE)


def rotary(
    shape: tuple[int, ...] = JOINED, positions: np.ndarray = EACH, half: int = SIZE // 2, **attributes: int
) -> OneNode:
    inputs = {"input": random(*shape), "position_ids": positions, **_tables(half)}
    return OneNode(operator="RotaryEmbedding", inputs=inputs, attributes=attributes)


def of_three_axes(layout: int, sections: tuple[int, ...], shape: tuple[int, ...] = JOINED, **more: int) -> OneNode:
    positions = np.random.default_rng(2).integers(0, 32, (3, BATCH, LENGTH))
    attributes = {"mrope_layout": layout, "mrope_section": list(sections), **more}
    inputs = {"input": random(*shape), "position_ids": positions, **_tables(sum(sections))}
    return OneNode(operator="MRotaryEmbedding", inputs=inputs, attributes=attributes)


CASES = {
    **{
        f"group query, {'packed' if packed else 'separate'}, {attributes}": group_query(packed=packed, **attributes)
        for packed in (True, False)
        for attributes in (
            {"do_rotary": 0},
            {"do_rotary": 1},
            {"do_rotary": 1, "rotary_interleaved": 1},
            {"do_rotary": 1, "scale": 0.7},
            {"do_rotary": 1, "local_window_size": 4},
            {"do_rotary": 1, "local_window_size": 20},
            {"do_rotary": 0, "softcap": 2.0},
            {"do_rotary": 1, "softcap": 1.5, "local_window_size": 3},
            {"do_rotary": 0, "smooth_softmax": 1},
        )
    },
    "group query, partial rotation": group_query(do_rotary=1, half=SIZE // 4),
    "group query, bias": group_query(do_rotary=1, bias=True),
    "group query, sinks": group_query(do_rotary=1, sink=True),
    "multi head": multi_head(),
    "multi head, scale": multi_head(scale=0.3),
    "multi head, causal": multi_head(unidirectional=1),
    "multi head, mask by window": multi_head(mask=(BATCH, 1)),
    "multi head, mask by head": multi_head(mask=(1, HEADS)),
    "multi head, bias of the projections": multi_head(bias=True),
    "rotary, joined heads": rotary(interleaved=0),
    "rotary, joined heads, interleaved": rotary(interleaved=1),
    "rotary, split heads": rotary(SPLIT, interleaved=0),
    "rotary, split heads, interleaved": rotary(SPLIT, interleaved=1),
    "rotary, one position where the window begins": rotary(positions=np.array([5], np.int64)),
    "three axes, one behind the other": of_three_axes(0, (8, 4, 4), num_heads=HEADS),
    "three axes by turns": of_three_axes(1, (6, 5, 5), num_heads=HEADS),
    "three axes by turns, the first more often": of_three_axes(1, (10, 4, 2), SPLIT),
    "three axes, partial": of_three_axes(1, (4, 2, 2), num_heads=HEADS, rotary_embedding_dim=SIZE // 2),
    "three axes, interleaved": of_three_axes(0, (8, 4, 4), num_heads=HEADS, interleaved=1),
    "rotary, partial": rotary(half=SIZE // 4, num_heads=HEADS, rotary_embedding_dim=SIZE // 2),
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_onnxruntime(name: str) -> None:
    assert_same(CASES[name])


def test_norms_of_query_and_key_come_before_the_rotation() -> None:
    """ONNX Runtime's CPU kernel refuses them, so the oracle is the same node behind norms made by hand."""
    query, key, value = (torch.from_numpy(random(1, 5, n * SIZE, seed=n)) for n in (4, 2, 3))
    value = value[..., : 2 * SIZE]
    gains = [torch.from_numpy(0.5 + abs(random(SIZE, seed=seed))) for seed in (5, 6)]
    module = GroupQueryAttention(GroupQueryRule(num_heads=4, kv_num_heads=2, do_rotary=1, qk_norm_epsilon=0.1))

    def normed(hidden: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        heads = hidden.reshape(1, 5, -1, SIZE)
        return (heads / (heads.pow(2).mean(-1, keepdim=True) + 0.1).sqrt() * gain).flatten(2)

    tables = {name: torch.from_numpy(table) for name, table in _tables(SIZE // 2).items()}
    found = module(query, key, value, **tables, q_norm_weight=gains[0], k_norm_weight=gains[1])
    expected = module(normed(query, gains[0]), normed(key, gains[1]), value, **tables)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, module(query, key, value, **tables), atol=1e-3)
