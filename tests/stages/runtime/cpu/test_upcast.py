"""Check that a 16-bit graph runs as float32 with the same numbers, and the bytes that its weights take then."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from stages.model.directory import locate_model
from stages.model.load import load_graph
from stages.model.partition import cut_into_partitions
from stages.model.sites import find_groups
from stages.runtime.cpu.runnable import open_file, runnable_graph
from stages.runtime.cpu.upcast import must_upcast, resident_bytes, upcast_file, upcast_model
from stages.runtime.providers import CPU, CPU_ONLY, CUDA
from stages.runtime.session import SessionSettings

GPU = (CUDA, CPU)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_only_the_cpu_holds_16_bit_weights_as_float32(dtype: type) -> None:
    weight = ir.tensor(np.zeros((3, 5), dtype))
    assert resident_bytes(weight, CPU_ONLY) == 3 * 5 * 4
    assert resident_bytes(weight, GPU) == 3 * 5 * 2


@pytest.mark.parametrize("providers", [CPU_ONLY, GPU])
def test_float32_and_codes_lie_as_they_are_stored(providers: tuple[str, ...]) -> None:
    assert resident_bytes(ir.tensor(np.zeros((3, 5), np.float32)), providers) == 3 * 5 * 4
    assert resident_bytes(ir.tensor(np.zeros((3, 5), np.int8)), providers) == 3 * 5


def test_a_float16_model_is_cut_finer_for_the_cpu(tiny_model_dml: Path) -> None:
    model = load_graph(locate_model(tiny_model_dml))
    wanted = [group.activation for group in find_groups(model)]
    whole = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    cpu, gpu = (
        list(
            cut_into_partitions(
                model, wanted=wanted, limit=whole, weight_bytes=partial(resident_bytes, providers=providers)
            )
        )
        for providers in (CPU_ONLY, GPU)
    )
    assert len(gpu) == 1
    assert len(cpu) > 1


BFLOAT16, FLOAT = TensorProto.BFLOAT16, TensorProto.FLOAT
WEIGHT = np.random.default_rng(0).standard_normal((64, 8)).astype(ml_dtypes.bfloat16)


def bfloat16_model(weight: np.ndarray = WEIGHT) -> ir.Model:
    """Return Cast(x) @ W + past + 0.3 + 0.7 (by If), every bfloat16 in another place."""
    value = helper.make_tensor_value_info
    constant = helper.make_tensor("c", BFLOAT16, [1], [0.3])
    filled = helper.make_tensor("f", BFLOAT16, [1], [0.7])
    branch = helper.make_graph(
        [helper.make_node("ConstantOfShape", ["shape"], ["b"], value=filled)],
        "branch",
        [],
        [value("b", BFLOAT16, [1])],
    )
    nodes = [
        helper.make_node("Cast", ["x"], ["x16"], to=BFLOAT16),
        helper.make_node("MatMul", ["x16", "w"], ["product"]),
        helper.make_node("Add", ["product", "past"], ["sum"]),
        helper.make_node("Constant", [], ["c"], value=constant),
        helper.make_node("If", ["condition"], ["added"], then_branch=branch, else_branch=branch),
        helper.make_node("Add", ["c", "added"], ["both"]),
        helper.make_node("Add", ["sum", "both"], ["present"]),
        helper.make_node("Cast", ["present"], ["y"], to=FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "bfloat16",
        [value("x", FLOAT, [3, 64]), value("past", BFLOAT16, [3, 8]), value("condition", TensorProto.BOOL, [])],
        [value("y", FLOAT, [3, 8]), value("present", BFLOAT16, [3, 8])],
        [
            helper.make_tensor("w", BFLOAT16, weight.shape, weight.tobytes(), raw=True),
            helper.make_tensor("shape", TensorProto.INT64, [1], [1]),
        ],
        value_info=[value("product", BFLOAT16, [3, 8])],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def test_the_upcast_graph_runs_on_the_cpu_with_exactly_the_same_numbers(tmp_path: Path) -> None:
    model = bfloat16_model()
    with upcast_file(model, tmp_path) as path:
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        assert {node.name: node.type for node in session.get_inputs()} == {
            "x": "tensor(float)",
            "past": "tensor(float)",
            "condition": "tensor(bool)",
        }
        rng = np.random.default_rng(1)
        x, past = rng.standard_normal((3, 64)).astype(np.float32), rng.standard_normal((3, 8)).astype(np.float32)
        y, present = session.run(None, {"x": x, "past": past, "condition": np.array(True)})
        stored = next(tensor for tensor in onnx.load(path).graph.initializer if tensor.name == "w")
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(stored), WEIGHT.astype(np.float32))
    constants = [float(np.array(number).astype(ml_dtypes.bfloat16)) for number in (0.3, 0.7)]
    # x itself is not rounded to bfloat16: the Cast now goes to float32.
    expected = x.astype(np.float64) @ WEIGHT.astype(np.float64) + past + sum(constants)
    assert present.dtype == np.float32
    np.testing.assert_array_equal(y, present)
    # Sums of 64 products in float32.
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())


def test_the_bfloat16_graph_itself_is_refused_by_the_cpu() -> None:
    """If this fails, ONNX Runtime has learned bfloat16 and upcasting has become needless."""
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        ort.InferenceSession(ir.to_proto(bfloat16_model()).SerializeToString(), providers=["CPUExecutionProvider"])


def test_no_bfloat16_is_left_and_the_original_keeps_its_own() -> None:
    model = bfloat16_model()
    before = ir.to_proto(model).SerializeToString()
    assert b"\x10" in before
    upcast = ir.to_proto(upcast_model(model))
    assert ir.to_proto(model).SerializeToString() == before
    assert must_upcast(model, CPU_ONLY)
    assert not must_upcast(ir.from_proto(upcast), CPU_ONLY)
    types = [tensor.data_type for tensor in upcast.graph.initializer] + [
        attribute.t.data_type
        for node in [*upcast.graph.node, *upcast.graph.node[4].attribute[0].g.node]
        for attribute in node.attribute
        if attribute.type == onnx.AttributeProto.TENSOR
    ]
    assert sorted(types) == [FLOAT, FLOAT, FLOAT, TensorProto.INT64]
    targets = [attribute.i for node in upcast.graph.node for attribute in node.attribute if attribute.name == "to"]
    assert targets == [FLOAT, FLOAT]


@pytest.mark.parametrize(("name", "number", "expected"), [("stash_type", 16, 1), ("axis", 16, 16), ("to", 10, 10)])
def test_only_numbers_that_name_a_type_change(name: str, number: int, expected: int) -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.BFLOAT16))
    node = ir.node("Op", [x], attributes={name: number})
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 21}, name="g")
    (changed,) = upcast_model(ir.Model(graph, ir_version=10)).graph
    assert changed.attributes.get_int(name) == expected


def test_weights_are_upcast_when_they_are_written_not_before() -> None:
    tensor = upcast_model(bfloat16_model()).graph.initializers["w"].const_value
    assert isinstance(tensor, ir.LazyTensor)
    assert tensor.dtype == ir.DataType.FLOAT


def test_temporary_weights_lie_where_asked_and_are_removed_even_after_an_error(tmp_path: Path) -> None:
    def stop_inside() -> None:
        with upcast_file(bfloat16_model(), tmp_path) as path:
            assert tmp_path in path.parents
            assert path.with_name("model.onnx.data").stat().st_size == WEIGHT.size * 4
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        stop_inside()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("providers", "copied"), [(CPU_ONLY, True), (GPU, False)])
def test_only_the_cpu_needs_the_copy(tmp_path: Path, providers: tuple[str, ...], copied: bool) -> None:
    model = bfloat16_model()
    with runnable_graph(model, providers, tmp_path) as graph:
        assert isinstance(graph, Path) == copied
    assert not list(tmp_path.iterdir())


def test_a_float32_model_is_run_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    ir.save(upcast_model(bfloat16_model()), path)
    with open_file(path, SessionSettings(), tmp_path) as session:
        assert session.get_providers() == list(CPU_ONLY)
        assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
