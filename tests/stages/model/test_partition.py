"""Check that partitions of a model, run one after another, compute what the whole does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from scripts.benchmarks.synthetic_llama import LlamaShape, random_llama
from stages.model.directory import ModelDirectory
from stages.model.partition import Partition, cut_into_partitions
from stages.runtime.feeds import CausalFeeds

TINY = LlamaShape(layers=3, hidden=64, intermediate=96, heads=4, kv_heads=2, head_size=16, vocabulary=256, context=64)
DIRECTORY = ModelDirectory(
    folder=Path(),
    onnx_file=Path("model.onnx"),
    has_genai_config=False,
    kv_heads=TINY.kv_heads,
    head_size=TINY.head_size,
)
TOKENS = np.array([[3, 1, 4, 1, 5]])


def sites_of(model: ir.Model) -> list[str]:
    """Return the outputs of all MatMuls but lm_head's."""
    return [
        str(node.outputs[0].name)
        for node in model.graph
        if node.op_type in ("MatMul", "MatMulNBits") and "lm_head" not in str(node.name)
    ]


def declare_types(partition: Partition, computed: dict[str, np.ndarray]) -> None:
    for value in partition.model.graph.inputs:
        if value.name in partition.boundary_inputs:
            value.type = ir.TensorType(ir.DataType.from_numpy(computed[value.name].dtype))


def run(model: ir.Model, computed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    boundary = {node.name: computed[node.name] for node in session.get_inputs() if node.name in computed}
    feeds = CausalFeeds.of(session, DIRECTORY, frozenset(boundary))
    names = [node.name for node in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds(TOKENS) | boundary), strict=True))


def partitions_of(model: ir.Model, limit: int) -> list[Partition]:
    """Return the partitions up to the last norm, which reads the last site."""
    wanted = ["/model/layers.3/final_norm_layernorm/output_0", *sites_of(model)]
    return list(cut_into_partitions(model, wanted=wanted, limit=limit))


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
@pytest.mark.parametrize("limit", [1, 15_000, 60_000, 10**9])
def test_partitions_compute_what_the_whole_computes(limit: int, dtype: ir.DataType) -> None:
    model = random_llama(TINY, dtype, seed=0)
    (whole,) = partitions_of(model, 10**9)
    expected = run(whole.model, {})
    computed: dict[str, np.ndarray] = {}
    partitions = partitions_of(model, limit)
    for partition in partitions:
        declare_types(partition, computed)
        computed |= run(partition.model, computed)
    assert (len(partitions) == 1) == (limit == 10**9)
    assert set(expected) <= set(computed)
    tolerance = 1e-5 if dtype is ir.DataType.FLOAT else 2e-3
    for name, value in expected.items():
        np.testing.assert_allclose(computed[name], value, rtol=tolerance, atol=tolerance)


def weights_of(partition: Partition) -> dict[str, int]:
    initializers = partition.model.graph.initializers
    return {name: value.const_value.nbytes for name, value in initializers.items() if value.const_value is not None}


def test_partitions_keep_to_the_limit_and_hold_each_large_weight_once() -> None:
    model = random_llama(TINY, ir.DataType.FLOAT, seed=0)
    layer = 4 * (64 * (128 + 64) + 3 * 64 * 96)
    partitions = [weights_of(partition) for partition in partitions_of(model, layer * 5 // 4)]
    assert all(sum(sizes.values()) <= layer * 5 // 4 for sizes in partitions)
    assert 3 <= len(partitions) <= 5
    large = [name for sizes in partitions for name in sizes if name.endswith("MatMul.weight")]
    assert sorted(large) == sorted(
        f"{site[1:].replace('/', '.').removesuffix('.output_0')}.weight" for site in sites_of(model)
    )


def test_nodes_that_cannot_be_separated_may_exceed_the_limit() -> None:
    model = random_llama(TINY, ir.DataType.FLOAT, seed=0)
    sites = frozenset(sites_of(model))
    ends = ["/model/layers.3/final_norm_layernorm/output_0"]
    for partition in cut_into_partitions(model, wanted=ends, limit=1, together=sites):
        made = {value.name for node in partition.model.graph for value in node.outputs}
        read = {value.name for node in partition.model.graph for value in node.inputs if value is not None}
        assert made & sites <= read, "a product leaves the partition that makes it"
        assert not sites & {value.name for value in partition.model.graph.inputs}


def test_cuts_lie_where_only_the_residual_stream_crosses() -> None:
    """What crosses is the stream and its norm, and the lengths that every attention reads."""
    model = random_llama(TINY, ir.DataType.FLOAT, seed=0)
    layer = 4 * (64 * (128 + 64) + 3 * 64 * 96)
    crossing = [partition.boundary_inputs for partition in partitions_of(model, layer * 5 // 4)]
    streams = [[name for name in names if "attn_mask" not in name] for names in crossing[1:]]
    assert all(len(names) == 2 and "mlp" not in "".join(names) for names in streams[1:]), streams


def test_extra_bytes_count_like_weights() -> None:
    model = random_llama(TINY, ir.DataType.FLOAT, seed=0)
    site = sites_of(model)
    heavy = dict.fromkeys(site, 10**6)
    partitions = list(cut_into_partitions(model, wanted=site, limit=5 * 10**6 + 10**5, extra_bytes=heavy))
    assert 3 <= len(partitions) <= 5
    assert all(sum(value.name in heavy for value in partition.model.graph.outputs) <= 5 for partition in partitions)


def test_what_comes_behind_what_is_wanted_is_left_out() -> None:
    model = random_llama(TINY, ir.DataType.FLOAT, seed=0)
    nodes = [node.name for partition in partitions_of(model, 1) for node in partition.model.graph]
    assert "/lm_head/MatMul" not in nodes
    assert "/model/layers.3/final_norm_layernorm/SkipLayerNorm" in nodes
