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

Processes launched together take the batches alternately, from the last link to the first: a window's gradients depend
on no other window. What a batch adds to the sums goes to the process that adds them up, in the batches' order, so that
the sums are those of one process, bit for bit. A link has few activations, and one of them makes most of the work. So
the rows of several links are held before they are sent, and each process adds up some activations of them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stages.calibration.cache import CacheWriter, weighted_file
from stages.calibration.capture import fold_in
from stages.calibration.end_loss.sums import PROJECTIONS, ExpertChannels, WeightedGroup, WeightedSums
from stages.calibration.on_disk.stream_files import StreamFiles
from stages.calibration.on_disk.unfinished import Unfinished
from stages.calibration.text.windows import TokenWindows
from stages.commands.progress import progress_bar
from stages.model.absorbers import attention_head_sizes
from stages.model.directory import ModelDirectory
from stages.records.experts import ExpertLayer
from stages.records.sites import ActivationGroup, MatMulSite
from stages.runtime.blocks.chain import Chain
from stages.runtime.blocks.cut import DecoderBlock
from stages.runtime.blocks.stream import BlockRunner, in_batches, read_inputs
from stages.system.distributed import Processes, split_by_cost
from stages.system.shared_folder import wait_for

SAVED_EVERY = 10.0
"""Seconds."""

Batch = tuple[Tensor, str]
"""The numbers of some windows, counted through the whole text, and the part that they belong to."""


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


