"""Number formats: float types in every library, and the bytes that codes and scales take."""

from __future__ import annotations

from typing import get_args

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from stages.records.formats import (
    FLOAT_TYPES,
    Granularity,
    PerBlock,
    PerChannel,
    QuantSpec,
    channel_block_size,
    float_of_onnx,
)
from stages.records.sites import FloatName
from tests.support.graphs import TinyGraph


@pytest.mark.parametrize("name", get_args(FloatName))
def test_all_libraries_mean_one_number_format(name: FloatName) -> None:
    kind = FLOAT_TYPES[name]
    assert kind.name == name
    assert kind.numpy.name == name
    graph = TinyGraph()
    graph.input("x", int(kind.onnx), [1])
    graph.node("Identity", ["x"], ["y"])
    graph.output("y", int(kind.onnx), [1])
    session = ort.InferenceSession(graph.proto().SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].type == kind.onnxruntime
    tensor = ir.tensor(torch.ones(1, dtype=kind.torch))
    assert tensor.dtype == kind.onnx
    assert float_of_onnx(tensor.dtype) is kind


def test_other_types_are_no_storage_type() -> None:
    assert float_of_onnx(ir.DataType.DOUBLE) is None
    assert float_of_onnx(None) is None


@pytest.mark.parametrize(
    ("bits", "symmetric", "granularity", "label", "codes", "expected"),
    [
        # 3 rows of 40 inputs; a scale takes 2 bytes.
        (4, True, PerBlock(block_size=16), "4b16", (-8, 7), 60 + 9 * 2),
        (4, False, PerBlock(block_size=16), "4b16z", (0, 15), 60 + 9 * 2 + 5),
        (8, True, PerChannel(), "8ch", (-128, 127), 120 + 3 * 2),
        (8, False, PerChannel(), "8chz", (0, 255), 120 + 3 * 2 + 3),
    ],
)
def test_a_format_knows_its_codes_and_bytes(
    bits: int, symmetric: bool, granularity: Granularity, label: str, codes: tuple[int, int], expected: int
) -> None:
    spec = QuantSpec(bits=bits, symmetric=symmetric, granularity=granularity, scale_dtype="float16")
    assert spec.label == label
    assert (spec.code_min, spec.code_max) == codes
    assert spec.format_bytes(3, 40) == expected


@pytest.mark.parametrize(("in_features", "size"), [(256, 128), (192, 64), (96, 32), (48, 16), (40, 16), (130, 16)])
def test_a_channel_is_padded_as_little_as_possible(in_features: int, size: int) -> None:
    assert channel_block_size(in_features) == size
