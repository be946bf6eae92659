"""Only what token ids are looked up in is an embedding."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from stages.graph.embeddings import find_embeddings
from stages.graph.weights import read_rows
from stages.records import EmbeddingTable
from tests.graphs import TinyGraph

TABLE = np.arange(24, dtype=np.float32).reshape(6, 4)


def graph_with(*, table: np.ndarray = TABLE, indices: str = "input_ids", axis: int = 0) -> TinyGraph:
    graph = TinyGraph()
    graph.input("input_ids", TensorProto.INT64, ["b", "t"])
    graph.input("position_ids", TensorProto.INT64, ["b", "t"])
    graph.node("Gather", [graph.constant("table", table), indices], ["h"], {"axis": axis})
    return graph


def expected(**changes: object) -> EmbeddingTable:
    fields: dict[str, object] = {
        "weight": "table", "gathers": ("h",), "vocabulary": 6, "hidden": 4, "transposed": False, "dtype": "float32",
    }  # fmt: skip
    return EmbeddingTable(**(fields | changes))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_table_read_by_input_ids_is_found(dtype: str) -> None:
    graph = graph_with(table=TABLE.astype(dtype))
    assert find_embeddings(graph.model()) == (expected(dtype=dtype),)


def test_token_ids_may_be_cast() -> None:
    graph = graph_with(indices="ids32")
    graph.node("Cast", ["input_ids"], ["ids32"], {"to": TensorProto.INT32})
    graph.nodes.reverse()
    assert find_embeddings(graph.model()) == (expected(),)


def test_all_lookups_of_one_table_are_one_table() -> None:
    graph = graph_with()
    graph.node("Gather", ["table", "input_ids"], ["second"])
    assert find_embeddings(graph.model()) == (expected(gathers=("h", "second")),)


def test_a_table_stored_transposed_is_found_and_read_in_its_own_orientation() -> None:
    import torch

    graph = TinyGraph()
    graph.input("input_ids", TensorProto.INT64, ["b", "t"])
    graph.constant("table", np.ascontiguousarray(TABLE.T))
    graph.node("Transpose", ["table"], ["swapped"], {"perm": [1, 0]})
    graph.node("Gather", ["swapped", "input_ids"], ["h"])
    model = graph.model()
    (table,) = find_embeddings(model)
    assert table == expected(transposed=True)
    rows = read_rows(model, table, slice(2, 5), torch.device("cpu"))
    assert np.array_equal(rows.numpy(), TABLE[2:5])


@pytest.mark.parametrize(
    "graph",
    [
        graph_with(indices="position_ids"),
        graph_with(axis=1),
        graph_with(table=TABLE.reshape(6, 2, 2)),
        graph_with(table=TABLE.astype(np.int64)),
        graph_with(table=TABLE[:, 0]),
    ],
    ids=["rotary cache", "another axis", "rank 3", "integers", "rank 1"],
)
def test_other_lookups_are_left_alone(graph: TinyGraph) -> None:
    assert find_embeddings(graph.model()) == ()


def test_computed_tables_and_computed_tokens_are_left_alone() -> None:
    graph = graph_with(indices="next")
    graph.node("Neg", ["input_ids"], ["next"])
    graph.node("Neg", ["table"], ["computed"])
    graph.node("Gather", ["computed", "input_ids"], ["k"])
    assert find_embeddings(graph.model()) == ()


def test_numbers_that_are_not_finite_are_refused() -> None:
    import torch

    from stages.errors import SolveError

    broken = TABLE.copy()
    broken[3, 1] = np.nan
    model: ir.Model = graph_with(table=broken).model()
    (table,) = find_embeddings(model)
    read_rows(model, table, slice(0, 3), torch.device("cpu"))
    with pytest.raises(SolveError, match="'table' holds NaN or infinite"):
        read_rows(model, table, slice(3, 6), torch.device("cpu"))
