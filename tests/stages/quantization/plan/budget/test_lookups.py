"""What formats cost the lookups of a table: measured on a model of one product, against float64 arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto

from stages.model.directory import locate_model
from stages.model.load import load_graph
from stages.model.sites import find_embeddings
from stages.quantization.plan.budget.lookups import LookupForecast
from stages.records.formats import PerBlock, QuantSpec
from tests.reference.rounding import round_trip
from tests.support.graphs import TinyGraph

TOKENS = np.random.default_rng(1).integers(0, 50, (3, 20))
TABLE = np.random.default_rng(0).standard_normal((50, 32), np.float32)
HEAD = np.random.default_rng(2).standard_normal((32, 50), np.float32) / 4
SPECS = {
    spec.label: spec
    for spec in (
        QuantSpec(bits=bits, symmetric=True, granularity=PerBlock(block_size=size), scale_dtype="float32")
        for bits, size in ((4, 32), (4, 16), (8, 32))
    )
}


@pytest.fixture(scope="module", params=[False, True])
def forecast(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LookupForecast:
    """A model whose table is stored as it is looked up, or behind a Transpose."""
    graph = TinyGraph()
    graph.input("input_ids", TensorProto.INT64, ["batch", "length"])
    data = graph.constant("table", np.ascontiguousarray(TABLE.T) if request.param else TABLE)
    if request.param:
        data = graph.node("Transpose", [data], ["turned"], {"perm": [1, 0]})
    rows = graph.node("Gather", [data, "input_ids"], ["rows"])
    graph.output(graph.linear(rows, HEAD, "logits"), TensorProto.FLOAT, ["batch", "length", 50])
    folder = tmp_path_factory.mktemp("model")
    directory = locate_model(graph.save(folder))
    return LookupForecast(model=load_graph(directory), directory=directory, windows=TOKENS, rule="full")


def rounded(spec: QuantSpec) -> np.ndarray:
    return round_trip(TABLE.astype(np.float64), spec.block_size(32), spec.bits, symmetric=True)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_in_nats_it_is_the_divergence_that_rounded_rows_cause(forecast: LookupForecast) -> None:
    (table,) = find_embeddings(forecast.model)
    losses = forecast.losses(table, SPECS, in_nats=True)
    base = log_softmax(TABLE[TOKENS].astype(np.float64) @ HEAD)
    for label, spec in SPECS.items():
        other = log_softmax(rounded(spec)[TOKENS] @ HEAD)
        expected = (np.exp(base) * (base - other)).sum(-1).mean()
        # Logits in float32, of which divergences of 1e-6 are a small difference.
        assert losses[label] == pytest.approx(expected, rel=1e-2, abs=1e-7)
    assert losses["4b32"] > losses["4b16"] > 50 * losses["8b32"]


def test_else_it_is_the_relative_error_of_the_rows_that_occur(forecast: LookupForecast) -> None:
    (table,) = find_embeddings(forecast.model)
    used = np.unique(TOKENS)
    for label, loss in forecast.losses(table, SPECS, in_nats=False).items():
        error = rounded(SPECS[label])[used] - TABLE[used]
        assert loss == pytest.approx(np.square(error).sum() / np.square(TABLE[used]).sum(), rel=1e-3)
