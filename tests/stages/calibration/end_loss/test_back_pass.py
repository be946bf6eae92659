"""Statistics weighted by the end loss, against gradients of the whole model at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stages.calibration.cache import CacheWriter
from stages.calibration.capture import Capture
from stages.calibration.end_loss.back_pass import EndLossPass, sampled_gradient
from stages.calibration.end_loss.sums import PROJECTIONS, ExpertChannels, WeightedGroup, token_weights, weight_names
from stages.calibration.on_disk.row_files import open_rows
from stages.calibration.on_disk.stream_files import StreamFiles
from stages.calibration.on_disk.unfinished import Unfinished
from stages.calibration.run import calibrate
from stages.calibration.statistics import unpack_symmetric
from stages.calibration.text.windows import TokenWindows
from stages.commands.calibrate_options import CalibrateConfig
from stages.model.directory import locate_model
from stages.model.load import load_graph
from stages.model.sites import find_groups
from stages.model.weights import read_weight
from stages.records.sites import ActivationGroup
from stages.runtime.blocks.chain import Chain, open_chain
from stages.runtime.blocks.cut import DecoderBlock, cut_block
from stages.runtime.blocks.experts import activated, route
from stages.runtime.blocks.module import BlockModule, SiteRun
from stages.runtime.blocks.stream import read_inputs
from stages.system.distributed import Processes
from tests.support.mixtures import EXPERTS, HIDDEN, mixture, the_layer
from tests.support.tiny_models import VOCABULARY

CPU = torch.device("cpu")
_TOKENS = np.random.default_rng(0).integers(2, VOCABULARY, (6, 80))
_CALIBRATION = 5


def _spelled_out(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Every site's input and the loss's gradient by its output, [windows * length, channels], from one big graph."""
    directory = locate_model(folder)
    model = load_graph(directory)
    chain = open_chain(model, find_groups(model))
    inputs = read_inputs(chain.graph, directory, _TOKENS, chain.links[0].stream_in, chain.shared, frozenset({6}))
    stream, runs = inputs.stream.requires_grad_(), {}
    for link in chain.links:
        weights = {site.name: read_weight(chain.graph, site, CPU) for site in link.sites}
        stream, of_link = chain.module(link, CPU).with_sites(stream, weights, inputs.shared[6])
        runs |= of_link
    by_logits = torch.stack(
        [sampled_gradient(window, torch.Generator().manual_seed(index)) for index, window in enumerate(stream.detach())]
    )
    gradients = torch.autograd.grad(stream, [run.gave for run in runs.values()], by_logits)
    read = {name: run.read.detach() for name, run in runs.items()}
    return read, dict(zip(runs, gradients, strict=True))


def _pass(folder: Path, scratch: Path, batch_size: int) -> tuple[EndLossPass, tuple[ActivationGroup, ...]]:
    directory = locate_model(folder)
    model = load_graph(directory)
    groups = find_groups(model)
    windows = TokenWindows(
        calibration=_TOKENS[:_CALIBRATION],
        held_out=_TOKENS[_CALIBRATION:],
        source="random",
        tokenizer="",
        fingerprint="",
    )
    chain: Chain = open_chain(model, groups)
    made = EndLossPass(
        chain=chain,
        directory=directory,
        groups=groups,
        windows=windows,
        batch_size=batch_size,
        device=CPU,
        streams=StreamFiles(
            folder=scratch,
            names=tuple(link.stream_in for link in chain.links),
            windows=len(_TOKENS),
            length=_TOKENS.shape[1],
        ),
        kept=frozenset(),
        unfinished=Unfinished(scratch / "cache", Processes(None)),
        processes=Processes(None),
        memory=0,
    )
    return made, groups


