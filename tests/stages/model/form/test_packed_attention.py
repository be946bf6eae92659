"""Attention written as MatMul and MultiHeadAttention computes what ONNX Runtime's Attention does."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto

from stages.model.form.packed_attention import why_stays_packed, write_packed_attention
from stages.model.sites import find_sites
from tests.support.graphs import MICROSOFT, TinyGraph

WIDTH, HEADS, BATCH, LENGTH = 32, 4, 2, 6
MASK = np.array([[1, 1, 1, 1, 0, 0], [1] * LENGTH], np.int32)


def attention(*, mask: str = "", added: bool = False, outputs: int = 1, **attributes: Any) -> ir.Model:
    """Return a node that reads [B, S, K]; ``mask`` is none, one of numbers, or lengths that are computed."""
    generator = np.random.default_rng(0)
    columns = sum(attributes.get("qkv_hidden_sizes", [WIDTH] * 3))
    graph = TinyGraph()
    x = graph.input("x", TensorProto.FLOAT, [BATCH, LENGTH, WIDTH])
    weight = graph.constant("qkv", 0.3 * generator.standard_normal((WIDTH, columns)).astype(np.float32))
    inputs = [x, weight, graph.constant("bias", generator.standard_normal(columns).astype(np.float32)), "", "", ""]
    if mask:
        graph.input("mask", TensorProto.INT32, ["b", "s"] if mask != "one axis" else ["b"])
        wide = graph.node("Cast", ["mask"], ["wide"], {"to": TensorProto.INT32})
        axis = graph.constant("axis", np.array([1]))
        inputs[3] = graph.node("ReduceSum", [wide, axis], ["n"], {"keepdims": 0}) if mask == "lengths" else wide
    if added:
        inputs[5] = graph.input("added", TensorProto.FLOAT, [BATCH, HEADS, LENGTH, LENGTH])
    names = ["y", *(["present"] if outputs > 1 else [])]
    graph.node("Attention", inputs, names, {"num_heads": HEADS, **attributes}, domain=MICROSOFT)
    for name in names:
        graph.output(name, TensorProto.FLOAT, None)
    return graph.model()


def computed(model: ir.Model) -> np.ndarray:
    generator = np.random.default_rng(1)
    feeds = {
        "x": generator.standard_normal((BATCH, LENGTH, WIDTH)).astype(np.float32),
        "mask": MASK,
        "added": generator.standard_normal((BATCH, HEADS, LENGTH, LENGTH)).astype(np.float32),
    }
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (y, *_) = session.run(None, {given.name: feeds[given.name] for given in session.get_inputs()})
    return np.asarray(y)


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"unidirectional": 1},
        {"scale": 0.1, "added": True},
        {"mask": "numbers"},
        {"mask": "numbers", "unidirectional": 1, "mask_filter_value": -5.0},
        {"mask": "lengths"},
        {"qkv_hidden_sizes": [16, 16, 32]},
    ],
)
def test_the_product_and_its_attention_are_the_packed_one(form: dict[str, Any]) -> None:
    model = attention(**form)
    expected = computed(model)
    write_packed_attention(model)
    (site,) = find_sites(model)
    assert (site.name, site.weight, site.activation) == ("y/Attention/qkv_proj/MatMul", "qkv", "x")
    assert [node.op_type for node in model.graph if node.op_type not in ("Constant", "Cast", "ReduceSum")] == [
        *("MatMul", "Add", "Split", "MultiHeadAttention")
    ]
    np.testing.assert_allclose(computed(model), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ({"outputs": 2}, "keeps a cache"),
        ({"do_rotary": 1}, "has the attribute do_rotary"),
        ({"mask": "one axis"}, "takes no mask"),
    ],
)
def test_what_multi_head_attention_lacks_stays_packed(form: dict[str, Any], reason: str) -> None:
    model = attention(**form)
    node = model.graph.node("y/Attention")
    assert reason in why_stays_packed(node)
    write_packed_attention(model)
    assert node.op_type == "Attention"
