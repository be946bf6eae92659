"""A Relu as a MatMul's only reader keeps ONNX Runtime from fusing it; Max(x, 0) in its place is fused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from export.rewrite import rewrite
from export.verify.fusion import why_not_fused
from stages.errors import GraphError, OptionError
from stages.model.directory import locate_model
from stages.model.load import load_graph
from stages.model.sites import find_groups
from stages.records.formats import WeightForm
from stages.records.sites import NormAbsorber, WeightLayout
from stages.runtime.feeds import CausalFeeds
from stages.runtime.session import SessionSettings, open_session
from tests.export.builders import (
    check_rewrite,
    exact_weight,
    group_of,
    input_scale,
    relative_difference,
    run,
    site_of,
    spec_of,
    store_of,
    store_of_each,
)
from tests.support.graphs import TinyGraph, tiny_decoder
from tests.support.scaled_rewrite import INT8_ERROR, filled_store, scaled_rewrite

TOKENS = 3


def squared_relu(matrix: np.ndarray, *, second_reader: bool = False, relu: str = "Relu") -> TinyGraph:
    """x -> up -> Relu -> Pow 2 -> y, as Nemotron's MLP has it."""
    graph = TinyGraph()
    graph.input("x", TensorProto.FLOAT, [1, TOKENS, 64])
    graph.linear("x", matrix, "up")
    graph.node(relu, ["up"], ["positive"])
    graph.node("Pow", ["positive", graph.constant("two", np.array([2], np.int32))], ["y"])
    graph.output("y", TensorProto.FLOAT, [1, TOKENS, 32])
    if second_reader:
        graph.node("Neg", ["positive"], ["z"])
        graph.output("z", TensorProto.FLOAT, [1, TOKENS, 32])
    return graph


def fused_types(model: ir.Model, feeds: dict[str, np.ndarray], folder: Path) -> list[str]:
    run(model, feeds, optimized_file=folder / "optimized.onnx")
    return [node.op_type for node in ir.load(folder / "optimized.onnx").graph]


def test_a_relu_behind_a_site_becomes_a_max_and_the_site_is_fused(tmp_path: Path, rng: np.random.Generator) -> None:
    up = exact_weight(site_of("up", "x", 64, 32), spec_of(4), rng)
    base = squared_relu(up.matrix).model()
    result = rewrite(base, store_of_each(tmp_path / "weights", up))
    feeds = {"x": rng.standard_normal((1, TOKENS, 64)).astype(np.float32)}
    # Sums of 64 products in another order, then squared.
    np.testing.assert_allclose(run(result.model, feeds)[0], run(base, feeds)[0], rtol=1e-4, atol=1e-4)
    assert "Relu" not in [node.op_type for node in result.model.graph]
    assert "MatMulNBits" in fused_types(result.model, feeds, tmp_path)


def test_the_runtime_still_needs_it(tmp_path: Path, rng: np.random.Generator) -> None:
    """When this fails, ONNX Runtime has learnt to fuse in front of a Relu, and export/rewrite.py can leave it."""
    up = exact_weight(site_of("up", "x", 64, 32), spec_of(4), rng)
    model = rewrite(squared_relu(up.matrix).model(), store_of_each(tmp_path / "weights", up)).model
    clamp = next(node for node in model.graph if node.op_type == "Max")
    clamp.op_type = "Relu"
    clamp.resize_inputs(1)
    feeds = {"x": rng.standard_normal((1, TOKENS, 64)).astype(np.float32)}
    assert "MatMulNBits" not in fused_types(model, feeds, tmp_path)
    site = clamp.inputs[0].producer()
    assert "only a Relu reads its result" in why_not_fused(site, spec_of(4), (1, 31))


def test_a_relu_that_two_nodes_read_stays(tmp_path: Path, rng: np.random.Generator) -> None:
    up = exact_weight(site_of("up", "x", 64, 32), spec_of(4), rng)
    base = squared_relu(up.matrix, second_reader=True).model()
    result = rewrite(base, store_of_each(tmp_path / "weights", up))
    feeds = {"x": rng.standard_normal((1, TOKENS, 64)).astype(np.float32)}
    assert "Relu" in [node.op_type for node in result.model.graph]
    assert "MatMulNBits" in fused_types(result.model, feeds, tmp_path)


