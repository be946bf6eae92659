"""The synthetic model is what onnxruntime-genai's builder would write for a Llama of these sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from scripts import make_large_model as command
from scripts.benchmarks.synthetic_llama import LlamaShape, random_llama
from scripts.options import LargeModelConfig
from stages.errors import UserError
from stages.model.directory import locate_model
from stages.model.load import load_graph
from stages.model.sites import find_expert_layers, find_sites
from stages.runtime.feeds import CausalFeeds
from tests.support.tiny_models import VOCABULARY

LIKE_THE_TINY_LLAMA = LlamaShape(
    layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2, head_size=16, vocabulary=VOCABULARY, context=512
)


def described(model: ir.Model) -> Iterator[tuple[object, ...]]:
    for node in model.graph:
        if node.op_type != "Constant":
            inputs = [None if value is None or not value.name else value.name for value in node.inputs]
            while inputs and inputs[-1] is None:
                inputs.pop()
            yield node.domain, node.op_type, node.name, tuple(inputs)


def test_it_has_the_builders_nodes(tiny_model: Path) -> None:
    built = load_graph(locate_model(tiny_model))
    made = random_llama(LIKE_THE_TINY_LLAMA, ir.DataType.FLOAT, seed=0)
    assert set(described(made)) == set(described(built))
    shapes = [{name: value.shape for name, value in model.graph.initializers.items()} for model in (made, built)]
    assert {name: shape for name, shape in shapes[0].items() if "constants" not in name} == shapes[1]


def test_a_written_model_is_a_base_model_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(command.SHAPES, "llama-3-8b", LIKE_THE_TINY_LLAMA)
    config = LargeModelConfig(output=tmp_path / "base", layers=1)
    command.make_large_model(config)
    directory = locate_model(config.output)
    assert len(find_sites(load_graph(directory))) == 6
    session = ort.InferenceSession(directory.onnx_file, providers=["CPUExecutionProvider"])
    logits = session.run(["logits"], CausalFeeds.of(session, directory)(np.array([[1, 2, 3]])))[0]
    assert logits.shape == (1, 3, VOCABULARY)
    assert np.isfinite(logits.astype(np.float32)).all()
    with pytest.raises(UserError, match="--output"):
        command.make_large_model(config)


def test_a_mixture_has_the_nodes_of_a_gpt_oss_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(command.SHAPES, "gpt-oss-20b", replace(LIKE_THE_TINY_LLAMA, experts=4, chosen=2))
    config = LargeModelConfig(output=tmp_path / "base", shape="gpt-oss-20b", precision="fp32")
    command.make_large_model(config)
    directory = locate_model(config.output)
    layers = find_expert_layers(load_graph(directory))
    assert [layer.name for layer in layers] == ["/model/layers.0/moe/MoE", "/model/layers.1/moe/MoE"]
    assert [(layer.experts, layer.hidden, layer.inner, layer.routing.top_k) for layer in layers] == [(4, 64, 96, 2)] * 2
    session = ort.InferenceSession(directory.onnx_file, providers=["CPUExecutionProvider"])
    logits = session.run(["logits"], CausalFeeds.of(session, directory)(np.array([[1, 2, 3]])))[0]
    assert np.isfinite(logits).all()
    assert np.abs(logits).max() > 0


def test_a_sparse_model_takes_no_room_and_has_every_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = replace(LIKE_THE_TINY_LLAMA, vocabulary=50_000, experts=4, chosen=2)
    monkeypatch.setitem(command.SHAPES, "gpt-oss-20b", wide)
    config = LargeModelConfig(output=tmp_path / "base", shape="gpt-oss-20b", sparse=True)
    command.make_large_model(config)
    data = (config.output / "model.onnx.data").stat()
    assert data.st_size > 2 * 2 * 50_000 * 64
    assert 512 * data.st_blocks < 100_000
    model = load_graph(locate_model(config.output))
    dense = random_llama(wide, ir.DataType.FLOAT16, seed=0)
    shapes = [{name: value.shape for name, value in each.graph.initializers.items()} for each in (model, dense)]
    assert shapes[0] == shapes[1]


def test_weights_depend_on_the_seed_and_their_name_alone() -> None:
    def weights(layers: int, seed: int) -> dict[str, np.ndarray]:
        shape = LlamaShape(
            layers=layers, hidden=64, intermediate=96, heads=4, kv_heads=2, head_size=16, vocabulary=300, context=64
        )
        graph = random_llama(shape, ir.DataType.FLOAT, seed).graph
        return {name: value.const_value.numpy() for name, value in graph.initializers.items() if value.const_value}

    one, two, other = weights(1, 0), weights(2, 0), weights(1, 1)
    name, second = "model.layers.0.mlp.up_proj.MatMul.weight", "model.layers.0.mlp.gate_proj.MatMul.weight"
    np.testing.assert_array_equal(one[name], two[name])
    assert not np.array_equal(one[name], other[name])
    assert not np.array_equal(one[name], one[second])
    assert one[name].std() == pytest.approx(0.02, rel=0.05)
