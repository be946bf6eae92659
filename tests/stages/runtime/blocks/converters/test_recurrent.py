"""Convolutions and linear attention against ONNX Runtime's CPU kernels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.stages.runtime.blocks.one_node import OneNode, assert_same, random

BATCH, LENGTH, SIZE, VALUE_SIZE = 2, 150, 8, 6
"""More tokens than two chunks hold."""


def conv(*, bias: bool = True, dilation: int = 1, last: bool = False, activation: str = "silu") -> OneNode:
    """Return a node with an empty state, which a cut leaves out."""
    state = (3 * dilation, 12) if last else (12, 3 * dilation)
    return OneNode(
        operator="CausalConvWithState",
        inputs={
            "x": random(BATCH, *((LENGTH, 12) if last else (12, LENGTH))),
            "w": random(12, 1, 4, seed=1),
            "b": random(12, seed=2) if bias else None,
            "past": np.zeros((BATCH, *state), np.float32),
        },
        attributes={"activation": activation, "ndim": 1, "dilation": dilation, "channels_last": int(last)},
        further=("present",),
        left_out=frozenset({"past"}),
    )


def attention(
    rule: str, q_heads: int = 2, heads: int = 4, *, of_channels: bool = False, one_beta: bool = False, scale: float = 0
) -> OneNode:
    """Return a node with an empty state, which a cut leaves out."""
    key = random(BATCH, LENGTH, heads, SIZE, seed=1)
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    decay = -0.2 * np.abs(random(BATCH, LENGTH, heads * (SIZE if of_channels else 1), seed=3))
    beta = 1 / (1 + np.exp(random(BATCH, LENGTH, 1 if one_beta else heads, seed=4)))
    return OneNode(
        operator="LinearAttention",
        inputs={
            "q": random(BATCH, LENGTH, q_heads * SIZE),
            "k": key.reshape(BATCH, LENGTH, -1),
            "v": random(BATCH, LENGTH, heads * VALUE_SIZE, seed=2),
            "past": np.zeros((BATCH, heads, SIZE, VALUE_SIZE), np.float32),
            "decay": decay if "gated" in rule else None,
            "beta": beta if "delta" in rule else None,
        },
        attributes={"update_rule": rule, "q_num_heads": q_heads, "kv_num_heads": heads, "scale": float(scale)},
        further=("present",),
        left_out=frozenset({"past"}),
    )


GATE = {"a": random(2, 5, 3), "bias": random(3, seed=1), "scale": -np.ones(3, np.float32)}
NORM = {"x": random(2, 5, 12), "gain": 1 + abs(random(4, seed=1)), "gate": random(2, 5, 12, seed=2)}
CASES = {
    "conv": conv(),
    "conv, no bias": conv(bias=False, activation="none"),
    "conv, dilation": conv(dilation=2),
    "conv, channels last": conv(last=True),
    **{f"attention, {rule}": attention(rule) for rule in ("linear", "gated", "delta", "gated_delta")},
    "attention, more queries than keys": attention("gated_delta", 4, 2, scale=0.5),
    "attention, one rate": attention("delta", one_beta=True),
    "attention, a decay of each channel": attention("gated_delta", of_channels=True),
    "attention, a decay of each channel, gated": attention("gated", of_channels=True),
    "gate": OneNode("LinearAttentionGate", GATE | {"b": random(2, 5, 3, seed=2)}, outputs=("decay", "beta")),
    "gate, decay only": OneNode("LinearAttentionGate", GATE, outputs=("decay",)),
    **{
        f"norm, {activation}": OneNode("GatedRMSNorm", NORM, {"epsilon": 0.1, "activation": activation})
        for activation in ("silu", "sigmoid")
    },
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_onnxruntime(name: str) -> None:
    assert_same(CASES[name])


@pytest.mark.parametrize("node", [conv(), attention("gated_delta")], ids=["conv", "attention"])
def test_a_state_from_before_is_refused(node: OneNode) -> None:
    with pytest.raises(NotImplementedError, match=f"{node.operator} with input 3, 'past'"):
        replace(node, left_out=frozenset()).run_torch()
