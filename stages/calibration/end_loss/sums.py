"""Sums of one activation, or of one node's experts, over weighted tokens.

Any process makes what a batch adds to them, and one adds it up, batch by batch: the sums are the same however many
processes share the batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from stages.calibration.cache import CacheWriter
from stages.calibration.on_disk.row_files import RowsWriter
from stages.calibration.statistics import StatisticsAccumulator, StatisticsSize, scaled
from stages.records.experts import ExpertLayer
from stages.records.results import ActivationStats, SearchStats, TokenWeights
from stages.records.sites import ActivationGroup, Projection
from stages.runtime.blocks.module import SiteRun

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


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedGroup:
    """An activation, and what a batch adds to its sums."""

    group: ActivationGroup
    head_size: int | None
    """Channels of a head where the sites feed attention."""

    @property
    def rows(self) -> str:
        """Return the name of a batch's weighted rows; those of what else it adds are its ``others``."""
        return f"rows of {self.group.activation}"

    @property
    def others(self) -> tuple[str, ...]:
        outputs = (self._outputs(site.name) for site in self.group.sites)
        return (self._weights, *(self._channels(site.name) for site in self.group.sites), *outputs)

    @property
    def _weights(self) -> str:
        return f"weights of {self.group.activation}"

    @staticmethod
    def _channels(site: str) -> str:
        return f"channels of {site}"

    @staticmethod
    def _outputs(site: str) -> str:
        return f"outputs of {site}"

    def added_by(self, runs: Mapping[str, SiteRun], gradients: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
        """Return what a batch of ``part`` adds: its weighted rows, its weights, and sums over its tokens.

        Args:
            runs: what each site read and gave.
            gradients: of the loss by what each site gave.
            part: of the text.
        """
        names = [site.name for site in self.group.sites]
        weights = token_weights(torch.cat([gradients[name] for name in names], dim=-1))
        read = runs[names[0]].read.detach()
        found = {self._weights: weights.cpu(), self.rows: read * weights.sqrt().unsqueeze(-1)}
        if part == "calibration":
            for name in names:
                gradient = gradients[name]
                found[self._channels(name)] = gradient.square().flatten(0, -2).sum(dim=0).double().cpu()
                # In a parallel block the MLP reads the same activation, and its width may be no number of heads.
                if self.head_size is not None and gradient.shape[-1] % self.head_size == 0:
                    relative = gradient / weights.clamp_min(_SMALLEST).unsqueeze(-1)
                    heads = relative.reshape(-1, gradient.shape[-1] // self.head_size, self.head_size).transpose(0, 1)
                    found[self._outputs(name)] = heads.transpose(1, 2) @ heads
        return found


class WeightedSums:
    """Adds up what batches of the text add to the sums of one activation.

    Args:
        of: the activation.
        counts: tokens by part of the text.
        device: where sums live.
    """

    def __init__(self, of: WeightedGroup, counts: Mapping[str, int], device: torch.device) -> None:
        self.of = of
        self.statistics = {
            part: StatisticsAccumulator(
                of.group.activation,
                StatisticsSize(in_features=of.group.in_features, tokens=tokens, itemsize=torch.float32.itemsize),
                device,
            )
            for part, tokens in counts.items()
        }
        """By part of the text: of the weighted rows, which the caller adds."""
        self._weights: dict[str, list[Tensor]] = {part: [] for part in counts}
        """By part: those of each batch's tokens, [batch, length]."""
        self._channels: dict[str, Tensor] = {}
        """By site: the squared gradient of the loss by each output channel, over the calibration text, [N] float64."""
        self._outputs: dict[str, Tensor] = {}
        """By site that feeds attention: g^T g of every head, over the calibration text, [heads, size, size]."""

    def add(self, added: Mapping[str, Tensor], part: str) -> None:
        """Add a batch of ``part``, all but its rows, given what ``WeightedGroup.added_by`` has made of it."""
        self._weights[part].append(added[self.of._weights])
        for site in self.of.group.sites:
            for sums, name in (
                (self._channels, self.of._channels(site.name)),
                (self._outputs, self.of._outputs(site.name)),
            ):
                if name in added:
                    sums[site.name] = sums[site.name].add_(added[name]) if site.name in sums else added[name].clone()

    def finish(self) -> SearchStats:
        """Return the statistics; nothing can be added afterwards."""
        weights = {part: torch.cat(batches) for part, batches in self._weights.items()}
        squared = float(weights["calibration"].double().square().mean())
        factor = squared / max(float(weights["calibration"].double().mean()), _SMALLEST)
        tokens = {part: scaled(accumulator.finish(), factor) for part, accumulator in self.statistics.items()}
        mean = torch.cat(list(self._channels.values())).mean().clamp_min(_SMALLEST)
        return SearchStats(
            tokens=ActivationStats(**tokens),
            channel_weights={name: (sums / mean).float() for name, sums in self._channels.items()},
            token_weights=TokenWeights(**{part: factor * each for part, each in weights.items()}),
            output_grams={
                name: shrunk_to_diagonal(gram.cpu() / tokens["calibration"].num_tokens, _TO_DIAGONAL)
                for name, gram in self._outputs.items()
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertChannels:
    """How much output channels count in one projection of a node's experts."""

    layer: ExpertLayer
    projection: Projection

    @property
    def name(self) -> str:
        """Return the name of what a batch adds, and of what the cache keeps."""
        return self.layer.channel_weights(self.projection)

    def added_by(self, gradients: Mapping[str, Tensor]) -> Float[Tensor, "E N"]:
        """Return the squared gradient by each channel, summed over a batch, in float64; experts without tokens have 0.

        Args:
            gradients: of the loss by what each expert gave.
        """
        sites = self.layer.of(self.projection)
        sums = torch.zeros(len(sites), sites[0].out_features, dtype=torch.float64)
        for channels, site in zip(sums, sites, strict=True):
            if site.name in gradients:
                channels += gradients[site.name].square().sum(dim=0).double().cpu()
        return sums

    def save(self, writer: CacheWriter, sums: Float[Tensor, "E N"], tokens: int) -> None:
        """Write the mean over all tokens of the calibration text.

        Args:
            writer: the cache.
            sums: what all batches of the calibration text add.
            tokens: of that text.
        """
        file = RowsWriter(writer.folder / writer.rows[self.name], self.name, {"calibration": len(sums)})
        file.add("calibration", (sums / tokens).float())
