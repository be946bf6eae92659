"""Weigh every token at every site by what an error there does to the model's answers: one backward pass.

With g the gradient of the loss by a site's output y = x W^T, an error D of its weight changes the loss by g D x^T in
first order. For labels drawn from the model itself, half the mean of its square is the second-order term of the
Kullback-Leibler divergence (the Fisher information). With g's channels taken as independent that is tr(D H D^T) / 2
nats a token with H = mean over tokens of s x^T x and s = mean over channels of g^2: a Gram matrix whose tokens are
weighted, which every search takes in place of the plain one. (Kim et al., "GuidedQuant: Large Language Model
Quantization via Exploiting End Loss Guidance", 2025, https://arxiv.org/abs/2505.07004, with the labels of Tseng et al.,
"Model-Preserving Adaptive Rounding", 2025, https://arxiv.org/abs/2505.22988.) Sites that read one activation share s:
Gram matrices of their own gain nothing. Few tokens have most of s, and which ones depends on the labels; its root, of
the same mean, generalizes better and takes its place.

Experts don't take s: on trained weights it ended with 5 % more divergence than their tokens' weights in the mixture.
Of them only the squared gradient of each output channel is kept, so that budgets know in nats what errors cost.

Channels that enter attention are far from independent: the gradient by a query lies where the keys are. So the outputs
of those sites have a Gram matrix of their own for each head, the Kronecker factor of Tseng et al.

The model runs as a chain of torch blocks. What enters each block is kept in files, by the pass that takes the plain
statistics as far as the graph names it; everything else is computed again on the way back, so memory holds one block
and two streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stages.calibration.cache import CacheWriter
from stages.calibration.on_disk.row_files import RowsWriter
from stages.calibration.on_disk.stream_files import StreamFiles
from stages.calibration.statistics import StatisticsAccumulator, StatisticsSize, scaled
from stages.calibration.text.windows import TokenWindows
from stages.commands.progress import progress_bar
from stages.model.absorbers import attention_head_sizes
from stages.model.directory import ModelDirectory
from stages.model.weights import read_weight
from stages.records.experts import ExpertLayer
from stages.records.results import ActivationStats, SearchStats, TokenWeights
from stages.records.sites import ActivationGroup, MatMulSite, Projection
from stages.runtime.blocks.chain import Chain
from stages.runtime.blocks.cut import DecoderBlock
from stages.runtime.blocks.module import SiteRun
from stages.runtime.blocks.stream import BlockRunner, in_batches, read_inputs, sizes_of_batches

_FLOAT32_BYTES = 4
_SMALLEST = 1e-30
"""Least weight that is divided by."""
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
_TO_DIAGONAL = 1 / 3
"""The part of a head's Gram matrix that counts every channel by itself; results hardly change between 0.2 and 0.5."""


def weight_names(layer: ExpertLayer) -> list[str]:
    """Return the names under which a cache keeps how much the output channels of a node's experts count."""
    return [layer.channel_weights(projection) for projection in PROJECTIONS]


def token_weights(gradient: Float[Tensor, "*tokens N"]) -> Float[Tensor, "*tokens"]:
    """Return the root of s, the mean over a site's output channels of the loss's squared gradient, for every token."""
    return gradient.square().mean(dim=-1).sqrt()


def shrunk_to_diagonal(grams: Float[Tensor, "*heads size size"], share: float) -> Float[Tensor, "*heads size size"]:
    """Return (1 - share) H + share diag(H), with a positive diagonal, so that it can be factored.

    Args:
        grams: H, a Gram matrix for each head.
        share: the part that is diagonal.
    """
    diagonal = torch.diagonal(grams, dim1=-2, dim2=-1)
    floor = (1e-6 * diagonal.mean()).clamp_min(_SMALLEST)
    return (1 - share) * grams + torch.diag_embed(share * diagonal + floor)


