"""Give the statistics of one expert's matrix at a time, from rows that all experts of a layer share.

The router's scores say again which tokens an expert saw. fc1 reads those rows; fc2 reads what the expert's own
floating-point fc1 makes of them. A token's error counts by the square of its weight in the mixture. An expert that few
tokens reach would be fitted to these alone, so K / 4 tokens drawn from all of the layer's are added to every expert's
own: the fewer it saw, the more they count. Where the end loss is known the whole is in nats. Nothing stays in memory
but the expert at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from stages.calibration.cache import CalibrationCache
from stages.calibration.capture import PRIOR
from stages.calibration.statistics import StatisticsAccumulator, StatisticsSize, scaled
from stages.model.sites import find_expert_layers
from stages.model.weights import read_weight, to_torch
from stages.records.experts import ExpertLayer
from stages.records.results import ActivationStats, SearchStats, TokenStats
from stages.records.sites import MatMulSite
from stages.runtime.blocks.experts import activated, route

_CHUNK = 4096
"""Rows that are worked on at a time."""


def search_statistics(model: ir.Model, cache: CalibrationCache, device: torch.device) -> Callable[[str], SearchStats]:
    """Return what gives, by activation, what a search minimizes at the sites that read it, experts' among them."""
    experts = ExpertStatistics(model, find_expert_layers(model), cache, device)

    def read(activation: str) -> SearchStats:
        return experts.read(activation) if experts.has(activation) else cache.read_for_search(activation)

    return read


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """The tokens that an expert is calibrated on, by their place in the text, and how much each counts."""

    tokens: Int64[Tensor, " n"]
    weights: Float[Tensor, " n"]
    own: int
    """How many of them the router sent there; they stand first."""


@dataclass(frozen=True)
class ExpertStatistics:
    """The layers of a model whose rows a cache holds."""

    model: ir.Model
    layers: Sequence[ExpertLayer]
    cache: CalibrationCache
    device: torch.device

    @cached_property
    def _sites(self) -> Mapping[str, tuple[ExpertLayer, MatMulSite]]:
        return {site.activation: (layer, site) for layer in self.layers for site in layer.sites}

    def has(self, activation: str) -> bool:
        """Return whether ``activation`` is that of an expert's matrix."""
        return activation in self._sites

    def read(self, activation: str) -> SearchStats:
        """Return what a search minimizes at one expert's matrix.

        Raises:
            CacheMismatch: the cache lacks the layer's rows.
        """
        layer, site = self._sites[activation]
        assert site.expert is not None
        rows, scores = self.cache.read_rows(layer.tokens), self.cache.read_rows(layer.scores)
        seen = {part: seen_by(scores[part], layer, site) for part in ("calibration", "held_out")}
        parts = {part: self._statistics(layer, site, rows[part], seen[part]) for part in seen}
        own = seen["calibration"].own
        name = layer.channel_weights(site.expert.projection)
        if name not in self.cache.manifest.rows:
            return SearchStats(tokens=ActivationStats(**parts), channel_weights={}, own_tokens=own)
        channels = torch.from_numpy(self.cache.read_rows(name)["calibration"][site.expert.index].copy())
        mean, usual = float(channels.mean()), float(seen["calibration"].weights[:own].mean()) if own else 0.0
        if mean > 0 and usual > 0:  # else no token came here
            parts = {part: scaled(stats, mean / usual) for part, stats in parts.items()}
            channels = channels / mean
        return SearchStats(tokens=ActivationStats(**parts), channel_weights={site.name: channels}, own_tokens=own)

    def _statistics(self, layer: ExpertLayer, site: MatMulSite, rows: np.ndarray, seen: _Seen) -> TokenStats:
        size = StatisticsSize(in_features=site.in_features, tokens=len(seen.tokens), itemsize=torch.float32.itemsize)
        sums = StatisticsAccumulator(site.activation, size, self.device)
        first = self._fc1(layer, site)
        for start in range(0, len(seen.tokens), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            x = torch.from_numpy(rows[seen.tokens[chunk].numpy()].astype(np.float32)).to(self.device)
            if first is not None:
                x = activated(torch.addmm(first.bias, x, first.weight.T), layer.activation)
            sums.add(x * seen.weights[chunk, None].sqrt().to(self.device))
        return sums.finish()

    def _fc1(self, layer: ExpertLayer, site: MatMulSite) -> _Linear | None:
        """Return what comes before fc2; None for fc1 itself."""
        assert site.expert is not None
        if site.expert.projection == "fc1":
            return None
        first = layer.sites[2 * site.expert.index]
        weight = read_weight(self.model, first, self.device)
        bias = torch.zeros(len(weight), device=self.device)
        stored = None if layer.fc1_bias is None else self.model.graph.initializers[layer.fc1_bias].const_value
        if stored is not None:
            bias = to_torch(stored.numpy()[site.expert.index]).to(self.device, torch.float32)
        return _Linear(weight=weight, bias=bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Linear:
    weight: Float[Tensor, "N K"]
    bias: Float[Tensor, " N"]


def seen_by(scores: np.ndarray, layer: ExpertLayer, site: MatMulSite) -> _Seen:
    """Return the tokens that an expert is calibrated on: its own, then K / 4 of the whole layer.

    Args:
        scores: the router's, [tokens, experts].
        layer: the expert's.
        site: one of its matrices.
    """
    assert site.expert is not None
    routed = route(torch.from_numpy(scores.astype(np.float32)), layer.routing)
    tokens, place = torch.nonzero(routed.experts == site.expert.index, as_tuple=True)
    drawn = min(site.in_features // PRIOR, len(scores))
    generator = torch.Generator().manual_seed(site.expert.index)
    others = torch.randperm(len(scores), generator=generator)[:drawn]
    own, prior = routed.weights[tokens, place].square(), routed.weights.square().mean().expand(drawn)
    return _Seen(tokens=torch.cat([tokens, others]), weights=torch.cat([own, prior]), own=len(tokens))
