"""Forecast what each format would cost a site in accuracy, without the search.

Where tokens are weighted by the end loss, that is half the sum over output channels n of c_n D_n G D_n^T for the weight
error D (half of tr(H D G D^T) at sites that feed attention): the second-order term of the model's Kullback-Leibler
divergence, in nats a token. Over the 121 groups of SmolLM2-135M its ranks and those of the measured divergence have a
correlation of 0.95. Statistics without such weights only tell how large the error is beside the output, whatever the
output does to the answers.

Weights are rounded after a few clip ratios were tried by the diagonal blocks of the Gram matrix (INT8: by their full
ranges, as clipping gains nothing there). Where the search that follows lets codes make up for each other's errors,
less is left of them, and how much is known beforehand: GPTQ turns the rounding error e_k of column k into an output
error of d_k e_k^2, with U diag(d) U^T the Gram matrix. Over the 151 sites of SmolLM2-135M that is 1.03
times the loss of the finished weights in the (geometric) mean, and its logarithm scatters by 0.22; without it
forecasts are 2.8 times the loss and scatter by 0.54.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from pydantic import TypeAdapter
from torch import Tensor

from stages.quantization.search.affine import RangeRule, choose_parameters, join, round_trip, split
from stages.quantization.search.choices import rows_per_chunk
from stages.quantization.search.gptq.factor import factor_gram
from stages.quantization.search.objective import full_gram, gram_blocks, mixed_outputs, output_error
from stages.quantization.search.problem import MEASURED_CHANNELS, evenly_spaced
from stages.quantization.search.ranges import search_clip_ratios
from stages.records.formats import QuantSpec
from stages.records.results import SearchStats, TokenStats
from stages.records.sites import MatMulSite
from stages.system.json_file import explained, read_json, write_json

FILE = "forecast.json"
_EXPERT_CHANNELS = 128
"""Output channels that tell what a format costs an expert: a node has many experts, whose sampling errors cancel."""
_RATIOS = [1.0, 0.9, 0.8, 0.7, 0.6]
_DAMPING = 0.01
"""Little: the descent that follows GPTQ makes up for what more damping leaves."""

Forecasts = dict[str, dict[str, float]]
"""Loss by site and label of the format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchTraits:
    """What forecasts have to know of the search that follows."""

    rule: RangeRule
    """How a block's range becomes its scale."""
    compensates: bool
    """Codes are chosen to make up for each other's errors (GPTQ)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupForecast:
    """Forecasts the sites that read one activation."""

    stats: SearchStats
    search: SearchTraits
    unpredicted: Float[Tensor, " K"] | None
    """See ``unpredicted_inputs``; None where codes don't make up for each other's errors."""

    @classmethod
    def of(cls, stats: SearchStats, search: SearchTraits) -> GroupForecast:
        """Return what forecasts the sites of an activation.

        Args:
            stats: of the activation.
            search: the search that follows.
        """
        calibration = stats.tokens.calibration
        left = unpredicted_inputs(calibration) if search.compensates and not calibration.is_silent else None
        return cls(stats=stats, search=search, unpredicted=left)

    def of_site(
        self, site: MatMulSite, weight: Float[Tensor, "N K"], specs: Mapping[str, QuantSpec], pool: Executor
    ) -> dict[str, float]:
        """Return what each of ``specs`` costs a site, by its key; nothing at all where no token reached it.

        Args:
            site: the MatMul.
            weight: its weight.
            specs: number formats by the keys that the losses get.
            pool: forecasts several formats at once.
        """
        return self._of_channels(site, weight, specs, MEASURED_CHANNELS, pool)

    def of_expert(
        self, site: MatMulSite, weight: Float[Tensor, "N K"], specs: Mapping[str, QuantSpec], pool: Executor
    ) -> dict[str, float]:
        """Return ``of_site`` of an expert, from fewer of its output channels.

        Args:
            site, weight, specs, pool: see ``of_site``.
        """
        return self._of_channels(site, weight, specs, _EXPERT_CHANNELS, pool)

    def _of_channels(
        self, site: MatMulSite, weight: Tensor, specs: Mapping[str, QuantSpec], channels: int, pool: Executor
    ) -> dict[str, float]:
        """Forecast from so many evenly spaced output channels; their part of all is known from their weights' sizes."""
        counts = self._counts(site)
        mixes = self.unpredicted is None and site.name in self.stats.output_grams
        some = evenly_spaced(len(weight), len(weight) if mixes else channels)
        few, part = self, 1.0
        if some.step > 1:
            part = 1.0 if counts is None else self._part(weight, counts, some)
            named = {} if counts is None else {site.name: counts[some]}
            few = replace(self, stats=replace(self.stats, channel_weights=named, output_grams={}))
        rows = weight[some].contiguous()
        losses = pool.map(lambda spec: few._loss(site, rows, spec) / part, specs.values())
        return dict(zip(specs, losses, strict=True))

    def _counts(self, site: MatMulSite) -> Float[Tensor, " N"] | None:
        """Return what the error of each output channel costs; None where only relative errors are known."""
        outputs = self.stats.output_grams.get(site.name)
        if outputs is None:
            return self.stats.channel_weights.get(site.name)
        return torch.diagonal(outputs, dim1=-2, dim2=-1).flatten()

    def _part(self, weight: Tensor, counts: Tensor, some: slice) -> float:
        """Return which part of the loss some channels have: a few may have most of it, as a few tokens of lm_head."""
        inputs = torch.ones_like(weight[0]) if self.unpredicted is None else self.unpredicted
        sizes = compensated_errors(weight, inputs).double() * counts.to(weight).double()
        whole = float(sizes.sum())
        return float(sizes[some].sum()) / whole if whole > 0 else 1.0

    def _loss(self, site: MatMulSite, weight: Tensor, spec: QuantSpec) -> float:
        calibration = self.stats.tokens.calibration
        stored = quick_weight(weight, spec, calibration, self.search.rule)
        if self.unpredicted is None:
            return quick_loss(site, weight, stored, self.stats)
        # The errors of different channels have nothing to do with each other.
        errors = compensated_errors(stored.sub_(weight), self.unpredicted)
        return _cost(site, weight, errors, self._counts(site), self.stats)


