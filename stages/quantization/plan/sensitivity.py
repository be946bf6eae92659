"""Weigh a site's relative error by what it does to the model's answers, from statistics or measured on the model.

From the statistics (``--sensitivity cache``): a site that writes to the residual stream changes it by its share of the
stream's energy so far; sites that only read it have the writers' median.

Measured (``--sensitivity measured``): each group's weights are replaced by roughly quantized ones, that group's only,
and the model runs on a few windows of the calibration text. The Kullback-Leibler divergence of its logits from the
base's, divided by the group's relative error, is what a unit of relative error costs there. Results are kept in the
cache's folder, group by group: nothing is measured twice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import onnx_ir as ir
import torch
from jaxtyping import Float
from pydantic import TypeAdapter
from torch import Tensor

from stages.calibration.cache import CalibrationCache
from stages.commands.progress import progress_bar
from stages.model.directory import ModelDirectory
from stages.model.weights import read_weight
from stages.quantization.plan.forecast import WHOLE, Sections, quick_error, quick_weight
from stages.quantization.plan.rules import all_sites
from stages.quantization.search.objective import to_device
from stages.records.formats import QuantSpec
from stages.records.quantities import duration
from stages.records.sites import ActivationGroup, MatMulSite, NormAbsorber, ValueAbsorber
from stages.runtime.providers import choose_providers
from stages.runtime.weight_trials import TrialRunner, open_trials
from stages.system.json_file import explained, read_json, write_json

_LOGGER = logging.getLogger(__name__)
FILE = "sensitivity.json"
_WINDOWS, _LENGTH = 4, 128
"""512 tokens: each group's divergence is compared with the same base on the same tokens, so few are enough."""
_CHUNK = 64
"""Tokens whose distributions are held in float64 at once."""
_CAP = 4.0
"""Usual energies that one block counts for in the stream at most; between 2 and 8 the ranks hardly change."""


def residual_sensitivities(groups: Sequence[ActivationGroup], energies: Mapping[str, float]) -> dict[str, float]:
    """Return the weight of a relative error at every site, by name, from the statistics.

    All are 1 where no site writes to the residual stream as far as one can see.

    Args:
        groups: all sites of the model.
        energies: tr(W G W^T), the energy of a site's outputs a token, by site.
    """
    writers = [site for group in groups if (site := _writer(group, _hidden_size(groups))) is not None]
    shares = _stream_shares([(site.name, energies[site.name]) for site in writers])
    usual = median(shares.values()) if shares else 1.0
    return {site.name: 1.0 if site.feeds_logits else shares.get(site.name, usual) for site in all_sites(groups)}


def output_sections(groups: Sequence[ActivationGroup]) -> dict[str, tuple[slice, ...]]:
    """Return the output channels of q, k and v for every site that makes them all; other sites are not in it.

    v has a small part of the energy of the three and does most of the work: relative errors count one by one.
    """
    sections: dict[str, tuple[slice, ...]] = {}
    for group in groups:
        value = group.absorber
        if not isinstance(value, ValueAbsorber) or value.first_channel == 0:
            continue
        width = value.heads.kv_heads * value.heads.head_size
        first = value.first_channel
        parts = (slice(0, first - width), slice(first - width, first), slice(first, first + width))
        sections[value.site] = tuple(part for part in parts if part.stop > part.start)
    return sections


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSensitivity:
    """Divergence of the logits, in nats a token, with the sum of the relative errors that caused it."""

    divergence: float
    error: float

    @property
    def per_error(self) -> float:
        """Nats a unit of relative error."""
        return self.divergence / self.error if self.error > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityMeasure:
    """What stays the same from group to group while sensitivities are measured."""

    model: ir.Model
    directory: ModelDirectory
    cache: CalibrationCache
    device: torch.device
    rough_format: Callable[[MatMulSite], QuantSpec]
    """A site's format while it is measured."""
    sections: Mapping[str, Sections]
    """Output channels by site whose relative errors count one by one."""

    def measure(self, groups: Sequence[ActivationGroup]) -> dict[str, float]:
        """Return the nats for a unit of relative error by site; tell what that will cost before it starts.

        Raises:
            GraphError: ONNX Runtime can't run the base model.
            UserError: the cache's folder can't be written.
        """
        label = self.rough_format(groups[0].sites[0]).label
        done = _read(self.cache.folder / FILE, label)
        left = unmeasured(self.cache, groups, self.rough_format)
        if left:
            done |= self._measure_missing(left, done, label)
        return {site.name: done[group.activation].per_error for group in groups for site in group.sites}

    def _measure_missing(
        self, groups: Sequence[ActivationGroup], done: Mapping[str, GroupSensitivity], label: str
    ) -> dict[str, GroupSensitivity]:
        sites = [site for group in groups for site in group.sites]
        windows = _windows(self.cache.read_tokens()[0])
        measured = dict(done)
        with open_trials(self.model, self.directory, sites, choose_providers("cuda,cpu")) as trials:
            started = time.perf_counter()
            base = trials.logits(windows)
            seconds = (time.perf_counter() - started) * len(groups)
            _LOGGER.info(
                "--sensitivity measured: %d runs of the base model on %d calibration tokens, about %s; kept "
                "in %s.",
                len(groups), windows.size, duration(seconds), self.cache.folder / FILE,
            )  # fmt: skip
            with progress_bar() as progress:
                for group in progress.track(groups, description="sensitivity", unit="groups", keeps="groups"):
                    measured[group.activation] = self._measure_group(group, trials, windows, base)
                    _write(self.cache.folder / FILE, _Measured(format=label, tokens=windows.size, groups=measured))
        return measured

    def _measure_group(
        self, group: ActivationGroup, trials: TrialRunner, windows: np.ndarray, base: Tensor
    ) -> GroupSensitivity:
        stats = to_device(self.cache.read(group.activation).calibration, self.device)
        if stats.is_silent:
            return GroupSensitivity(divergence=0.0, error=0.0)
        replaced: list[tuple[MatMulSite, Tensor]] = []
        error = 0.0
        for site in group.sites:
            weight = read_weight(self.model, site, self.device)
            rough = quick_weight(weight, self.rough_format(site), stats)
            error += quick_error(site, weight, rough, stats, self.sections.get(site.name, WHOLE))
            replaced.append((site, rough))
        return GroupSensitivity(divergence=divergence(base, trials.logits(windows, replaced)), error=error)