@dataclass(frozen=True, kw_only=True)
class EndLossPass:
    """A model as a chain, the windows that it runs on, and the activations whose weighted statistics are wanted."""

    chain: Chain
    directory: ModelDirectory
    groups: tuple[ActivationGroup, ...]
    windows: TokenWindows
    batch_size: int
    device: torch.device
    streams: StreamFiles
    """What enters the links: all windows, the held-out ones last."""
    kept: frozenset[int]
    """The places of the links of which that is there already."""
    unfinished: Unfinished
    """What an earlier run has finished, and where this one keeps what it finishes."""
    processes: Processes
    memory: int
    """Bytes that the rows of several links may take in one process."""
    layers: tuple[ExpertLayer, ...] = ()
    """Those whose experts' output channels are wanted."""

    def fill(self, writer: CacheWriter) -> None:
        """Run all windows back, and save every site's weighted statistics.

        Ensures: when it returns, all processes have saved theirs, and the first one sees the files.

        Raises:
            UserError: the streams can't be kept beside the cache.
        """
        links, done = self.chain.links, self.unfinished.reached
        lacking = () if done.streams else tuple(place for place in range(len(links)) if place not in self.kept)
        costs = [sum(_numbers(site) for site in link.sites) for link in links]
        left = len(links) - done.links
        total = sum(costs[place - 1] for place in lacking if place) + sum(2 * cost for cost in costs[:left])
        with progress_bar() as bar:
            task = bar.add_task(
                "token weights",
                total=total,
                steps=sum(place > 0 for place in lacking) + len(links),
                done=done.links,
                unit="layers",
                keeps="layers, but for the last seconds',",
            )
            shared = self._complete(lacking, left, lambda place: bar.advance(task, costs[place]))
            gradients = [self._gradients.read(left, batch) for batch, _ in self._mine] if done.links else []
            for wave in self._waves(left):
                gradients, files = self._back(
                    writer, wave, gradients, shared, lambda place: bar.advance(task, 2 * costs[place])
                )
                self.unfinished.note(replace(done, streams=True, links=len(links) - wave[-1]), files)
                if wave[-1] and self.unfinished.is_due(SAVED_EVERY):
                    self._save(wave[-1], gradients)
        self.processes.barrier()
        activations = [group.group.activation for of_link in self._groups for group in of_link]
        writer.weighted.update(activations)
        if self.processes.is_first:
            wait_for(writer.folder / weighted_file(writer.files[activation]) for activation in activations)

    @cached_property
    def _gradients(self) -> StreamFiles:
        """Return the loss's gradients by what enters a link."""
        return replace(self.streams, kind="gradient")

    def _save(self, place: int, gradients: Sequence[Tensor]) -> None:
        """Keep that all links from ``place`` on were run back; what only they read is removed.

        Args:
            place: of the link that was run last.
            gradients: by what enters it, for each batch of this process.
        """
        for (batch, _), gradient in zip(self._mine, gradients, strict=True):
            self._gradients.keep(place, int(batch[0]), gradient)
        # What the links before it read was written at the beginning, perhaps by other processes.
        files = [*self._gradients.files([place]), *self.streams.files(range(place))] if gradients else []
        self.unfinished.note(self.unfinished.reached, files)
        self.unfinished.save({})
        if self.processes.is_first:
            behind = range(place, len(self.chain.links))
            self.streams.remove(behind)
            self._gradients.remove([each + 1 for each in behind])

    @cached_property
    def _batches(self) -> list[Batch]:
        """Return all batches, those of the calibration text first."""
        count, held_out = len(self.windows.calibration), len(self.windows.held_out)
        found = [(batch, "calibration") for batch in in_batches(count, self.batch_size)]
        return found + [(batch + count, "held_out") for batch in in_batches(held_out, self.batch_size)]

    @property
    def _mine(self) -> list[Batch]:
        """Return this process's batches."""
        return self._batches[self.processes.index :: self.processes.count]

    @property
    def _turns(self) -> int:
        """Return how many batches the first process has."""
        return -(-len(self._batches) // self.processes.count)

    def _waves(self, left: int) -> list[list[int]]:
        """Return the places of the first ``left`` links, the last first, in lists of those that are run together."""
        widths = [sum(group.group.in_features for group in of_link) for of_link in self._groups]
        tokens = self._turns * self.batch_size * self.windows.seq_len
        size = min(self.processes.count, 1 + self.memory // max(tokens * max(widths) * torch.float32.itemsize, 1))
        places = list(reversed(range(left)))
        return [places[start : start + size] for start in range(0, len(places), size)]

    def _complete(
        self, lacking: Sequence[int], left: int, advance: Callable[[int], None]
    ) -> Mapping[int, Mapping[str, Tensor]]:
        """Compute what enters the links at ``lacking``; return the values that links read beside it, by batch size.

        Args:
            lacking: places in the chain, in order.
            left: links that aren't run back yet.
            advance: called with the place of each link that was run.
        """
        mine = self._mine
        if not mine:
            self.processes.barrier()
            return {}
        tokens = np.concatenate([self.windows.calibration, self.windows.held_out])[
            torch.cat([each for each, _ in mine])
        ]
        sizes = frozenset(len(batch) for batch, _ in mine)
        first = self.chain.links[0].stream_in
        inputs = read_inputs(self.chain.graph, self.directory, tokens, first, self.chain.shared, sizes)
        self.streams.wait_until_whole(set(range(left)) - set(lacking), inputs.stream.shape[-1])
        streams, at = list(torch.split(inputs.stream, [len(batch) for batch, _ in mine])), 0
        for place in lacking:
            if place:
                run, weights = self._loaded(self.chain.links[place - 1], inputs.shared)
                entering = streams if at == place - 1 else [self.streams.read(place - 1, batch) for batch, _ in mine]
                streams, at = [run.over(stream, weights) for stream in entering], place
                advance(place - 1)
            for (batch, _), stream in zip(mine, streams, strict=True):
                self.streams.keep(place, int(batch[0]), stream)
        self.processes.barrier()
        self.streams.wait_until_whole(lacking, inputs.stream.shape[-1])
        return inputs.shared

    def _back(
        self,
        writer: CacheWriter,
        wave: Sequence[int],
        behind: Sequence[Tensor],
        shared: Mapping[int, Mapping[str, Tensor]],
        advance: Callable[[int], None],
    ) -> tuple[list[Tensor], list[Path]]:
        """Save the statistics of some links' sites.

        Args:
            writer: the cache.
            wave: places in the chain, from behind.
            behind: for each batch of this process the gradient by what leaves the first of them; nothing behind the
                head, where labels are drawn.
            shared: the values that links read beside the stream, by batch size.
            advance: called with the place of each link that was run.

        Returns:
            For each batch of this process the loss's gradient by what enters the last of them, and the files of this
            process's statistics.
        """
        mine, gradients = self._mine, list(behind)
        added: list[dict[str, Tensor]] = [{} for _ in range(self._turns)]
        sums = self._sums(wave)
        for place in wave:
            run, weights = self._loaded(self.chain.links[place], shared)
            before: list[Tensor] = []
            for turn in range(self._turns):
                if turn < len(mine):
                    given = gradients[turn] if gradients else None
                    by_stream, more = self._batch_back(place, run, weights, mine[turn], given)
                    before.append(by_stream)
                    added[turn] |= more
                if place == wave[-1]:
                    sums.add(added[turn], self._batches[turn * self.processes.count :])
                    added[turn] = {}
            gradients = before
            advance(place)
        return gradients, sums.save(writer, self.windows.calibration.size)

    def _batch_back(
        self,
        place: int,
        run: BlockRunner,
        weights: Mapping[str, Tensor],
        batch: Batch,
        behind: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss's gradient by what enters a link, and what a batch adds to the sums of its activations.

        Args:
            place: of the link.
            run: the link.
            weights: of its sites.
            batch: some windows.
            behind: the gradient by what leaves it; None behind the head.
        """
        numbers, part = batch
        entering = self.streams.read(place, numbers).to(self.device).requires_grad_()
        leaving, runs = run.with_sites(entering, weights)
        behind = self._of_labels(leaving, numbers) if behind is None else behind.to(self.device)
        names = list(runs)
        of_stream, *of_sites = torch.autograd.grad(leaving, [entering, *(runs[name].gave for name in names)], behind)
        gradients = dict(zip(names, of_sites, strict=True))
        added: dict[str, Tensor] = {}
        for group in self._groups[place]:
            added |= group.added_by(runs, gradients, part)
        if part == "calibration":
            added |= {each.name: each.added_by(gradients) for each in self._experts[place]}
        return of_stream.cpu(), added

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
        module, weights = self.chain.module(link, self.device), self.chain.weights(link, self.device)
        return BlockRunner(module=module, shared=shared, batch_size=self.batch_size), weights

    @cached_property
    def _groups(self) -> list[list[WeightedGroup]]:
        """Return the activations that each link's sites read."""
        heads = attention_head_sizes(self.groups)
        return [
            [
                WeightedGroup(group=group, head_size=heads.get(group.activation))
                for group in self.groups
                if sites.issuperset(group.sites)
            ]
            for sites in (set(link.sites) for link in self.chain.links)
        ]

    @cached_property
    def _experts(self) -> list[list[ExpertChannels]]:
        """Return the projections of each link's experts."""
        return [
            [
                ExpertChannels(layer=layer, projection=projection)
                for layer in self.layers
                if sites.issuperset(layer.sites)
                for projection in PROJECTIONS
            ]
            for sites in (set(link.sites) for link in self.chain.links)
        ]

    def _sums(self, wave: Sequence[int]) -> _SharedSums:
        """Return empty sums of all that these links' sites read."""
        groups = [group for place in wave for group in self._groups[place]]
        experts = [each for place in wave for each in self._experts[place]]
        shares = split_by_cost([float(group.group.in_features**2) for group in groups], self.processes.count)
        owners = {each.name: 0 for each in experts}
        for process, share in enumerate(shares):
            owners |= {name: process for index in sorted(share) for name in (groups[index].rows, *groups[index].others)}
        counts = {"calibration": self.windows.calibration.size, "held_out": self.windows.held_out.size}
        mine = [groups[index] for index in sorted(shares[self.processes.index])]
        return _SharedSums(
            processes=self.processes,
            device=self.device,
            owners=owners,
            groups=[WeightedSums(group, counts, self.device) for group in mine],
            experts={each: None for each in experts if self.processes.is_first},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _SharedSums:
    """Sums of some links' activations, each of which one process adds up."""

    processes: Processes
    device: torch.device
    owners: Mapping[str, int]
    """The process that each of the names belongs to."""
    groups: Sequence[WeightedSums]
    """This process's."""
    experts: dict[ExpertChannels, Tensor | None]

    def add(self, added: Mapping[str, Tensor], batches: Sequence[Batch]) -> None:
        """Add a turn's batches, one of each process, in their order; all processes must come here together.

        Args:
            added: what this process's batch adds; nothing where there was none left for it.
            batches: those of this turn, and perhaps later ones.
        """
        received = self.processes.exchange(added, self.owners)
        parts = [part for _, part in batches[: self.processes.count]]
        for part in dict.fromkeys(parts):
            places = [place for place, each in enumerate(parts) if each == part]
            rows = {
                sums.of.group.activation: [received[sums.of.rows][place] for place in places] for sums in self.groups
            }
            fold_in({sums.of.group.activation: sums.statistics[part] for sums in self.groups}, rows, self.device)
            for sums in self.groups:
                for place in places:
                    sums.add(
                        {name: received[name][place] for name in sums.of.others if place < len(received.get(name, ()))},
                        part,
                    )
        for experts in self.experts:
            for value in received.get(experts.name, ()):
                before = self.experts[experts]
                self.experts[experts] = value.cpu() if before is None else before + value.cpu()

    def save(self, writer: CacheWriter, tokens: int) -> list[Path]:
        """Write this process's, and return the files; ``tokens`` is the number of the calibration text's."""
        for sums in self.groups:
            writer.write_weighted(sums.of.group.activation, sums.finish())
        for experts, channels in self.experts.items():
            assert channels is not None, "the calibration text has a window"
            experts.save(writer, channels, tokens)
        files = [weighted_file(writer.files[sums.of.group.activation]) for sums in self.groups]
        return [writer.folder / name for name in (*files, *(writer.rows[each.name] for each in self.experts))]
