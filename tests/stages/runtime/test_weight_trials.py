"""Check that logits follow replaced weights, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto

from stages.errors import GraphError
from stages.model.directory import locate_model
from stages.model.load import load_graph
from stages.model.sites import find_sites
from stages.model.weights import read_weight
from stages.runtime.feeds import CausalFeeds
from stages.runtime.providers import CPU_ONLY, ProviderChoice
from stages.runtime.weight_trials import input_name, open_trials, with_weight_inputs
from tests.support.graphs import TinyGraph

CHOICE = ProviderChoice(names=CPU_ONLY, missing=())
TOKENS = np.array([[0, 5, 9, 17], [0, 33, 2, 250]])


def _base_logits(folder: Path) -> torch.Tensor:
    directory = locate_model(folder)
    session = ort.InferenceSession(str(directory.onnx_file), providers=["CPUExecutionProvider"])
    feeds = CausalFeeds.of(session, directory)
    return torch.from_numpy(np.asarray(session.run(["logits"], feeds(TOKENS))[0], np.float32))


@pytest.mark.parametrize(
    "model", ["tiny_model", "tiny_model_dml", pytest.param("tiny_model_bf16", marks=pytest.mark.slow)]
)
def test_logits_are_the_models_own_until_a_weight_is_replaced(model: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(model)
    directory, graph = locate_model(folder), load_graph(locate_model(folder))
    sites = find_sites(graph)
    with open_trials(graph, directory, sites, CHOICE) as trials:
        own = trials.logits(TOKENS)
        if model == "tiny_model":
            # float32 sums in another order; bfloat16 runs upcast and float16 needs position_ids, fed the same way.
            torch.testing.assert_close(own, _base_logits(folder), rtol=1e-4, atol=1e-4)
        down = next(site for site in sites if "layers.1/mlp/down_proj" in site.name)
        weight = read_weight(graph, down, torch.device("cpu"))
        assert torch.equal(trials.logits(TOKENS, [(down, weight)]), own)
        assert not torch.allclose(trials.logits(TOKENS, [(down, torch.zeros_like(weight))]), own, atol=1e-2)
        assert torch.equal(trials.logits(TOKENS), own)


def test_a_zeroed_head_gives_equal_logits(tiny_model: Path) -> None:
    directory, graph = locate_model(tiny_model), load_graph(locate_model(tiny_model))
    head = next(site for site in find_sites(graph) if site.feeds_logits)
    with open_trials(graph, directory, [head], CHOICE) as trials:
        zeros = torch.zeros(head.out_features, head.in_features)
        assert not trials.logits(TOKENS, [(head, zeros)]).any()


def test_the_base_graph_is_left_as_it_was(tiny_model: Path) -> None:
    graph = load_graph(locate_model(tiny_model))
    inputs = [value.name for value in graph.graph.inputs]
    sites = find_sites(graph)
    changed = with_weight_inputs(graph, sites[:1])
    assert [value.name for value in graph.graph.inputs] == inputs
    assert input_name(sites[0]) in [value.name for value in changed.graph.inputs]
    assert sites[0].weight in graph.graph.initializers
    assert sites[0].weight not in changed.graph.initializers


def test_a_model_that_stops_while_it_runs_is_a_message(tiny_model: Path) -> None:
    directory, graph = locate_model(tiny_model), load_graph(locate_model(tiny_model))
    with (
        open_trials(graph, directory, find_sites(graph)[:1], CHOICE) as trials,
        pytest.raises(GraphError, match=r"stops on CPUExecutionProvider \(.*\); leave --sensitivity measured out"),
    ):
        trials.logits(np.array([[100_000]]))


def test_a_model_without_logits_is_refused() -> None:
    graph = TinyGraph()
    graph.input("x", TensorProto.FLOAT, ["t", 4])
    graph.output(graph.linear("x", np.ones((4, 4), np.float32), "y"), TensorProto.FLOAT, ["t", 4])
    with pytest.raises(GraphError, match="no output 'logits'"):
        with_weight_inputs(graph.model(), ())
