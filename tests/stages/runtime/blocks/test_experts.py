"""Routing and experts in torch give what ONNX Runtime's MoE gives."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from stages.errors import GraphError
from stages.model.weights import read_weight, to_torch
from stages.runtime.blocks.cut import DecoderBlock, cut_block
from stages.runtime.blocks.experts import activated, route
from tests.support.mixtures import EXPERTS, HIDDEN, KINDS, mixture, run_mixture, the_layer

TOKENS = 40


def bias(model: ir.Model, name: str) -> Tensor:
    stored = model.graph.initializers[name].const_value
    assert stored is not None
    return to_torch(stored.numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_torch_gives_what_the_runtime_gives(kind: str) -> None:
    model = mixture(KINDS[kind]).model()
    layer, rng = the_layer(model), np.random.default_rng(5)
    x = 3 * rng.standard_normal((TOKENS, HIDDEN)).astype(np.float32)
    scores = rng.standard_normal((TOKENS, EXPERTS)).astype(np.float32)
    fc1, fc2 = ([read_weight(model, site, torch.device("cpu")) for site in layer.sites[part::2]] for part in (0, 1))
    bias1, bias2 = bias(model, "gate_up.bias"), bias(model, "down.bias")
    routed, found = route(torch.from_numpy(scores), layer.routing), torch.zeros(TOKENS, HIDDEN)
    for place in range(routed.experts.shape[1]):
        for token, expert in enumerate(routed.experts[:, place].tolist()):
            hidden = torch.from_numpy(x[token : token + 1]) @ fc1[expert].T + bias1[expert]
            output = activated(hidden, layer.activation) @ fc2[expert].T + bias2[expert]
            found[token] += routed.weights[token, place] * output[0]
    assert np.allclose(found.numpy(), run_mixture(model, x, scores), rtol=1e-4, atol=1e-5)


def test_a_block_with_experts_is_refused_before_they_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = mixture()
    graph.inputs[0].name, graph.nodes[0].name = "input_ids", "/model/layers.0/moe/MoE"
    graph.nodes[0].input[0] = "input_ids"
    model = graph.model()
    layer = the_layer(model)
    monkeypatch.setattr("stages.runtime.blocks.cut._in_memory", lambda _: pytest.fail("numbers were copied"))
    block = DecoderBlock(layer=0, stream_in="input_ids", stream_out=layer.output, sites=())
    with pytest.raises(GraphError, match=r"Layer 0 holds the experts of '/model/layers\.0/moe/MoE'"):
        cut_block(model, block)
