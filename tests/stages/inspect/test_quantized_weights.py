"""Quantized weights of hand-made graphs, one for each operator that other quantizers write."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto
from pydantic_core import to_json

from stages.inspect.quantized_weights import FoundWeights, StoredWeight, find_quantized
from tests.support.graphs import MICROSOFT, TinyGraph

K, N, BLOCK = 64, 96, 32
Attributes = Mapping[str, int | float | str | list[int]]


def graph_of_x() -> TinyGraph:
    graph = TinyGraph()
    graph.input("x", TensorProto.FLOAT, [2, K])
    return graph


def find(graph: TinyGraph, output: str = "y") -> FoundWeights:
    graph.output(output, TensorProto.FLOAT, None)
    return find_quantized(graph.model())


def dequantized(
    graph: TinyGraph, codes: np.ndarray, scale: tuple[int, ...], attributes: Attributes, *, zero_point: bool = False
) -> str:
    inputs = [graph.constant("codes", codes), graph.constant("scales", np.ones(scale, np.float32))]
    inputs += [graph.constant("zero", np.zeros(scale, codes.dtype))] if zero_point else []
    return graph.node("DequantizeLinear", inputs, ["dequantized"], dict(attributes))


@pytest.mark.parametrize(
    ("dtype", "name", "bits"),
    [(ml_dtypes.int4, "INT4", 4), (ml_dtypes.uint4, "UINT4", 4), (np.int8, "INT8", 8), (np.uint8, "UINT8", 8)],
)
def test_blocks_before_a_matmul(dtype: type, name: str, bits: int) -> None:
    graph = graph_of_x()
    weight = dequantized(graph, np.zeros((K, N), dtype), (K // BLOCK, N), {"axis": 0, "block_size": BLOCK})
    graph.node("MatMul", ["x", weight], ["y"])
    found = find(graph)
    (stored,) = found.stored
    assert stored.operators == ("DequantizeLinear", "MatMul")
    assert (stored.codes, stored.bits, stored.grouping, stored.block_size) == (name, bits, "block", BLOCK)
    assert (stored.shape, stored.zero_point, stored.scales) == ((K, N), False, "FLOAT")
    assert stored.bytes == K * N * bits // 8 + 4 * K // BLOCK * N
    assert stored.bits_per_weight == pytest.approx(bits + 32 / BLOCK)
    assert [each.stored for each in found.dequantized] == [stored]


def test_operators_on_the_way_are_named_in_order() -> None:
    graph = graph_of_x()
    weight = dequantized(graph, np.zeros((N, K), np.int8), (N,), {"axis": 0}, zero_point=True)
    graph.node("Cast", [graph.node("Transpose", [weight], ["swapped"], {"perm": [1, 0]})], ["cast"], {"to": 1})
    graph.node("MatMul", ["x", "cast"], ["y"])
    (stored,) = find(graph).stored
    assert stored.operators == ("DequantizeLinear", "Transpose", "Cast", "MatMul")
    assert (stored.shape, stored.grouping, stored.zero_point) == ((K, N), "channel", True)


def test_programs_read_operators_and_their_text() -> None:
    graph = graph_of_x()
    graph.node("Gemm", ["x", dequantized(graph, np.zeros((N, K), np.int8), (), {})], ["y"], {"transB": 1})
    (stored,) = find(graph).stored
    assert (stored.grouping, stored.shape) == ("tensor", (K, N))
    document = to_json(stored).decode()
    assert '"operators":["DequantizeLinear","Gemm"]' in document
    assert '"form":"DequantizeLinear -> Gemm"' in document


def test_a_floating_point_weight_that_is_quantized_on_loading() -> None:
    graph = graph_of_x()
    weight, scale, zero = (
        graph.constant(name, value)
        for name, value in (("w", np.ones((K, N), np.float32)), ("s", np.float32(1)), ("z", np.int8(0)))
    )
    codes = graph.node("QuantizeLinear", [weight, scale, zero], ["q"])
    graph.node("MatMul", ["x", graph.node("DequantizeLinear", [codes, scale, zero], ["d"])], ["y"])
    (stored,) = find(graph).stored
    assert stored.operators == ("QuantizeLinear", "DequantizeLinear", "MatMul")
    assert (stored.codes, stored.initializers) == ("INT8", ("w", "s", "z"))


def test_activations_that_are_quantized_too_are_told() -> None:
    graph = graph_of_x()
    scale, zero = graph.constant("s", np.float32(1)), graph.constant("z", np.uint8(0))
    rounded = graph.node("QuantizeLinear", ["x", scale, zero], ["xq"])
    weight = dequantized(graph, np.zeros((K, N), np.int8), (N,), {"axis": 1})
    graph.node("MatMul", [graph.node("DequantizeLinear", [rounded, scale, zero], ["xd"]), weight], ["y"])
    (stored,) = find(graph).stored
    assert stored.activations == "int8, fixed scales"


def test_one_weight_of_two_readers_counts_for_both() -> None:
    graph = graph_of_x()
    weight = dequantized(graph, np.zeros((K, N), np.int8), (N,), {"axis": 1})
    graph.node("Add", [graph.node("MatMul", ["x", weight], ["a"]), graph.node("MatMul", ["x", weight], ["b"])], ["y"])
    assert [stored.node for stored in find(graph).stored] == ["a/MatMul", "b/MatMul"]


def test_a_table_whose_rows_are_dequantized() -> None:
    graph = TinyGraph()
    graph.input("ids", TensorProto.INT64, ["batch"])
    rows = graph.node("Gather", [graph.constant("table", np.zeros((300, K), np.int8)), "ids"], ["rows"])
    graph.node("DequantizeLinear", [rows, graph.constant("s", np.float32(1))], ["y"])
    found = find(graph)
    (stored,) = found.stored
    assert (stored.operators, stored.shape) == (("Gather", "DequantizeLinear"), (300, K))
    assert (stored.grouping, stored.bytes) == ("tensor", 300 * K + 4)
    assert found.dequantized == ()


def packed(graph: TinyGraph, op_type: str, shape: tuple[int, ...], attributes: Attributes) -> StoredWeight:
    codes = graph.constant("codes", np.zeros(shape, np.uint8))
    scales = graph.constant("scales", np.zeros(N * K // BLOCK, np.float32))
    graph.node(op_type, ["x", codes, scales], ["y"], dict(attributes), MICROSOFT)
    (stored,) = find(graph).stored
    return stored


def test_matmul_nbits() -> None:
    sizes = {"K": K, "N": N, "bits": 4, "block_size": BLOCK}
    shape = (N, K // BLOCK, BLOCK // 2)
    stored = packed(graph_of_x(), "MatMulNBits", shape, sizes | {"accuracy_level": 4})
    assert (stored.operators, stored.codes, stored.accuracy_level) == (("MatMulNBits",), "4 bits", 4)
    assert (stored.shape, stored.block_size) == ((K, N), BLOCK)
    assert stored.bytes == K * N // 2 + 4 * K * N // BLOCK
    assert packed(graph_of_x(), "MatMulNBits", shape, sizes).accuracy_level is None


@pytest.mark.parametrize(("quant_type", "codes"), [(0, "FP4"), (1, "NF4")])
def test_bitsandbytes(quant_type: int, codes: str) -> None:
    sizes = {"K": K, "N": N, "block_size": BLOCK, "quant_type": quant_type}
    stored = packed(graph_of_x(), "MatMulBnb4", (K * N // 2,), sizes)
    assert (stored.operators, stored.codes, stored.shape) == (("MatMulBnb4",), codes, (K, N))


@pytest.mark.parametrize(("dtype", "width"), [(np.uint8, K // 2), (ml_dtypes.int4, K)])
def test_gather_block_quantized(dtype: type, width: int) -> None:
    graph = TinyGraph()
    graph.input("ids", TensorProto.INT64, ["batch"])
    table = graph.constant("table", np.zeros((300, width), dtype))
    scales = graph.constant("scales", np.zeros((300, K // BLOCK), np.float32))
    graph.node("GatherBlockQuantized", [table, "ids", scales], ["y"], {"bits": 4, "block_size": BLOCK}, MICROSOFT)
    (stored,) = find(graph).stored
    assert (stored.shape, stored.bits, stored.block_size) == ((300, K), 4, BLOCK)
    assert stored.bytes == 300 * K // 2 + 4 * 300 * K // BLOCK


@pytest.mark.parametrize("reshaped", ["lookup", "product"])
def test_a_table_that_lookup_and_product_share_is_one_weight_of_both(reshaped: str) -> None:
    graph = graph_of_x()
    graph.input("ids", TensorProto.INT64, ["batch"])
    blocks, rows = (300, K // BLOCK, BLOCK), (300, K)
    stored_as, wanted = (blocks, rows) if reshaped == "lookup" else (rows, blocks)
    codes = graph.constant("codes", np.zeros(stored_as, np.uint8))
    scales = graph.constant("scales", np.zeros((300, K // BLOCK), np.float32))
    other = graph.node("Reshape", [codes, graph.constant("shape", np.array(wanted))], ["reshaped"])
    table, weight = (other, codes) if reshaped == "lookup" else (codes, other)
    graph.node("GatherBlockQuantized", [table, "ids", scales], ["y"], {"bits": 8, "block_size": BLOCK}, MICROSOFT)
    sizes = {"K": K, "N": 300, "bits": 8, "block_size": BLOCK}
    graph.node("MatMulNBits", ["x", weight, scales], ["z"], sizes, MICROSOFT)
    lookup, product = find(graph).stored
    assert lookup.initializers == product.initializers == ("codes", "scales")
    assert lookup.bytes == product.bytes == 300 * K + 4 * 300 * K // BLOCK
    assert (lookup.shape, product.shape) == ((300, K), (K, 300))


def test_experts() -> None:
    graph = graph_of_x()
    inputs = ["x", graph.input("router", TensorProto.FLOAT, [2, 8])]
    for layer, shape in enumerate([(8, N, K // 2), (8, K, N // 2)]):
        inputs += [
            graph.constant(f"w{layer}", np.zeros(shape, np.uint8)),
            graph.constant(f"s{layer}", np.zeros(shape[:2], np.float32)),
            "",
        ]
    graph.node("QMoE", inputs, ["y"], {"expert_weight_bits": 4, "k": 2}, MICROSOFT)
    stored = find(graph).stored
    assert [(each.shape, each.grouping) for each in stored] == [((8, N, K), "channel"), ((8, K, N), "channel")]


def test_integer_product_with_a_scale_of_each_run() -> None:
    graph = graph_of_x()
    graph.node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"])
    weight, zero = graph.constant("w", np.zeros((K, N), np.int8)), graph.constant("wz", np.zeros(N, np.int8))
    graph.node("MatMulInteger", ["xq", weight, "xz", zero], ["product"])
    scale = graph.node("Mul", ["xs", graph.constant("ws", np.ones(N, np.float32))], ["scale"])
    graph.node("Mul", [graph.node("Cast", ["product"], ["cast"], {"to": 1}), scale], ["y"])
    (stored,) = find(graph).stored
    assert (stored.operators, stored.codes, stored.grouping) == (("MatMulInteger",), "INT8", "channel")
    assert (stored.initializers, stored.activations) == (("w", "ws", "wz"), "int8, scales per run")


def test_integer_product_with_fixed_scales() -> None:
    graph = TinyGraph()
    graph.input("x", TensorProto.UINT8, [2, K])
    one, zero = graph.constant("one", np.float32(1)), graph.constant("zero", np.uint8(0))
    weight = graph.constant("w", np.zeros((K, N), np.uint8))
    graph.node("QLinearMatMul", ["x", one, zero, weight, one, zero, one, zero], ["y"])
    (stored,) = find(graph).stored
    assert (stored.grouping, stored.shape, stored.activations) == ("tensor", (K, N), "int8, fixed scales")


def test_what_is_not_a_weight_is_not_found() -> None:
    graph = graph_of_x()
    scale, zero = graph.constant("s", np.float32(1)), graph.constant("z", np.uint8(0))
    rounded = graph.node("QuantizeLinear", ["x", scale, zero], ["q"])
    graph.node("Relu", [graph.node("DequantizeLinear", [rounded, scale, zero], ["d"])], ["y"])
    assert find(graph) == FoundWeights(stored=(), dequantized=())