def unpredicted_inputs(stats: TokenStats) -> Float[Tensor, " K"]:
    """Return each input's mean square without what the inputs behind it in GPTQ's order tell about it.

    Args:
        stats: of the activation, not silent.
    """
    gram = full_gram(stats)
    factor = factor_gram(gram, _DAMPING, act_order=True)
    left = torch.empty_like(gram[0])
    left[factor.order] = factor.unpredicted
    return torch.where(torch.diagonal(gram) > 0, left, 0.0)


def compensated_errors(rounding: Float[Tensor, "N K"], unpredicted: Float[Tensor, " K"]) -> Float[Tensor, " N"]:
    """Return the mean squared error that GPTQ leaves every output channel.

    Its steps round other numbers than the weights, but with errors of the same size.

    Args:
        rounding: the error of every weight when it is rounded by itself.
        unpredicted: see ``unpredicted_inputs``.
    """
    return torch.cat([rows.square() @ unpredicted for rows in _split(rounding)])


def quick_loss(
    site: MatMulSite, weight: Float[Tensor, "N K"], stored: Float[Tensor, "N K"], stats: SearchStats
) -> float:
    """Return what ``stored`` in the place of ``weight`` costs: nats a token, or its error relative to the output.

    Args:
        site: the MatMul.
        weight: its weight.
        stored: what the runtime would compute with.
        stats: of the site's activation.
    """
    outputs, channels = stats.output_grams.get(site.name), stats.channel_weights.get(site.name)
    if outputs is None:
        differences = (some - rows for some, rows in zip(_split(stored), _split(weight), strict=True))
        errors = torch.cat([output_error(each, stats.tokens.calibration) for each in differences])
    else:
        errors = output_error(mixed_outputs(stored - weight, outputs.to(weight)), stats.tokens.calibration)
    return _cost(site, weight, errors, channels if outputs is None else torch.ones_like(errors), stats)


def _cost(site: MatMulSite, weight: Tensor, errors: Tensor, counts: Tensor | None, stats: SearchStats) -> float:
    """Return what output channels' mean squared errors cost, each of which counts ``counts``; None: relative errors."""
    errors = errors.double()
    if counts is not None:
        return 0.5 * float(errors @ counts.to(errors))
    # Logits without the part that softmax ignores, which all tokens share: it is most of their energy.
    common = weight.mean(dim=0) if site.feeds_logits else torch.zeros_like(weight[0])
    signals = [output_error(rows - common, stats.tokens.calibration) for rows in _split(weight)]
    energy = float(torch.cat(signals).double().sum())
    return float(errors.sum()) / energy if energy > 0 else 0.0


def quick_weight(
    weight: Float[Tensor, "N K"], spec: QuantSpec, stats: TokenStats, rule: RangeRule
) -> Float[Tensor, "N K"]:
    """Return what the runtime would compute with, after a short clip search (INT4) or plain rounding (INT8).

    Args:
        weight: the weight.
        spec: the format that it is stored in.
        stats: of its activation.
        rule: how a block's range becomes its scale.
    """
    size = spec.block_size(weight.shape[1])
    gram = gram_blocks(stats, size) if spec.bits == 4 else None
    stored = torch.empty_like(weight)
    for rows, into in zip(_split(weight), _split(stored), strict=True):
        blocks = split(rows, size)
        ratios = 1.0 if gram is None else search_clip_ratios(rows, spec, rule, gram, _RATIOS)
        into.copy_(join(round_trip(blocks, choose_parameters(blocks, spec, rule, ratios), spec), weight.shape[1]))
    return stored


def _split(weight: Float[Tensor, "N K"]) -> tuple[Float[Tensor, "rows K"], ...]:
    """Return some output channels after others, so that what is made of them is small."""
    return torch.split(weight, rows_per_chunk(weight))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """The file: forecasts for one kind of search. Earlier versions' had other units, and named none."""

    search: SearchTraits
    losses: Forecasts


_FILES = TypeAdapter(_Kept)


def read_forecasts(folder: Path, search: SearchTraits | None = None) -> Forecasts:
    """Return the forecasts for ``search`` (None: for any); none where there is no readable file."""
    found = read_json(folder / FILE, _FILES)
    return {} if found is None or search not in (None, found.search) else found.losses


def write_forecasts(folder: Path, search: SearchTraits, forecasts: Forecasts) -> None:
    """Write the forecasts of a cache's sites, for ``search``, into its folder.

    Raises:
        UserError: the folder can't be written.
    """
    failure = f"A budget's forecasts can't be kept in {folder / FILE}"
    with explained(failure, "choose a --cache_dir that can be written"):
        write_json(folder / FILE, _FILES, _Kept(search=search, losses=forecasts))
