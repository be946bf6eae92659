"""Block-sparse attention as attention with a bias gives the same numbers, without a buffer for its cache."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto

from stages.runtime.cpu.runnable import runnable_graph
from stages.runtime.cpu.sparse_attention import has_sparse_attention, write_out_sparse_attention
from stages.runtime.providers import CPU_ONLY
from stages.runtime.session import SessionSettings, open_session
from tests.support.graphs import MICROSOFT, TinyGraph

HEADS, KV_HEADS, SIZE, BLOCK, BLOCKS, LENGTH = 4, 2, 16, 16, 4, 60
FLOAT = TensorProto.FLOAT
ROWS = np.array([[0, 1, 3, 5, 7], [0, 1, 2, 4, 7]], np.int32)
COLUMNS = np.array([[0, 0, 1, 1, 2, 0, 3], [0, 1, 0, 2, 1, 2, 3]], np.int32)


def graph(room: int) -> TinyGraph:
    """Return block-sparse attention whose cache has ``room`` for so many tokens."""
    made = TinyGraph()
    cache = [1, KV_HEADS, room, SIZE]
    inputs = [made.input("qkv", FLOAT, [1, LENGTH, (HEADS + 2 * KV_HEADS) * SIZE]), "", ""]
    inputs += [made.input(f"past_{name}", FLOAT, cache) for name in "kv"]
    inputs += [made.constant("rows", ROWS), made.constant("columns", COLUMNS)]
    inputs += [made.constant("all", np.array(LENGTH, np.int32)), made.constant("valid", np.array([LENGTH], np.int32))]
    heads = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "sparse_block_size": BLOCK, "do_rotary": 0}
    made.node("SparseAttention", inputs, ["y", "present_k", "present_v"], {**heads}, MICROSOFT)
    made.output("y", FLOAT, [1, LENGTH, HEADS * SIZE])
    for name in "kv":
        made.output(f"present_{name}", FLOAT, ["b", KV_HEADS, "t", SIZE])
    return made


def computed(model: ir.Model, qkv: np.ndarray, room: int) -> list[np.ndarray]:
    """Return what the graph computes; its cache is one buffer, as the operator wants it."""
    session = open_session(ir.to_proto(model).SerializeToString(), SessionSettings())
    binding = session.io_binding()
    binding.bind_cpu_input("qkv", qkv)
    for name in "kv":
        buffer = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, KV_HEADS, room, SIZE), np.float32))
        binding.bind_ortvalue_input(f"past_{name}", buffer)
        if room:
            binding.bind_ortvalue_output(f"present_{name}", buffer)
        else:
            binding.bind_output(f"present_{name}")
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    found: list[np.ndarray] = binding.copy_outputs_to_cpu()
    return found


def test_a_bias_gives_what_block_sparse_attention_gives() -> None:
    qkv = np.random.default_rng(0).standard_normal((1, LENGTH, (HEADS + 2 * KV_HEADS) * SIZE)).astype(np.float32)
    room = BLOCK * BLOCKS
    *caches, expected = computed(graph(room).model(), qkv, room)
    model = graph(0).model()
    assert has_sparse_attention(model)
    rewritten = write_out_sparse_attention(model)
    assert not has_sparse_attention(rewritten)
    *found, y = computed(rewritten, qkv, 0)
    # Sums of 60 products in another order.
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for cache, buffer in zip(found, caches, strict=True):
        np.testing.assert_allclose(cache, buffer[:, :, :LENGTH], atol=1e-6)
    with pytest.raises(Exception, match="max_cache_sequence_length"):  # the reason for all of it
        computed(model, qkv, 0)
    with runnable_graph(model, CPU_ONLY, None) as source:
        assert isinstance(source, bytes)
        assert b"GroupQueryAttention" in source


def test_blocks_that_the_graph_computes_are_left_alone() -> None:
    model = graph(0).model()
    model.graph.initializers["rows"].const_value = None
    assert not has_sparse_attention(model)
