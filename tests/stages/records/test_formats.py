"""The floating-point types are the same number format in every library."""

from __future__ import annotations

from typing import get_args

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from stages.records.formats import FLOAT_TYPES, float_of_onnx
from stages.records.sites import FloatName
from tests.support.graphs import TinyGraph


@pytest.mark.parametrize("name", get_args(FloatName))
def test_all_libraries_mean_one_number_format(name: FloatName) -> None:
    kind = FLOAT_TYPES[name]
    assert kind.name == name
    assert kind.numpy == kind.onnx.numpy()
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