def test_they_are_those_of_the_whole_model_at_once(tiny_model: Path, tmp_path: Path) -> None:
    made, groups = _pass(tiny_model, tmp_path, batch_size=2)
    writer = CacheWriter.of(tmp_path, [group.activation for group in groups])
    made.fill(writer)
    read, gradients = _spelled_out(tiny_model)
    for group in groups:
        found = load_file(tmp_path / f"weighted-{writer.files[group.activation]}")
        names = [site.name for site in group.sites]
        joined = torch.cat([gradients[name] for name in names], dim=-1).double()
        weights = joined.square().mean(dim=-1).sqrt()
        weights *= weights[:_CALIBRATION].square().mean() / weights[:_CALIBRATION].mean()
        x = read[names[0]].double()
        for part, windows in (("calibration", slice(0, _CALIBRATION)), ("held_out", slice(_CALIBRATION, None))):
            rows = (x[windows] * weights[windows].sqrt().unsqueeze(-1)).flatten(0, 1)
            expected = rows.T @ rows / len(rows)
            if f"{part}.rows" in found:
                kept = found[f"{part}.rows"].double()
                gram = kept.T @ kept / len(rows)
            else:
                gram = unpack_symmetric(found[f"{part}.gram_triangle"]).double()
            # Float32 sums in another order.
            torch.testing.assert_close(gram, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
        expected = weights.float()
        torch.testing.assert_close(found["calibration.weights"], expected[:_CALIBRATION], rtol=1e-4, atol=0)
        torch.testing.assert_close(found["held_out.weights"], expected[_CALIBRATION:], rtol=1e-4, atol=0)
        counts = [gradients[name][:_CALIBRATION].double().square().flatten(0, 1).mean(dim=0) for name in names]
        mean = torch.cat(counts).mean()
        for name, count in zip(names, counts, strict=True):
            torch.testing.assert_close(found[f"channels of {name}"].double(), count / mean, rtol=1e-4, atol=0)


def test_what_enters_layers_comes_from_the_plain_pass(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CalibrateConfig(onnx_path=tiny_model, use_random_calib=True, calib_size=5, seq_len=80, batch_size=2)
    computed: list[Sequence[int]] = []
    complete = EndLossPass._complete

    def noted(self: EndLossPass, lacking: Sequence[int], left: int, advance: Callable[[int], None]) -> object:
        computed.append(lacking)
        return complete(self, lacking, left, advance)

    monkeypatch.setattr(EndLossPass, "_complete", noted)
    calibrate(replace(config, cache_dir=tmp_path / "kept"))
    monkeypatch.setattr(Capture, "_kept_streams", {})
    calibrate(replace(config, cache_dir=tmp_path / "computed"))
    # The tiny model has two layers; what enters the first and the head is no value of the graph, or an embedding.
    assert computed == [(0, 2), (0, 1, 2)]
    files = sorted((tmp_path / "kept").glob("weighted-*"))
    assert files
    for file in files:
        kept, again = load_file(file), load_file(tmp_path / "computed" / file.name)
        for name in kept:
            # ONNX Runtime and torch sum in another order.
            limit = 1e-3 * float(again[name].abs().max())
            torch.testing.assert_close(kept[name], again[name], rtol=0, atol=limit)


def test_experts_channels_weigh_what_gradients_of_all_experts_on_all_tokens_say(tmp_path: Path) -> None:
    """Against a mixture in which every expert sees every token, by a weight that is 0 where it wasn't chosen."""
    model, tokens = mixture().model(), 30
    layer = the_layer(model)
    generator = torch.Generator().manual_seed(3)
    x, scores = (torch.randn(tokens, size, generator=generator) for size in (HIDDEN, EXPERTS))
    behind = torch.randn(tokens, HIDDEN, generator=generator)
    weights = {site.name: read_weight(model, site, CPU) for site in layer.sites}
    block = DecoderBlock(layer=0, stream_in="x", stream_out="y", sites=layer.sites)
    module = BlockModule(cut_block(model, block), CPU)
    writer = CacheWriter.of(tmp_path, [], weight_names(layer))
    projections = [ExpertChannels(layer=layer, projection=projection) for projection in PROJECTIONS]
    sums: list[torch.Tensor] = []
    for chunk in (slice(0, 27), slice(27, 30)):  # of three tokens not every expert sees one
        given, runs = module.with_sites(x[chunk][None].requires_grad_(), weights, {"scores": scores[chunk]})
        gradients = torch.autograd.grad(given, [run.gave for run in runs.values()], behind[chunk][None])
        added = [each.added_by(dict(zip(runs, gradients, strict=True))) for each in projections]
        sums = [before + more for before, more in zip(sums, added, strict=True)] if sums else added
    for each, found in zip(projections, sums, strict=True):
        each.save(writer, found, tokens)
    routed = route(scores, layer.routing)
    share = torch.zeros(tokens, EXPERTS).scatter(1, routed.experts, routed.weights)
    bias = model.graph.initializers["gate_up.bias"].const_value
    assert bias is not None
    for index in range(EXPERTS):
        fc1, fc2 = (weights[layer.of(projection)[index].name] for projection in PROJECTIONS)
        first = (x @ fc1.T + torch.from_numpy(bias.numpy()[index].copy())).requires_grad_()
        second = activated(first, layer.activation) @ fc2.T
        found = torch.autograd.grad(share[:, index : index + 1] * second, [first, second], behind)
        for projection, gradient in zip(PROJECTIONS, found, strict=True):
            channels = open_rows(tmp_path / writer.rows[layer.channel_weights(projection)])["calibration"][index]
            expected = gradient.square().mean(dim=0)
            torch.testing.assert_close(torch.from_numpy(channels.copy()), expected, rtol=1e-4, atol=1e-7)


def test_labels_give_the_fisher_information_of_the_model() -> None:
    """E g g^T = diag(p) - p p^T, the second derivative of the divergence; 40,000 draws, five standard errors."""
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5])
    generator = torch.Generator().manual_seed(0)
    draws = sampled_gradient(logits.expand(40_000, 4).clone(), generator)
    p = torch.softmax(logits, dim=-1)
    torch.testing.assert_close(draws.T @ draws / len(draws), torch.diag(p) - torch.outer(p, p), rtol=0, atol=0.0125)
    assert draws.mean(dim=0).abs().max() < 0.0125


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5)])
def test_a_token_weighs_its_root_mean_squared_gradient(shape: tuple[int, ...]) -> None:
    gradient = torch.randn(shape)
    expected = torch.tensor([(float(row.square().sum()) / 5) ** 0.5 for row in gradient.reshape(-1, 5)])
    torch.testing.assert_close(token_weights(gradient).flatten(), expected)


def test_a_parallel_mlp_that_is_no_number_of_heads_has_no_matrix_of_heads(tiny_model: Path, tmp_path: Path) -> None:
    _, groups = _pass(tiny_model, tmp_path, batch_size=2)
    qkv = next(group for group in groups if "qkv_proj" in group.sites[0].name)
    mlp = replace(qkv.sites[0], name="/model/layers.0/mlp/up_proj/MatMul", out_features=90)
    both = WeightedGroup(group=replace(qkv, sites=(*qkv.sites, mlp)), head_size=16)
    numbers = {site.name: torch.randn(1, 4, site.out_features) for site in both.group.sites}
    runs = {name: SiteRun(read=torch.randn(1, 4, qkv.in_features), gave=gave) for name, gave in numbers.items()}
    added = both.added_by(runs, numbers, "calibration")
    shapes = {name: tuple(each.shape) for name, each in added.items() if name.startswith("outputs")}
    assert shapes == {f"outputs of {qkv.sites[0].name}": (8, 16, 16)}
