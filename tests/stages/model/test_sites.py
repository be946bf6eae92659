"""Check what is a site, and that only what token ids are looked up in is an embedding."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto

from stages.errors import GraphError
from stages.model.sites import find_embeddings, find_groups, find_sites
from stages.records.formats import EmbeddingTable
from stages.records.sites import WeightLayout
from tests.support.graphs import TinyGraph

FLOAT = TensorProto.FLOAT


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def start() -> TinyGraph:
    graph = TinyGraph()
    graph.input("x", FLOAT, ["t", 8])
    return graph


def test_layouts_shapes_and_names() -> None:
    graph = start()
    graph.linear("x", ones(8, 5), "plain")
    bias = graph.constant("bias", np.zeros(3, np.float32))
    graph.node("Gemm", ["x", graph.constant("nk", ones(3, 8)), bias], ["gemm"], {"transB": 1})
    tied = graph.constant("tied", ones(6, 8))
    graph.node("Transpose", [tied], ["tied_t"], {"perm": [1, 0]})
    graph.node("MatMul", ["x", "tied_t"], ["logits"])
    ids = graph.input("ids", TensorProto.INT64, ["t"])
    graph.node("Gather", [tied, ids], ["embedded"])
    for name in ("plain", "gemm", "logits", "embedded"):
        graph.output(name, FLOAT, ["t", None])
    sites = {site.output: site for site in find_sites(graph.model())}
    assert {name: (site.out_features, site.in_features, site.layout) for name, site in sites.items()} == {
        "plain": (5, 8, WeightLayout.K_BY_N),
        "gemm": (3, 8, WeightLayout.N_BY_K),
        "logits": (6, 8, WeightLayout.N_BY_K_TRANSPOSED),
    }
    assert sites["logits"].weight_shared_with == ("embedded",)
    assert sites["logits"].feeds_logits
    assert not sites["plain"].feeds_logits


def test_what_is_not_a_site() -> None:
    graph = start()
    graph.node("MatMul", ["x", graph.constant("cube", ones(2, 8, 4))], ["batched"])
    graph.node("Gemm", ["x", graph.constant("w", ones(8, 4))], ["scaled"], {"alpha": 0.5})
    graph.node("MatMul", ["x", graph.input("dynamic", FLOAT, [8, 4])], ["computed"])
    graph.output("batched", FLOAT, [2, "t", 4])
    with pytest.raises(GraphError, match="nothing to quantize"):
        find_groups(graph.model())


def test_unnamed_nodes_are_called_after_their_weight() -> None:
    graph = start()
    graph.linear("x", ones(8, 5), "a")
    graph.nodes[-1].name = ""
    graph.output("a", FLOAT, ["t", 5])
    assert find_sites(graph.model())[0].name == "a.weight->a"


@pytest.mark.parametrize("cap", [True, False])
def test_logits_are_known_behind_a_soft_cap(cap: bool) -> None:
    graph = start()
    graph.linear("x", ones(8, 5), "head" if cap else "logits")
    if cap:
        limit = graph.constant("limit", np.array(30, np.float32))
        graph.node("Tanh", [graph.node("Div", ["head", limit], ["small"])], ["squashed"])
        graph.node("Mul", ["squashed", limit], ["logits"])
    graph.output("logits", FLOAT, ["t", 5])
    assert [site.feeds_logits for site in find_sites(graph.model())] == [True]


def test_nodes_of_one_name_are_told_apart_by_their_outputs() -> None:
    graph = start()
    for output in ("a", "b"):
        graph.linear("x", ones(8, 5), output)
        graph.nodes[-1].name = "twin"
    assert [site.name for site in find_sites(graph.model())] == ["twin->a", "twin->b"]


def test_an_activation_of_another_width_is_refused() -> None:
    graph = start()
    graph.linear("x", ones(6, 5), "y")
    with pytest.raises(GraphError, match="'y/MatMul' has a weight of 6 inputs and reads 8 channels"):
        find_sites(graph.model())


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


def test_a_table_stored_transposed_is_found() -> None:
    graph = TinyGraph()
    graph.input("input_ids", TensorProto.INT64, ["b", "t"])
    graph.constant("table", np.ascontiguousarray(TABLE.T))
    graph.node("Transpose", ["table"], ["swapped"], {"perm": [1, 0]})
    graph.node("Gather", ["swapped", "input_ids"], ["h"])
    assert find_embeddings(graph.model()) == (expected(transposed=True),)


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
