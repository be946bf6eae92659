"""Scales trained on the answers of the whole model, against one big graph of gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stages.model.directory import locate_model
from stages.model.load import load_graph
from stages.model.sites import find_groups
from stages.model.weights import read_weight
from stages.quantization.blocks.distill import QuantizedChain, TrainedScales, divergence_and_gradient
from stages.quantization.blocks.learnable_weight import effective_weight
from stages.quantization.search.affine import choose_parameters, join, quantize, split
from stages.records.formats import PerBlock, QuantSpec
from stages.records.results import QuantizedWeight
from stages.records.sites import MatMulSite
from stages.runtime.blocks.chain import open_chain
from stages.runtime.blocks.stream import read_inputs
from tests.stages.quantization.search.problems import site
from tests.support.tiny_models import VOCABULARY

CPU = torch.device("cpu")
_TOKENS = np.random.default_rng(0).integers(2, VOCABULARY, (3, 24))


def _rounded(
    of: MatMulSite, weight: torch.Tensor, *, symmetric: bool, input_scale: torch.Tensor | None = None
) -> QuantizedWeight:
    spec = QuantSpec(bits=4, symmetric=symmetric, granularity=PerBlock(block_size=16), scale_dtype="float32")
    blocks = split(weight if input_scale is None else weight * input_scale, 16)
    parameters = choose_parameters(blocks, spec)
    codes = join(quantize(blocks, parameters, spec), weight.shape[1])
    zeros = parameters.zero_points
    return QuantizedWeight(
        site=of,
        spec=spec,
        codes=codes.to(spec.code_dtype),
        scales=parameters.scales,
        zero_points=None if zeros is None else zeros.to(torch.uint8),
        input_scale=input_scale,
    )


def _quantized_chain(folder: Path, batch_size: int) -> tuple[QuantizedChain, dict[str, QuantizedWeight]]:
    """Return the chain with every site quantized: with zero points, without, and with an input scale in turn."""
    directory = locate_model(folder)
    model = load_graph(directory)
    chain = open_chain(model, find_groups(model))
    weights: dict[str, QuantizedWeight] = {}
    for index, each in enumerate(each for link in chain.links for each in link.sites):
        original = read_weight(chain.graph, each, CPU)
        scale = torch.rand(each.in_features) + 0.5 if index % 3 == 2 else None
        weights[each.name] = _rounded(each, original, symmetric=index % 3 == 1, input_scale=scale)
    head = {site.name for site in chain.links[-1].sites}
    made = QuantizedChain(
        chain=chain,
        directory=directory,
        fixed={name: weight for name, weight in weights.items() if name in head},
        trained={name: TrainedScales(weight, CPU) for name, weight in weights.items() if name not in head},
        batch_size=batch_size,
        device=CPU,
    )
    return made, weights


def test_gradients_are_those_of_the_whole_model_at_once(tiny_model: Path) -> None:
    made, weights = _quantized_chain(tiny_model, batch_size=3)
    (batch,) = made.inputs(_TOKENS)
    made.take_gradients(batch)
    chain = made.chain
    read = read_inputs(chain.graph, made.directory, _TOKENS, chain.links[0].stream_in, chain.shared, frozenset({3}))
    exact = tuned = read.stream
    logs = {name: torch.zeros_like(scales.logs).requires_grad_() for name, scales in made.trained.items()}
    for link in chain.links:
        module = chain.module(link, CPU)
        originals = {site.name: read_weight(chain.graph, site, CPU) for site in link.sites}
        found: dict[str, torch.Tensor] = {}
        for name, original in originals.items():
            found[name] = effective_weight(weights[name], CPU)
            if name in logs:
                found[name] = found[name] * logs[name].exp().repeat_interleave(16, dim=1)[:, : original.shape[1]]
        exact, tuned = module(exact, originals, read.shared[3]), module(tuned, found, read.shared[3])
    loss = torch.nn.functional.kl_div(
        torch.log_softmax(tuned, -1), torch.log_softmax(exact, -1), log_target=True, reduction="none"
    )
    total = loss.sum(-1).mean()
    expected = torch.autograd.grad(total, list(logs.values()))
    assert made.divergence(_TOKENS) == pytest.approx(float(total.detach()), rel=1e-5)
    for scales, gradient in zip(made.trained.values(), expected, strict=True):
        assert scales.logs.grad is not None
        torch.testing.assert_close(scales.logs.grad, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_judging_takes_no_gradient(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = _quantized_chain(tiny_model, batch_size=3)
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: pytest.fail("a gradient is taken"))
    assert made.divergence(_TOKENS) > 0


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_it_begins_at_the_weight_and_stores_what_it_computes_with(symmetric: bool, scaled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 40, generator=generator)  # two whole blocks and one cut short
    start = _rounded(
        site("site", 6, 40), weight, symmetric=symmetric, input_scale=torch.rand(40) + 0.5 if scaled else None
    )
    trained = TrainedScales(start, CPU)
    torch.testing.assert_close(trained.weight(), effective_weight(start, CPU), rtol=1e-6, atol=0)
    with torch.no_grad():
        trained.logs.copy_(0.1 * torch.randn(trained.logs.shape, generator=generator))
    stored = trained.quantized(trained.logs.detach())
    torch.testing.assert_close(effective_weight(stored, CPU), trained.weight(), rtol=1e-6, atol=0)
    assert torch.equal(stored.codes, start.codes)
    assert not torch.equal(stored.scales, start.scales)


def test_divergence_is_the_sum_over_the_vocabulary_with_its_gradient() -> None:
    exact, found = torch.randn(2, 3, 5), torch.randn(2, 3, 5).requires_grad_()
    p, q = exact.softmax(-1), found.softmax(-1)
    expected = [[sum(float(a * (a / b).log()) for a, b in zip(x, y, strict=True)) for x, y in zip(*rows, strict=True)]
                for rows in zip(p, q.detach(), strict=True)]  # fmt: skip
    losses, gradient = divergence_and_gradient(exact, found.detach())
    torch.testing.assert_close(losses, torch.tensor(expected))
    written_out = (p * (p / q).log()).sum()
    torch.testing.assert_close(gradient, *torch.autograd.grad(written_out, found))
