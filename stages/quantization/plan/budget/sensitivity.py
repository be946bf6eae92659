"""Measure on the model what quantized weights of a group really cost, and correct the forecasts by it.

Each group's weights are replaced by roughly quantized ones, that group's only, and the model runs on a few windows of
the calibration text. The Kullback-Leibler divergence of its logits from the base's, divided by what was forecast for
the same weights, is what the group's forecasts are multiplied by. Results are kept in the cache's folder, group by
group: nothing is measured twice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from stages.quantization.plan.budget.forecast import quick_loss, quick_weight
from stages.quantization.search.affine import RangeRule
from stages.quantization.search.objective import search_to_device
from stages.records.formats import QuantSpec
from stages.records.quantities import duration
from stages.records.sites import ActivationGroup, MatMulSite
from stages.runtime.providers import choose_providers
from stages.runtime.weight_trials import TrialRunner, open_trials
from stages.system.json_file import explained, read_json, write_json

_LOGGER = logging.getLogger(__name__)
FILE = "sensitivity.json"
_WINDOWS, _LENGTH = 4, 128
"""512 tokens: each group's divergence is compared with the same base on the same tokens, so few are enough."""
_CHUNK = 64
"""Tokens whose distributions are held in float64 at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSensitivity:
    """Divergence of the logits, in nats a token, with what was forecast for the weights that caused it."""

    divergence: float
    forecast: float

    @property
    def factor(self) -> float:
        """Return what forecasts are multiplied by to become nats that were measured."""
        return self.divergence / self.forecast if self.forecast > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityMeasure:
    """What stays the same from group to group while sensitivities are measured."""

    model: ir.Model
    directory: ModelDirectory
    cache: CalibrationCache
    device: torch.device
    rough_format: Callable[[MatMulSite], QuantSpec]
    """A site's format while it is measured."""
    rule: RangeRule
    """How a block's range becomes its scale."""

    def measure(self, groups: Sequence[ActivationGroup]) -> dict[str, float]:
        """Return what each site's forecasts are to be multiplied by; tell what that will cost before it starts.

        Raises:
            GraphError: ONNX Runtime can't run the base model.
            UserError: the cache's folder can't be written.
        """
        label = self.rough_format(groups[0].sites[0]).label
        done = _read(self.cache.folder / FILE, label)
        left = unmeasured(self.cache, groups, self.rough_format)
        if left:
            done |= self._measure_missing(left, done, label)
        return {site.name: done[group.activation].factor for group in groups for site in group.sites}

    def _measure_missing(
        self, groups: Sequence[ActivationGroup], done: Mapping[str, GroupSensitivity], label: str
    ) -> dict[str, GroupSensitivity]:
        sites = [site for group in groups for site in group.sites]
        windows = few_windows(self.cache.read_tokens()[0])
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
        stats = search_to_device(self.cache.read_for_search(group.activation), self.device)
        if stats.tokens.calibration.is_silent:
            return GroupSensitivity(divergence=0.0, forecast=0.0)
        replaced: list[tuple[MatMulSite, Tensor]] = []
        forecast = 0.0
        for site in group.sites:
            weight = read_weight(self.model, site, self.device)
            rough = quick_weight(weight, self.rough_format(site), stats.tokens.calibration, self.rule)
            forecast += quick_loss(site, weight, rough, stats)
            replaced.append((site, rough))
        return GroupSensitivity(divergence=divergence(base, trials.logits(windows, replaced)), forecast=forecast)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """The file: by activation, for one format of the rough weights and one set of tokens.

    Earlier versions' groups had an ``error`` in another unit, and no ``forecast``.
    """

    format: str
    tokens: int
    groups: dict[str, GroupSensitivity]


_FILES = TypeAdapter(_Measured)


def few_windows(tokens: np.ndarray) -> np.ndarray:
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
