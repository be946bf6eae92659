"""Which releases fuse which DequantizeLinear, and which formats the runtimes warn about."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto

from stages.inspect.quantized_weights import FoundWeights, find_quantized
from stages.inspect.runtimes import ReleaseSpan, fused_on, runtime_answers
from tests.support.graphs import TinyGraph

K, N, BLOCK, OPSET = 64, 96, 32, 21


def one_matmul(
    codes: type,
    scales: tuple[int, ...],
    attributes: dict[str, int],
    *,
    scale_type: type = np.float32,
    zero_point: bool = False,
    transposed: bool = False,
) -> FoundWeights:
    """Return what is found in a graph of one MatMul with a dequantized weight."""
    graph = TinyGraph(opset=25)
    graph.input("x", TensorProto.FLOAT, [2, K])
    inputs = [graph.constant("codes", np.zeros((N, K) if transposed else (K, N), codes))]
    inputs.append(graph.constant("scales", np.ones(scales, scale_type)))
    inputs += [graph.constant("zero", np.zeros(scales, codes))] if zero_point else []
    weight = graph.node("DequantizeLinear", inputs, ["d"], dict(attributes))
    if transposed:
        weight = graph.node("Transpose", [weight], ["t"], {"perm": [1, 0]})
    graph.node("MatMul", ["x", weight], ["y"])
    graph.output("y", TensorProto.FLOAT, None)
    return find_quantized(graph.model())


def spans(found: FoundWeights, opset: int = OPSET) -> tuple[ReleaseSpan, ...]:
    (group,) = fused_on(found.dequantized, opset)
    assert group.sites == ("y/MatMul",)
    return group.spans


def first_that_fuses(found: FoundWeights) -> str | None:
    """Return the first release that fuses; None where none does. It and all later ones must."""
    answers = spans(found)
    assert all(not span.fused and span.why_not for span in answers[:-1])
    return answers[-1].first if answers[-1].fused else None


BLOCKS, CHANNELS, ROWS = {"axis": 0, "block_size": BLOCK}, {"axis": 1}, {"axis": 0}


@pytest.mark.parametrize(
    ("found", "first"),
    [
        (one_matmul(ml_dtypes.int4, (K // BLOCK, N), BLOCKS), "1.20"),
        (one_matmul(ml_dtypes.uint4, (K // BLOCK, N), BLOCKS, zero_point=True), "1.20"),
        (one_matmul(ml_dtypes.int4, (K // BLOCK, N), BLOCKS, scale_type=ml_dtypes.bfloat16), None),
        (one_matmul(ml_dtypes.int4, (N, K // BLOCK), {"axis": 1, "block_size": BLOCK}, transposed=True), None),
        (one_matmul(ml_dtypes.int4, (K, N // BLOCK), {"axis": 1, "block_size": BLOCK}), None),
        (one_matmul(np.int8, (), {}), "1.25"),
        (one_matmul(np.int8, (K,), ROWS), None),
        (one_matmul(np.int8, (N,), ROWS, transposed=True, zero_point=True), "1.25"),
        (one_matmul(np.int8, (N,), ROWS, transposed=True), "1.28"),
        (one_matmul(ml_dtypes.float8_e4m3fn, (N,), CHANNELS), None),
    ],
    ids=[
        "int4", "zero points", "bfloat16 scales", "column-major int4", "blocks along outputs", "one scale",
        "a scale per input", "column-major int8 with zero points", "column-major int8", "float8",
    ],
)  # fmt: skip
def test_the_first_release_that_fuses(found: FoundWeights, first: str | None) -> None:
    assert first_that_fuses(found) == first


def test_four_bit_codes_need_their_opset() -> None:
    (span,) = spans(one_matmul(ml_dtypes.int4, (K // BLOCK, N), BLOCKS), opset=20)
    assert not span.fused
    assert "needs 21" in span.why_not


def test_an_integer_product_is_not_one_matmul_nbits() -> None:
    found = one_matmul(np.int8, (N,), CHANNELS)
    (weight,) = found.dequantized
    both = replace(weight, stored=replace(weight.stored, activations="int8, fixed scales"))
    (span,) = spans(FoundWeights(stored=(both.stored,), dequantized=(both,)))
    assert not span.fused


def test_sites_with_the_same_answer_are_together() -> None:
    (weight,) = one_matmul(ml_dtypes.int4, (K // BLOCK, N), BLOCKS).dequantized
    (transposed,) = one_matmul(np.int8, (N,), ROWS, transposed=True).dequantized
    groups = fused_on([weight, transposed, weight], OPSET)
    assert [len(group.sites) for group in groups] == [2, 1]


def test_runtimes_answer_for_formats_that_their_rules_know() -> None:
    (known,) = one_matmul(ml_dtypes.int4, (K // BLOCK, N), BLOCKS).stored
    (foreign,) = one_matmul(ml_dtypes.float8_e4m3fn, (N,), CHANNELS, scale_type=np.float16).stored
    answers = {answer.runtime.partition("@")[0]: answer.objections for answer in runtime_answers([known], "4")}
    assert answers["cpu"] == answers["dml"] == ()
    assert answers["webgpu"]
    assert runtime_answers([], None) == ()
    assert runtime_answers([replace(foreign, bits=16)], None) == ()
    assert runtime_answers([known, replace(known, activations="int8, fixed scales")], None) == ()


def test_weights_behind_a_transpose_are_column_major_for_the_rules() -> None:
    (stored,) = one_matmul(ml_dtypes.int4, (N, K // BLOCK), {"axis": 1, "block_size": BLOCK}, transposed=True).stored
    (cpu, *_) = runtime_answers([stored], None)
    assert cpu.objections
    (straight, *_) = runtime_answers([replace(stored, operators=("DequantizeLinear", "MatMul"))], None)
    assert not straight.objections