def unmeasured(
    cache: CalibrationCache, groups: Sequence[ActivationGroup], rough_format: Callable[[MatMulSite], QuantSpec]
) -> list[ActivationGroup]:
    """Return the groups whose sensitivity isn't kept in the cache's folder yet.

    Args:
        cache: where sensitivities are kept.
        groups: the sites to know of.
        rough_format: a site's format while it is measured.
    """
    done = _read(cache.folder / FILE, rough_format(groups[0].sites[0]).label) if groups else {}
    return [group for group in groups if group.activation not in done]


def divergence(base: Float[Tensor, "*tokens V"], other: Float[Tensor, "*tokens V"]) -> float:
    """Return the mean over tokens of KL(base || other), in nats, of the distributions that these logits mean."""
    mine_theirs = (torch.split(logits.flatten(0, -2), _CHUNK) for logits in (base, other))
    pairs = zip(*mine_theirs, strict=True)
    total = sum(_summed_divergence(mine.double(), theirs.double()) for mine, theirs in pairs)
    return max(total / base.flatten(0, -2).shape[0], 0.0)


def _summed_divergence(base: Tensor, other: Tensor) -> float:
    p, q = torch.log_softmax(base, dim=-1), torch.log_softmax(other, dim=-1)
    return float(torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True))


def _stream_shares(writers: Sequence[tuple[str, float]]) -> dict[str, float]:
    usual = median(energy for _, energy in writers) if writers else 0.0
    shares: dict[str, float] = {}
    stream = 0.0
    for name, energy in writers:
        stream += min(energy, _CAP * usual)
        shares[name] = energy / stream if stream > 0 else 0.0
    return shares


def _hidden_size(groups: Sequence[ActivationGroup]) -> int | None:
    """Return the channels of the residual stream: what the site that makes the logits reads."""
    return next((site.in_features for site in all_sites(groups) if site.feeds_logits), None)


def _writer(group: ActivationGroup, hidden_size: int | None) -> MatMulSite | None:
    """Return the group's only site if its output has the stream's size and its input is no norm's."""
    site = group.sites[0]
    if len(group.sites) > 1 or isinstance(group.absorber, NormAbsorber) or site.feeds_logits:
        return None
    return site if hidden_size in (None, site.out_features) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """The file: by activation, for one format of the rough weights and one set of tokens."""

    format: str
    tokens: int
    groups: dict[str, GroupSensitivity]


_FILES = TypeAdapter(_Measured)


def _windows(tokens: np.ndarray) -> np.ndarray:
    """Return the beginnings of a few windows, spread over the calibration text."""
    chosen = np.linspace(0, len(tokens) - 1, min(_WINDOWS, len(tokens))).astype(int)
    return tokens[chosen, :_LENGTH]


def _read(path: Path, label: str) -> dict[str, GroupSensitivity]:
    """Return what is there for this format; nothing where the file is missing, damaged or of another format."""
    found = read_json(path, _FILES)
    return {} if found is None or found.format != label else found.groups


def _write(path: Path, measured: _Measured) -> None:
    failure = f"--sensitivity measured can't keep its results in {path}"
    with explained(failure, "choose a --cache_dir that can be written"):
        write_json(path, _FILES, measured)
