"""Each matrix of each expert of a MoE node is a site; what can't be one is left with a reason."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from stages.model.sites import find_expert_layers, why_no_sites
from stages.model.weights import read_weight
from stages.records.experts import ExpertActivation, Routing
from stages.records.sites import kind_of
from tests.support.graphs import MICROSOFT, TinyGraph
from tests.support.mixtures import EXPERTS, HIDDEN, INNER, KINDS, mixture, the_layer


def test_every_matrix_of_every_expert_is_a_site() -> None:
    layer = the_layer(mixture().model())
    assert (layer.tokens, layer.scores, layer.fc1_bias, layer.fc2_bias) == ("x", "scores", "gate_up.bias", "down.bias")
    alpha = float(np.float32(1.702))
    assert layer.activation == ExpertActivation(kind="swiglu", gate="interleaved", alpha=alpha, beta=1.0, limit=7.0)
    assert layer.routing == Routing(top_k=2, over_chosen=True)
    assert [site.name for site in layer.sites][:3] == [
        "y/experts.0/gate_up_proj",
        "y/experts.0/down_proj",
        "y/experts.1/gate_up_proj",
    ]
    assert [(site.in_features, site.out_features) for site in layer.sites[:2]] == [
        (HIDDEN, 2 * INNER),
        (INNER, HIDDEN),
    ]
    assert len({site.output for site in layer.sites}) == len({g.activation for g in layer.groups}) == 2 * EXPERTS
    assert {kind_of(site.name) for site in layer.sites} == {"y/experts.*/gate_up_proj", "y/experts.*/down_proj"}


def test_a_site_reads_its_own_experts_matrix() -> None:
    model = mixture(dtype=np.float16).model()
    layer = the_layer(model)
    table = model.graph.initializers["down.weight"].const_value
    assert table is not None
    for site in layer.sites[1::2]:
        assert site.expert is not None
        found = read_weight(model, site, torch.device("cpu"))
        assert np.array_equal(found.numpy(), table.numpy()[site.expert.index].astype(np.float32))


def test_nodes_without_a_gate_are_called_up_and_down() -> None:
    layer = the_layer(mixture(KINDS["silu"]).model())
    assert layer.activation.gate == "none"
    assert layer.sites[0].name.endswith("experts.0/up_proj")


def lone(change: dict[str, int | float | str | list[int]], extra: tuple[str, ...] = ()) -> ir.Node:
    graph = mixture({**KINDS["silu"], **change})
    names = [graph.constant(name, np.ones((EXPERTS, INNER, HIDDEN), np.float32)) for name in extra]
    graph.nodes[0].input.extend(names)
    return next(iter(graph.model().graph))


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (lone({}, ("fc3",)), "third projection"),
        (lone({"swiglu_limit_after_activation": 1}), "swiglu_limit_after_activation"),
        (lone({"activation_type": "tanh"}), "activation is unknown"),
    ],
    ids=["fc3", "attribute", "activation"],
)
def test_what_cant_be_sites_has_a_reason(node: ir.Node, reason: str) -> None:
    assert reason in why_no_sites(node)


def test_experts_that_something_else_reads_or_computes_are_no_sites() -> None:
    graph = mixture()
    graph.node("Identity", ["down.weight"], ["copy"])
    assert find_expert_layers(graph.model()) == ()
    graph = TinyGraph()
    for name in ("x", "scores", "fc1", "fc2"):
        graph.input(name, 1, ["a", "b", "c"])
    graph.node("MoE", ["x", "scores", "fc1", "", "fc2"], ["y"], {"k": 1}, MICROSOFT)
    assert find_expert_layers(graph.model()) == ()