def test_another_activation_stays(tmp_path: Path, rng: np.random.Generator) -> None:
    up = exact_weight(site_of("up", "x", 64, 32), spec_of(4), rng)
    base = squared_relu(up.matrix, relu="Sigmoid").model()
    result = rewrite(base, store_of_each(tmp_path / "weights", up))
    assert [node.op_type for node in result.model.graph] == ["DequantizeLinear", "MatMul", "Sigmoid", "Pow"]


def tokens() -> dict[str, np.ndarray]:
    return {"input_ids": np.arange(7)[None]}


def test_the_input_model_stays_as_it_was(tmp_path: Path, rng: np.random.Generator) -> None:
    up = exact_weight(site_of("up", "x", 64, 96), spec_of(), rng, input_scale(rng, 64))
    down = exact_weight(site_of("down", "product", 96, 64), spec_of(), rng)
    model = tiny_decoder(up.matrix, down.matrix, rng).model()
    before = ir.to_proto(model).SerializeToString()
    groups = [
        (group_of([up], absorber=NormAbsorber(output="x", parameters=("gain",))), [up]),
        (group_of([down]), [down]),
    ]
    result = rewrite(model, store_of(tmp_path / "weights", groups))
    assert ir.to_proto(model).SerializeToString() == before
    assert ir.to_proto(result.model).SerializeToString() != before


@pytest.mark.parametrize("form", list(WeightForm))
def test_a_tied_head_is_quantized_and_the_embedding_kept(
    tmp_path: Path, rng: np.random.Generator, form: WeightForm
) -> None:
    site = site_of(
        "logits",
        "down",
        64,
        32,
        weight="embedding",
        layout=WeightLayout.N_BY_K_TRANSPOSED,
        weight_shared_with=("h",),
    )
    head = exact_weight(site, spec_of(), rng)
    graph = tiny_decoder(np.ones((64, 96), np.float32) / 64, np.ones((96, 64), np.float32) / 96, rng)
    table = next(tensor for tensor in graph.initializers if tensor.name == "embedding")
    table.raw_data = np.ascontiguousarray(head.matrix.T).tobytes()
    result = check_rewrite(graph.model(), store_of_each(tmp_path / "weights", head, form=form), tokens())
    kinds = [node.op_type for node in result.model.graph]
    assert kinds.count("Transpose") == (form is WeightForm.DQ_COLUMN_MAJOR)
    assert kinds.count("Gather") == 1
    assert "embedding" in result.model.graph.initializers


def test_a_weight_that_two_sites_read_gets_a_dequantize_each(tmp_path: Path, rng: np.random.Generator) -> None:
    first = exact_weight(site_of("a", "x", 32, 32, weight="shared"), spec_of(), rng)
    second_site = site_of("b", "a", 32, 32, weight="shared")
    second = replace(first, stored=replace(first.stored, site=second_site))
    graph = TinyGraph()
    graph.input("x", TensorProto.FLOAT, ["t", 32])
    graph.constant("shared", first.matrix)
    graph.node("MatMul", ["x", "shared"], ["a"])
    graph.node("MatMul", ["a", "shared"], ["b"])
    graph.output("b", TensorProto.FLOAT, ["t", 32])
    x = {"x": rng.standard_normal((5, 32)).astype(np.float32)}
    result = check_rewrite(graph.model(), store_of_each(tmp_path / "weights", first, second), x)
    made = [node.outputs[0] for node in result.model.graph if node.op_type == "DequantizeLinear"]
    assert [len(value.uses()) for value in made] == [1, 1]
    assert "shared" not in result.model.graph.initializers