def sampled_gradient(logits: Float[Tensor, "*tokens V"], generator: torch.Generator) -> Float[Tensor, "*tokens V"]:
    """Return the gradient by the logits of the summed cross entropy with labels drawn from the model: p - onehot.

    Args:
        logits: the model's.
        generator: draws the labels, on the device of the logits.
    """
    probabilities = torch.softmax(logits, dim=-1)
    # One number a token; multinomial draws one for each entry of the vocabulary, which takes far longer.
    reached = probabilities.cumsum(dim=-1)
    drawn = torch.rand(*logits.shape[:-1], 1, generator=generator, device=logits.device) * reached[..., -1:]
    labels = torch.searchsorted(reached, drawn, right=True).clamp_max(logits.shape[-1] - 1)
    return probabilities.scatter_add_(-1, labels, -torch.ones_like(labels, dtype=probabilities.dtype))


def _numbers(site: MatMulSite) -> float:
    """Return how many of a site's weights multiply a token."""
    return site.in_features * site.out_features * (1.0 if site.expert is None else site.expert.share)


@dataclass(frozen=True, slots=True, kw_only=True)
class EndLossPass:
    """A model as a chain, the windows that it runs on, and the activations whose weighted statistics are wanted."""

    chain: Chain
    directory: ModelDirectory
    groups: tuple[ActivationGroup, ...]
    windows: TokenWindows
    batch_size: int
    device: torch.device
    streams: StreamFiles
    """What enters the links, as far as it is there already: all windows, the held-out ones last."""
    layers: tuple[ExpertLayer, ...] = ()
    """Those whose experts' output channels are wanted."""

    def fill(self, writer: CacheWriter) -> None:
        """Run all windows back, and save every site's weighted statistics.

        Raises:
            UserError: the streams can't be kept beside the cache.
        """
        links = self.chain.links
        lacking = [place for place in range(len(links)) if not self.streams.has(place)]
        costs = [sum(_numbers(site) for site in link.sites) for link in links]
        passes = [costs[place - 1] for place in lacking if place] + [2 * cost for cost in costs]
        with progress_bar() as bar:
            task = bar.add_task("token weights", total=sum(passes), steps=len(passes), unit="layers")
            shared, gradient = self._complete(lacking, lambda place: bar.advance(task, costs[place])), None
            for place in reversed(range(len(links))):
                gradient = self._back(writer, place, self.streams.take(place), gradient, shared)
                bar.advance(task, 2 * costs[place])

    def _complete(self, lacking: Sequence[int], advance: Callable[[int], None]) -> Mapping[int, Mapping[str, Tensor]]:
        """Compute what enters the links at ``lacking``; return the values that links read beside it, by batch size.

        Args:
            lacking: places in the chain, in order.
            advance: called with the place of each link that was run.
        """
        tokens = np.concatenate([self.windows.calibration, self.windows.held_out])
        sizes = sizes_of_batches(len(self.windows.calibration), len(self.windows.held_out), self.batch_size)
        first = self.chain.links[0].stream_in
        inputs = read_inputs(self.chain.graph, self.directory, tokens, first, self.chain.shared, sizes)
        for place in lacking:
            if place == 0:
                self.streams.keep(0, 0, inputs.stream)
                continue
            run, weights = self._loaded(self.chain.links[place - 1], inputs.shared)
            self.streams.keep(place, 0, run.over(self.streams.read(place - 1), weights))
            advance(place - 1)
        return inputs.shared

    def _back(
        self,
        writer: CacheWriter,
        place: int,
        stream: Tensor,
        gradient: Tensor | None,
        shared: Mapping[int, Mapping[str, Tensor]],
    ) -> Tensor:
        """Save the statistics of one link's sites; return the loss's gradient by what enters it.

        Args:
            writer: the cache.
            place: of the link in the chain.
            stream: what enters it, all windows.
            gradient: by what leaves it; None behind the head, where labels are drawn.
            shared: the values that it reads beside the stream, by batch size.
        """
        link = self.chain.links[place]
        run, weights = self._loaded(link, shared)
        sums, of_experts = self._sums(link), self._of_experts(link)
        before = torch.empty_like(stream)
        for batch, part in self._batches():
            entering = stream[batch].to(self.device).requires_grad_()
            leaving, runs = run.with_sites(entering, weights)
            behind = self._of_labels(leaving, batch) if gradient is None else gradient[batch].to(self.device)
            names = list(runs)
            wanted = [entering, *(runs[name].gave for name in names)]
            of_stream, *of_sites = torch.autograd.grad(leaving, wanted, behind)
            before[batch] = of_stream.cpu()
            gradients = dict(zip(names, of_sites, strict=True))
            for each in sums:
                each.add(runs, gradients, part)
            if part == "calibration":
                for mixture in of_experts:
                    mixture.add(gradients)
        for each in sums:
            writer.write_weighted(each.group.activation, each.finish())
        for mixture in of_experts:
            mixture.save(writer, self.windows.calibration.size)
        return before

    def _of_labels(self, logits: Tensor, batch: Tensor) -> Tensor:
        """Return the gradient by the logits; a window's labels don't depend on the batch that it is in."""
        parts = []
        for window, values in zip(batch.tolist(), logits.detach(), strict=True):
            generator = torch.Generator(self.device).manual_seed(window)
            parts.append(sampled_gradient(values, generator))
        return torch.stack(parts)

    def _loaded(
        self, link: DecoderBlock, shared: Mapping[int, Mapping[str, Tensor]]
    ) -> tuple[BlockRunner, dict[str, Tensor]]:
        weights = {site.name: read_weight(self.chain.graph, site, self.device) for site in link.sites}
        module = self.chain.module(link, self.device)
        return BlockRunner(module=module, shared=shared, batch_size=self.batch_size), weights

    def _batches(self) -> Iterator[tuple[Tensor, str]]:
        """Yield the indices of some windows of one part, and its name."""
        count = len(self.windows.calibration)
        for batch in in_batches(count, self.batch_size):
            yield batch, "calibration"
        for batch in in_batches(len(self.windows.held_out), self.batch_size):
            yield batch + count, "held_out"

    def _of_experts(self, link: DecoderBlock) -> list[_ExpertChannels]:
        inside = (layer for layer in self.layers if set(layer.sites) <= set(link.sites))
        return [_ExpertChannels.of(layer, projection) for layer in inside for projection in PROJECTIONS]

    def _sums(self, link: DecoderBlock) -> list[_WeightedSums]:
        """Return empty sums for every activation that this link's sites read."""
        counts = {"calibration": self.windows.calibration.size, "held_out": self.windows.held_out.size}
        inside = (group for group in self.groups if set(group.sites) <= set(link.sites))
        heads = attention_head_sizes(self.groups)
        return [_WeightedSums.of(group, counts, heads.get(group.activation), self.device) for group in inside]


