"""Check that weights and rows of embeddings are read in their own orientation, with their own values, and finite."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto

from stages.errors import GraphError, SolveError
from stages.model.directory import locate_model
from stages.model.load import load_graph
from stages.model.sites import find_embeddings, find_sites
from stages.model.weights import all_finite, find_equal_initializers, find_tied_site, read_rows, read_weight, to_torch
from tests.support.exporters import EXPORTERS
from tests.support.graphs import TinyGraph

CPU = torch.device("cpu")


def matmul(weight: np.ndarray) -> ir.Model:
    graph = TinyGraph()
    graph.input("x", TensorProto.FLOAT, ["t", weight.shape[0]])
    graph.output(graph.linear("x", weight, "y"), TensorProto.FLOAT, ["t", weight.shape[1]])
    return graph.model()


def test_a_weight_becomes_n_by_k_float32() -> None:
    weight = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float16)
    model = matmul(weight)
    read = read_weight(model, find_sites(model)[0], CPU)
    assert read.dtype == torch.float32
    np.testing.assert_array_equal(read.numpy(), weight.T)


def test_a_weight_that_was_read_is_not_kept_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    ir.save(matmul(np.ones((6, 4), np.float32)), path, external_data="model.onnx.data", size_threshold_bytes=0)
    model = load_graph(locate_model(path))
    site = find_sites(model)[0]
    read_weight(model, site, CPU)
    tensor = model.graph.initializers[site.weight].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert tensor.raw is None


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_every_float_type_keeps_its_values(dtype: type) -> None:
    array = np.linspace(-2, 2, 12).astype(dtype).reshape(3, 4)
    array.flags.writeable = False
    np.testing.assert_array_equal(to_torch(array).float().numpy(), array.astype(np.float32))


def test_nan_weights_name_the_site() -> None:
    model = matmul(np.full((6, 4), np.nan, np.float32))
    with pytest.raises(SolveError, match="weight of y/MatMul holds NaN"):
        read_weight(model, find_sites(model)[0], CPU)


def test_a_weight_that_is_gone_is_named() -> None:
    model = matmul(np.ones((6, 4), np.float32))
    (site,) = find_sites(model)
    with pytest.raises(GraphError, match=r"The weight 'gone' of y/MatMul is not in the graph"):
        read_weight(model, replace(site, weight="gone"), CPU)


TABLE = np.arange(24, dtype=np.float32).reshape(6, 4)


@pytest.mark.parametrize("transposed", [False, True], ids=["table as it is", "table transposed"])
@pytest.mark.parametrize("head", ["same", "equal", "equal rows", "one number off", "turned"])
def test_a_head_is_tied_where_its_numbers_are_the_tables(head: str, transposed: bool) -> None:
    table = np.random.default_rng(0).standard_normal((2500, 4), np.float32)
    graph = TinyGraph()
    graph.input("input_ids", TensorProto.INT64, ["t"])
    stored = np.ascontiguousarray(table.T) if transposed else table
    data = graph.constant("table", stored)
    other = graph.node("Transpose", [data], ["swapped"], {"perm": [1, 0]})
    rows = graph.node("Gather", [other if transposed else data, "input_ids"], ["rows"])
    weight = table.T.copy()
    weight[3, 2499] += head == "one number off"
    if head == "same":
        weight_name = data if transposed else other
    elif head == "equal rows":
        weight_name = graph.node("Transpose", [graph.constant("head", table)], ["head turned"], {"perm": [1, 0]})
    else:
        weight_name = graph.constant("head", weight if head != "turned" else np.ascontiguousarray(weight[:, ::-1]))
    graph.output(graph.node("MatMul", [rows, weight_name], ["logits"]), TensorProto.FLOAT, ["t", 2500])
    model = graph.model()
    (found,) = find_embeddings(model)
    (site,) = find_sites(model)
    tied = find_tied_site(model, found, [site])
    assert tied == (site if head in ("same", "equal", "equal rows") else None)


def test_two_initializers_whose_file_is_missing_are_not_tied(tmp_path: Path) -> None:
    table = np.ones((6, 4), np.float32)
    graph = TinyGraph()
    graph.input("input_ids", TensorProto.INT64, ["t"])
    rows = graph.node("Gather", [graph.constant("table", table), "input_ids"], ["rows"])
    graph.output(graph.linear(rows, np.ascontiguousarray(table.T), "logits"), TensorProto.FLOAT, ["t", 6])
    path = tmp_path / "model.onnx"
    ir.save(graph.model(), path, external_data="model.onnx.data", size_threshold_bytes=0)
    model = ir.load(path)
    found, sites = find_embeddings(model)[0], find_sites(model)
    assert find_tied_site(model, found, sites) == sites[0]
    (tmp_path / "model.onnx.data").unlink()
    model = ir.load(path)
    assert find_tied_site(model, found, sites) is None


def lookup(table: np.ndarray, *, transposed: bool = False) -> ir.Model:
    graph = TinyGraph()
    graph.input("input_ids", TensorProto.INT64, ["b", "t"])
    graph.constant("table", np.ascontiguousarray(table.T) if transposed else table)
    if transposed:
        graph.node("Transpose", ["table"], ["swapped"], {"perm": [1, 0]})
    graph.node("Gather", ["swapped" if transposed else "table", "input_ids"], ["h"])
    return graph.model()


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_of_an_embedding_are_read_in_their_own_orientation(transposed: bool) -> None:
    model = lookup(TABLE, transposed=transposed)
    (table,) = find_embeddings(model)
    np.testing.assert_array_equal(read_rows(model, table, slice(2, 5), CPU).numpy(), TABLE[2:5])


def test_rows_that_are_not_finite_are_refused() -> None:
    broken = TABLE.copy()
    broken[3, 1] = np.nan
    model = lookup(broken)
    (table,) = find_embeddings(model)
    read_rows(model, table, slice(0, 3), CPU)
    with pytest.raises(SolveError, match="'table' holds NaN or infinite"):
        read_rows(model, table, slice(3, 6), CPU)


_TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", _TYPES)
@pytest.mark.parametrize(("wrong", "place"), [(math.nan, (0, 0)), (math.inf, (17, 3)), (-math.inf, (-1, -1))])
def test_one_number_that_is_not_finite_is_found(dtype: torch.dtype, wrong: float, place: tuple[int, int]) -> None:
    numbers = torch.randn(64, 257, dtype=torch.float32).to(dtype)
    assert all_finite(numbers)
    numbers[place] = wrong
    assert not all_finite(numbers)
    assert not all_finite(numbers.T)


@pytest.mark.parametrize("dtype", _TYPES)
def test_the_extremes_of_a_type_are_finite_and_so_is_nothing(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    assert all_finite(torch.tensor([info.max, info.min, info.tiny, 0.0], dtype=dtype))
    assert all_finite(torch.empty(0, 4, dtype=dtype))


@pytest.mark.parametrize("name", EXPORTERS)
def test_weights_of_other_exporters_are_found_with_their_numbers(tmp_path: Path, name: str) -> None:
    matrix = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float16).astype(np.float32)
    graph = TinyGraph()
    graph.input("x", TensorProto.FLOAT, ["t", 6])
    graph.linear("x", matrix, "y")
    graph.output("y", TensorProto.FLOAT, ["t", 4])
    proto = graph.proto()
    EXPORTERS[name](proto)
    onnx.save(proto, tmp_path / "model.onnx")
    model = load_graph(locate_model(tmp_path))
    (site,) = find_sites(model)
    assert (site.in_features, site.out_features, site.dtype) == (6, 4, "float32")
    assert torch.equal(read_weight(model, site, CPU), torch.from_numpy(matrix.T))
    assert [value.name for value in model.graph.inputs] == ["x"]


def test_initializers_are_equal_where_every_byte_is() -> None:
    """Shapes and types count, the middle as the ends do, and tensors that are yet to be made are not looked at."""
    numbers = np.random.default_rng(0).normal(size=(128, 64)).astype(np.float32)
    other = numbers.copy()
    other[64, 0] += 1
    graph = TinyGraph()
    graph.input("x", TensorProto.FLOAT, [128, 64])
    stored = {"a": numbers, "b": other, "c": numbers.copy(), "d": numbers.reshape(64, 128), "e": numbers.view(np.int32)}
    for name, each in stored.items():
        graph.constant(name, each)
    graph.constant("small", numbers[0])
    graph.constant("small again", numbers[0])
    graph.node("Add", ["x", "a"], ["y"])
    graph.output("y", TensorProto.FLOAT, [128, 64])
    model = graph.model()

    def unread() -> ir.TensorProtocol:
        raise AssertionError("made")

    model.graph.initializers["d"].const_value = ir.LazyTensor(
        unread, dtype=ir.DataType.FLOAT, shape=ir.Shape([128, 64])
    )
    (equal,) = find_equal_initializers(model)
    assert [value.name for value in equal] == ["a", "c"]