@pytest.mark.parametrize("shape", [(32, 48), (32, 32)])
def test_a_transposed_gemm_reads_the_weight_the_other_way_round(
    tmp_path: Path, rng: np.random.Generator, shape: tuple[int, int]
) -> None:
    site = site_of("y", "x", *shape, name="y/Gemm", op_type="Gemm", layout=WeightLayout.N_BY_K)
    weight = exact_weight(site, spec_of(), rng)
    graph = TinyGraph()
    graph.input("x", TensorProto.FLOAT, [5, shape[0]])
    bias = graph.constant("bias", rng.standard_normal(shape[1]).astype(np.float32))
    transposed = graph.constant("y.weight", np.ascontiguousarray(weight.matrix.T))
    graph.node("Gemm", ["x", transposed, bias], ["y"], {"transB": 1})
    graph.output("y", TensorProto.FLOAT, [5, shape[1]])
    x = {"x": rng.standard_normal((5, shape[0])).astype(np.float32)}
    check_rewrite(graph.model(), store_of_each(tmp_path / "weights", weight), x)


def test_unnamed_nodes_get_their_sites_name_and_ir_version_10(tmp_path: Path, rng: np.random.Generator) -> None:
    weight = exact_weight(site_of("y", "x", 32, 32, name="y.weight->y"), spec_of(), rng)
    graph = TinyGraph()
    graph.input("x", TensorProto.FLOAT, ["t", 32])
    graph.output("y", TensorProto.FLOAT, ["t", 32])
    graph.linear("x", weight.matrix, "y")
    graph.nodes[0].name = ""
    model = graph.model()
    model.ir_version = 8
    result = rewrite(model, store_of_each(tmp_path / "weights", weight))
    assert [node.name for node in result.model.graph if node.op_type == "MatMul"] == ["y.weight->y"]
    assert result.sites[0].node == "y.weight->y"
    assert (model.ir_version, result.model.ir_version) == (8, 10)


def test_an_old_opset_is_raised_and_said(tmp_path: Path, rng: np.random.Generator) -> None:
    up = exact_weight(site_of("up", "x", 64, 96), spec_of(), rng)
    model = tiny_decoder(up.matrix, np.ones((96, 64), np.float32), rng, opset=20).model()
    result = check_rewrite(model, store_of_each(tmp_path / "weights", up), tokens())
    assert (model.opset_imports[""], result.model.opset_imports[""]) == (20, 21)
    # Only Transpose is defined anew in opset 21.
    assert str(result.opset) == "converted from opset 20 to 21; nodes with another definition there: 1"


def test_an_unfinished_store_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    up = exact_weight(site_of("up", "x", 64, 96), spec_of(), rng)
    model = tiny_decoder(up.matrix, np.ones((96, 64), np.float32), rng).model()
    store = store_of_each(tmp_path / "weights", up)
    store.group_file(0).unlink()
    with pytest.raises(OptionError, match=r"lacks 1 of 1 group .*run stages.quantize again"):
        rewrite(model, store)


def test_a_site_of_another_model_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    other = exact_weight(site_of("missing", "x", 64, 96), spec_of(), rng)
    model = tiny_decoder(other.matrix, np.ones((96, 64), np.float32), rng).model()
    with pytest.raises(GraphError, match="'missing'"):
        rewrite(model, store_of_each(tmp_path / "weights", other))


def test_scales_of_another_type_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    up = exact_weight(site_of("up", "x", 64, 96), spec_of(), rng)
    model = tiny_decoder(up.matrix, np.ones((96, 64), np.float32), rng).model()
    site = replace(up.stored.site, dtype="float16")
    other = replace(up, stored=replace(up.stored, site=site))
    with pytest.raises(OptionError, match="float32 scales in a float16 model"):
        rewrite(model, store_of_each(tmp_path / "weights", other))


def test_weights_are_read_when_they_are_saved_and_not_before(tmp_path: Path, rng: np.random.Generator) -> None:
    up = exact_weight(site_of("up", "x", 64, 96), spec_of(symmetric=False), rng)
    model = tiny_decoder(up.matrix, np.ones((96, 64), np.float32), rng).model()
    store = store_of_each(tmp_path / "weights", up)
    result = rewrite(model, store)
    store.group_file(0).unlink()
    for part in ("codes", "scales", "zero_points"):
        tensor = result.model.graph.initializers[f"up/MatMul/{part}"].const_value
        assert tensor is not None
        with pytest.raises(OptionError, match="missing"):
            tensor.tobytes()