@dataclass(frozen=True, slots=True, kw_only=True)
class _WeightedSums:
    """Sums over the tokens of one activation."""

    group: ActivationGroup
    statistics: Mapping[str, StatisticsAccumulator]
    """By part of the text."""
    weights: Mapping[str, list[Tensor]]
    """By part: those of each batch's tokens, [batch, length]."""
    channels: Mapping[str, Tensor]
    """By site: the squared gradient of the loss by each output channel, summed over the calibration text, [N]."""
    outputs: Mapping[str, Tensor]
    """By site that feeds attention: g^T g of every head, summed over the calibration text, [heads, size, size]."""

    @classmethod
    def of(
        cls, group: ActivationGroup, counts: Mapping[str, int], head_size: int | None, device: torch.device
    ) -> _WeightedSums:
        """Return empty sums.

        Args:
            group: the sites that read the activation.
            counts: tokens by part.
            head_size: channels of a head where the sites feed attention.
            device: where sums live.
        """
        statistics = {
            part: StatisticsAccumulator(
                group.activation,
                StatisticsSize(in_features=group.in_features, tokens=tokens, itemsize=_FLOAT32_BYTES),
                device,
            )
            for part, tokens in counts.items()
        }
        channels = {site.name: torch.zeros(site.out_features, dtype=torch.float64) for site in group.sites}
        outputs: dict[str, Tensor] = {}
        for site in group.sites:
            # In a parallel block the MLP reads the same activation, and its width may be no number of heads.
            if head_size is not None and site.out_features % head_size == 0:
                outputs[site.name] = torch.zeros(site.out_features // head_size, head_size, head_size, device=device)
        return cls(
            group=group,
            statistics=statistics,
            weights={part: [] for part in counts},
            channels=channels,
            outputs=outputs,
        )

    def add(self, runs: Mapping[str, SiteRun], gradients: Mapping[str, Tensor], part: str) -> None:
        """Add a batch of ``part``, given what each site read and the loss's gradient by what it gave."""
        weights = token_weights(torch.cat([gradients[name] for name in self.channels], dim=-1))
        read = runs[self.group.sites[0].name].read.detach()
        self.weights[part].append(weights.cpu())
        self.statistics[part].add(read * weights.sqrt().unsqueeze(-1))
        if part == "calibration":
            for name, sums in self.channels.items():
                sums += gradients[name].square().flatten(0, -2).sum(dim=0).double().cpu()
            for name, gram in self.outputs.items():
                relative = gradients[name] / weights.clamp_min(_SMALLEST).unsqueeze(-1)
                heads = relative.reshape(-1, *gram.shape[:2]).transpose(0, 1)
                gram.baddbmm_(heads.transpose(1, 2), heads)

    def finish(self) -> SearchStats:
        """Return the statistics; nothing can be added afterwards."""
        weights = {part: torch.cat(batches) for part, batches in self.weights.items()}
        squared = float(weights["calibration"].double().square().mean())
        factor = squared / max(float(weights["calibration"].double().mean()), _SMALLEST)
        tokens = {part: scaled(accumulator.finish(), factor) for part, accumulator in self.statistics.items()}
        mean = torch.cat(list(self.channels.values())).mean().clamp_min(_SMALLEST)
        return SearchStats(
            tokens=ActivationStats(**tokens),
            channel_weights={name: (sums / mean).float() for name, sums in self.channels.items()},
            token_weights=TokenWeights(**{part: factor * each for part, each in weights.items()}),
            output_grams={
                name: shrunk_to_diagonal(gram.cpu() / tokens["calibration"].num_tokens, _TO_DIAGONAL)
                for name, gram in self.outputs.items()
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _ExpertChannels:
    """How much output channels count in one projection of a node's experts."""

    layer: ExpertLayer
    projection: Projection
    channels: Tensor
    """The squared gradient of the loss by each of them, summed over the calibration text, [E, N]."""

    @classmethod
    def of(cls, layer: ExpertLayer, projection: Projection) -> _ExpertChannels:
        """Return empty sums."""
        sites = layer.of(projection)
        sums = torch.zeros(len(sites), sites[0].out_features, dtype=torch.float64)
        return cls(layer=layer, projection=projection, channels=sums)

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        """Add a batch, given the loss's gradient by what each expert gave."""
        for sums, site in zip(self.channels, self.layer.of(self.projection), strict=True):
            if site.name in gradients:
                sums += gradients[site.name].square().sum(dim=0).double().cpu()

    def save(self, writer: CacheWriter, tokens: int) -> None:
        """Write the mean over all tokens of the calibration text; nothing can be added afterwards."""
        name = self.layer.channel_weights(self.projection)
        file = RowsWriter(writer.folder / writer.rows[name], name, {"calibration": len(self.channels)})
        file.add("calibration", (self.channels / tokens).float())
