"""MatMulNBits: bytes against a slow float64 reference, and ONNX Runtime's products over the whole grid."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from export.forms.matmul_nbits import (
    packed_codes,
    packed_zero_points,
    stored_block_size,
    unpacked_codes,
    unpacked_zero_points,
)
from export.rewrite import rewrite
from stages.errors import OptionError
from stages.records.formats import Granularity, PerBlock, PerChannel, QuantSpec, WeightForm
from tests.export.builders import ExactWeight, exact_weight, relative_difference, run, site_of, spec_of, store_of_each
from tests.reference.dequantize import dequantize
from tests.reference.matmul_nbits import dequantize_nbits
from tests.support.graphs import TinyGraph, onnx_type
from tests.support.pairwise import pairwise

# Even and odd numbers of blocks, K not divisible by the block, K smaller than the block, an odd N.
SHAPES = [(64, 48), (80, 48), (72, 16), (33, 7)]
BLOCKS = [PerBlock(block_size=16), PerBlock(block_size=32), PerBlock(block_size=128), PerChannel()]
# Bits and symmetry: together they say how zero points are packed.
NUMBERS = list(product((4, 8), (True, False)))
# Sums of at most 80 products in float32; float16 outputs are rounded to 11 bits.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3}


def expected_rows(weight: ExactWeight) -> np.ndarray:
    """Return the stored weight [N, K] in float64, from codes as the store has them."""
    stored = weight.stored
    zero_points = None if stored.zero_points is None else stored.zero_points.numpy()
    width = stored.spec.block_size(stored.site.in_features)
    return dequantize(stored.codes.numpy(), stored.scales.numpy(), zero_points, width)


def initializer(model: ir.Model, name: str) -> np.ndarray:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def rewritten(
    folder: Path, weight: ExactWeight, graph: TinyGraph | None = None, accuracy_level: int | None = None
) -> ir.Model:
    store = store_of_each(folder / "weights", weight, form=WeightForm.MATMUL_NBITS)
    return rewrite((graph or matmul_graph(weight)).model(), store, accuracy_level).model


def matmul_graph(weight: ExactWeight) -> TinyGraph:
    site, graph = weight.stored.site, TinyGraph()
    graph.input("x", onnx_type(site.dtype), ["t", site.in_features])
    graph.output("y", onnx_type(site.dtype), ["t", site.out_features])
    graph.linear("x", weight.matrix, "y")
    return graph


def random_weight(
    shape: tuple[int, int], bits: int, symmetric: bool, blocks: Granularity, dtype: str = "float32", **changes: object
) -> ExactWeight:
    spec = spec_of(bits, symmetric=symmetric, granularity=blocks, scale_dtype=dtype)
    return exact_weight(site_of("y", "x", *shape, dtype=dtype, **changes), spec, np.random.default_rng(0))


@pytest.mark.parametrize(("shape", "number", "blocks"), pairwise(SHAPES, NUMBERS, BLOCKS))
def test_bytes_stand_for_the_stored_weight_and_what_fills_up_for_zeros(
    tmp_path: Path, shape: tuple[int, int], number: tuple[int, bool], blocks: Granularity
) -> None:
    bits, symmetric = number
    weight = random_weight(shape, bits, symmetric, blocks)
    model = rewritten(tmp_path, weight)
    node = next(iter(model.graph))
    width = node.attributes.get_int("block_size")
    zero_points = None if symmetric else initializer(model, "y/MatMul/zero_points")
    rows = dequantize_nbits(
        initializer(model, "y/MatMul/codes"), initializer(model, "y/MatMul/scales"), zero_points, bits, width
    )
    np.testing.assert_array_equal(rows[:, : shape[0]], expected_rows(weight))
    assert not rows[:, shape[0] :].any()
    num_blocks = -(-shape[0] // width)
    assert model.graph.initializers["y/MatMul/codes"].shape == (shape[1], num_blocks, width * bits // 8)
    assert model.graph.initializers["y/MatMul/scales"].shape == (shape[1], num_blocks)
    if not symmetric:
        assert model.graph.initializers["y/MatMul/zero_points"].shape == (shape[1], -(-num_blocks * bits // 8))


@pytest.mark.parametrize(("shape", "number", "blocks"), pairwise(SHAPES, NUMBERS, BLOCKS))
def test_unpacking_inverts_packing(shape: tuple[int, int], number: tuple[int, bool], blocks: Granularity) -> None:
    stored = random_weight(shape, *number, blocks).stored
    site, spec = stored.site, stored.spec
    np.testing.assert_array_equal(
        unpacked_codes(packed_codes(stored.codes, stored.zero_points, site, spec), site, spec), stored.codes.numpy()
    )
    if stored.zero_points is not None:
        found = unpacked_zero_points(packed_zero_points(stored.zero_points, site, spec), site, spec)
        # A zero point per channel stands in every block.
        np.testing.assert_array_equal(found, np.broadcast_to(stored.zero_points.numpy(), found.shape))
        assert found.shape[1] == -(-shape[0] // stored_block_size(site, spec))


@pytest.mark.parametrize(("shape", "number", "blocks", "dtype"), pairwise(SHAPES, NUMBERS, BLOCKS, list(TOLERANCE)))
def test_onnx_runtime_gives_the_reference_product(
    tmp_path: Path, shape: tuple[int, int], number: tuple[int, bool], blocks: Granularity, dtype: str
) -> None:
    weight = random_weight(shape, *number, blocks, dtype)
    model = rewritten(tmp_path, weight)
    x = np.random.default_rng(1).standard_normal((8, shape[0])).astype(dtype)
    expected = x.astype(np.float64) @ expected_rows(weight).T
    for optimize in (True, False):
        (y,) = run(model, {"x": x}, optimize=optimize)
        assert y.dtype == np.dtype(dtype)
        assert relative_difference(y, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("bits", "transposed", "bias", "beta", "dtype"),
    pairwise((4, 8), (0, 1), ((48,), (1, 48), (8, 1), ()), (1.0, 0.5, 0.0), list(TOLERANCE)),
)
def test_a_gemm_adds_its_bias_after_the_operator(
    tmp_path: Path, bits: int, transposed: int, bias: tuple[int, ...], beta: float, dtype: str
) -> None:
    weight = random_weight((80, 48), bits, False, PerBlock(block_size=32), dtype, op_type="Gemm", name="y/Gemm")
    rng = np.random.default_rng(2)
    x, c = rng.standard_normal((8, 80)).astype(dtype), (5 * rng.standard_normal(bias)).astype(dtype)
    graph = TinyGraph()
    graph.input("x", onnx_type(dtype), [8, 80])
    graph.output("y", onnx_type(dtype), [8, 48])
    matrix = np.ascontiguousarray(weight.matrix.T) if transposed else weight.matrix
    inputs = ["x", graph.constant("y.weight", matrix), graph.constant("c", c)]
    graph.node("Gemm", inputs, ["y"], {"transB": transposed, "beta": beta})
    model = rewritten(tmp_path, weight, graph)
    (y,) = run(model, {"x": x})
    expected = x.astype(np.float64) @ expected_rows(weight).T + beta * c.astype(np.float64)
    # The bias is as large as the product, and added in the storage type.
    assert relative_difference(y, expected) < TOLERANCE[dtype]
    (operator,) = [node for node in model.graph if node.op_type == "MatMulNBits"]
    assert operator.name == "y/Gemm"
    assert model.graph.outputs[0].name == "y"
    assert sum(node.op_type == "Add" for node in model.graph) == (beta != 0)


def test_a_gemm_without_bias_becomes_the_operator_itself(tmp_path: Path) -> None:
    weight = random_weight((64, 48), 4, True, PerBlock(block_size=16), op_type="Gemm", name="y/Gemm")
    graph = TinyGraph()
    graph.input("x", onnx_type("float32"), [8, 64])
    graph.output("y", onnx_type("float32"), [8, 48])
    graph.node("Gemm", ["x", graph.constant("y.weight", weight.matrix)], ["y"])
    model = rewritten(tmp_path, weight, graph)
    (node,) = model.graph
    assert (node.domain, node.op_type, node.name) == ("com.microsoft", "MatMulNBits", "y/Gemm")
    assert list(node.attributes) == ["K", "N", "bits", "block_size"]
    assert "y.weight" not in model.graph.initializers


@pytest.mark.parametrize("symmetric", [True, False])
def test_only_asymmetric_weights_store_zero_points(tmp_path: Path, symmetric: bool) -> None:
    model = rewritten(tmp_path, random_weight((64, 48), 4, symmetric, PerBlock(block_size=16)))
    (node,) = model.graph
    assert len(node.inputs) == (3 if symmetric else 4)
    assert ("y/MatMul/zero_points" in model.graph.initializers) is not symmetric


@pytest.mark.parametrize("level", [None, 1, 4])
def test_the_accuracy_level_is_an_attribute_where_it_is_asked_for(tmp_path: Path, level: int | None) -> None:
    weight = random_weight((64, 48), 4, True, PerBlock(block_size=32))
    model = rewritten(tmp_path, weight, accuracy_level=level)
    (node,) = model.graph
    assert node.attributes.get_int("accuracy_level", -1) == (-1 if level is None else level)
    x = np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32)
    error = relative_difference(run(model, {"x": x})[0], x.astype(np.float64) @ expected_rows(weight).T)
    # int8 activations lose about half a percent; without the attribute the runtime rounds nothing.
    assert (error > 1e-4) == (level == 4)


def test_the_input_model_is_left_alone_and_gets_the_operator_set_that_it_needs(tmp_path: Path) -> None:
    weight = random_weight((64, 48), 4, True, PerBlock(block_size=16))
    model = matmul_graph(weight).model()
    del model.graph.opset_imports["com.microsoft"]
    store = store_of_each(tmp_path / "weights", weight, form=WeightForm.MATMUL_NBITS)
    result = rewrite(model, store).model
    assert result.opset_imports["com.microsoft"] == 1
    assert "com.microsoft" not in model.opset_imports
    assert [node.op_type for node in model.graph] == ["MatMul"]


def test_a_relu_behind_it_stays_because_nothing_has_to_be_fused(tmp_path: Path) -> None:
    weight = random_weight((64, 48), 4, True, PerBlock(block_size=16))
    graph = matmul_graph(weight)
    graph.outputs.clear()
    graph.output("z", onnx_type("float32"), ["t", 48])
    graph.node("Relu", ["y"], ["z"])
    model = rewritten(tmp_path, weight, graph)
    assert [node.op_type for node in model.graph] == ["MatMulNBits", "Relu"]
    x = np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32)
    expected = np.maximum(x.astype(np.float64) @ expected_rows(weight).T, 0)
    assert relative_difference(run(model, {"x": x})[0], expected) < TOLERANCE["float32"]


def test_an_opset_without_four_bit_types_is_enough(tmp_path: Path) -> None:
    weight = random_weight((64, 48), 4, True, PerBlock(block_size=16))
    graph = matmul_graph(weight)
    graph.opset = 17
    x = np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32)
    (y,) = run(rewritten(tmp_path, weight, graph), {"x": x})
    assert relative_difference(y, x.astype(np.float64) @ expected_rows(weight).T) < TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("in_features", "block_size"), [(4096, 128), (576, 64), (1536, 128), (80, 16), (32, 32), (33, 16), (1, 16)]
)
def test_scales_per_channel_take_the_blocks_that_fill_up_least(in_features: int, block_size: int) -> None:
    spec = spec_of(8, granularity=PerChannel())
    assert stored_block_size(site_of("y", "x", in_features, 8), spec) == block_size


@pytest.mark.parametrize("block_size", [8, 48])
def test_blocks_that_the_operator_does_not_know_are_refused(tmp_path: Path, block_size: int) -> None:
    spec: QuantSpec = spec_of(4, granularity=PerBlock(block_size=block_size))
    weight = exact_weight(site_of("y", "x", 96, 8), spec, np.random.default_rng(0))
    with pytest.raises(OptionError, match=f"'y/MatMul' has blocks of {block_size}"):
        rewritten(tmp_path, weight)