def test_scales_that_go_into_quantized_layers_are_not_lost(tmp_path: Path, tiny_model: Path) -> None:
    """up_proj and v_proj (inside the packed qkv) are quantized themselves, and take down_proj's and o_proj's scales."""
    directory = locate_model(tiny_model)
    model = load_graph(directory)
    ir.external_data.load_to_model(model)
    session = open_session(directory.onnx_file, SessionSettings())
    feeds = CausalFeeds.of(session, directory)(np.arange(40)[None] * 7 % 300)
    result = scaled_rewrite(tmp_path / "weights", model, exclude="lm_head")
    assert [fold.how for fold in result.folds] == ["norm", "value", "norm", "linear"] * 2
    assert relative_difference(run(result.model, feeds)[0], run(model, feeds)[0]) < 2 * INT8_ERROR


def test_other_readers_of_a_weight_keep_it(tmp_path: Path, rng: np.random.Generator) -> None:
    """The embedding's tokens and an excluded product, whose weights are those of quantized sites."""
    up, down = (rng.standard_normal(shape).astype(np.float32) / 8 for shape in ((64, 96), (96, 64)))
    graph = tiny_decoder(up, down, rng)
    graph.node("MatMul", ["h", "up.weight"], ["kept"])
    for name, width in (("h", 64), ("kept", 96)):
        graph.output(name, TensorProto.FLOAT, ["batch", "length", width])
    logits, h, kept = run(graph.model(), tokens())
    after = run(scaled_rewrite(tmp_path / "weights", graph.model(), exclude="kept").model, tokens())
    assert relative_difference(after[0], logits) < INT8_ERROR
    np.testing.assert_array_equal(after[1], h)
    np.testing.assert_array_equal(after[2], kept)


def tower(layers: int) -> ir.Model:
    """Norms and MatMuls after one another."""
    graph = TinyGraph()
    x = graph.input("x", TensorProto.FLOAT, ["t", 16])
    for layer in range(layers):
        gain = graph.constant(f"gain{layer}", np.ones(16, np.float32))
        normed = graph.node("SimplifiedLayerNormalization", [x, gain], [f"n{layer}"])
        x = graph.linear(normed, np.eye(16, dtype=np.float32), f"y{layer}")
    graph.output(x, TensorProto.FLOAT, ["t", 16])
    return graph.model()


def calls_of(action: Callable[[], object]) -> int:
    """How many functions, of Python and of C, ``action`` calls."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def test_the_work_grows_with_the_layers_and_not_with_their_square(tmp_path: Path) -> None:
    def calls(layers: int) -> int:
        model = tower(layers)
        store = filled_store(tmp_path / str(layers), model)
        return calls_of(lambda: (find_groups(model), rewrite(model, store)))

    calls(2)  # what is done once and remembered
    assert calls(60) / calls(15) < 4.2


def test_copies_of_a_table_are_stored_once(tmp_path: Path, rng: np.random.Generator) -> None:
    """Each layer adds a mask of its own; two of the three hold the same, and the output computes what it did."""
    mask = rng.standard_normal((TOKENS, 2048)).astype(np.float32)
    up = exact_weight(site_of("y0", "x", 64, 2048), spec_of(4), rng)
    graph = TinyGraph()
    graph.input("x", TensorProto.FLOAT, [1, TOKENS, 64])
    graph.linear("x", up.matrix, "y0")
    for index, each in enumerate((mask, mask, mask + 1)):
        graph.node("Add", [f"y{index}", graph.constant(f"mask{index}", each)], [f"y{index + 1}"])
    graph.output("y3", TensorProto.FLOAT, [1, TOKENS, 2048])
    base, feeds = graph.model(), {"x": rng.standard_normal((1, TOKENS, 64)).astype(np.float32)}
    result = check_rewrite(base, store_of_each(tmp_path / "weights", up), feeds)
    assert {name for name in result.model.graph.initializers if name.startswith("mask")} == {"mask0", "mask2"}
    assert "mask1" in base.graph.initializers
