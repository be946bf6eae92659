"""A MoE node as a torch module gives what ONNX Runtime's gives, by matrices that are sites of its block."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from stages.errors import GraphError
from stages.model.weights import read_weight
from stages.runtime.blocks.cut import DecoderBlock, cut_block
from stages.runtime.blocks.experts import route
from stages.runtime.blocks.module import BlockModule
from tests.support.graphs import TinyGraph
from tests.support.mixtures import EXPERTS, GPT_OSS, HIDDEN, INNER, KINDS, mixture, run_mixture, the_layer

TOKENS = 40
CPU = torch.device("cpu")
RNG = np.random.default_rng(5)
X = 3 * RNG.standard_normal((TOKENS, HIDDEN)).astype(np.float32)
SCORES = RNG.standard_normal((TOKENS, EXPERTS)).astype(np.float32)


def module_of(model: ir.Model) -> tuple[BlockModule, dict[str, torch.Tensor]]:
    layer = the_layer(model)
    block = DecoderBlock(layer=0, stream_in=layer.tokens, stream_out=layer.output, sites=layer.sites)
    return BlockModule(cut_block(model, block), CPU), {site.name: read_weight(model, site, CPU) for site in layer.sites}


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_torch_gives_what_the_runtime_gives(kind: str, biased: bool) -> None:
    model = mixture(KINDS[kind], biased=biased).model()
    module, weights = module_of(model)
    found = module(torch.from_numpy(X)[None], weights, {"scores": torch.from_numpy(SCORES)})
    assert np.allclose(found[0].numpy(), run_mixture(model, X, SCORES), rtol=1e-4, atol=1e-5)


def test_every_expert_says_which_tokens_it_read_and_gradients_reach_them_and_the_scores() -> None:
    model = mixture().model()
    module, weights = module_of(model)
    x, scores = torch.from_numpy(X).requires_grad_(), torch.from_numpy(SCORES.copy())
    scores[:, 3] = -100
    behind, runs = module.with_sites(x[None], weights, {"scores": scores.requires_grad_()})
    layer = the_layer(model)
    routed = route(scores, layer.routing)
    for site in layer.sites:
        assert site.expert is not None
        index = site.expert.index
        if index == 3:
            assert site.name not in runs
            continue
        tokens = torch.nonzero((routed.experts == index).any(dim=1)).flatten()
        assert torch.equal(runs[site.name].tokens, tokens)
        assert runs[site.name].read.shape == (len(tokens), HIDDEN if site.expert.projection == "fc1" else INNER)
        if site.expert.projection == "fc1":
            assert torch.equal(runs[site.name].read, x[tokens])
    gave = [run.gave for run in runs.values()]
    of_x, of_scores, *of_experts = torch.autograd.grad(behind.sum(), [x, scores, *gave])
    assert all(bool(gradient.any()) for gradient in (of_x, of_scores, *of_experts))


def test_experts_that_are_no_sites_are_refused_with_the_reason_before_they_are_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph: TinyGraph = mixture({**GPT_OSS, "activation_type": "geglu"})
    graph.inputs[0].name, graph.nodes[0].name = "input_ids", "/model/layers.0/moe/MoE"
    graph.nodes[0].input[0] = "input_ids"
    monkeypatch.setattr("stages.runtime.blocks.cut._in_memory", lambda _: pytest.fail("numbers were copied"))
    block = DecoderBlock(layer=0, stream_in="input_ids", stream_out="y", sites=())
    with pytest.raises(GraphError, match=r"experts of '/model/layers\.0/moe/MoE'.*: its activation is unknown here;"):
        cut_block(graph.model(), block)
