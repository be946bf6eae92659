"""What a search algorithm is given and what it returns: one activation group's weights and statistics; choices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from stages.quantization.search.affine import BlockParameters, RangeRule
from stages.records.formats import QuantSpec
from stages.records.results import ActivationStats
from stages.records.sites import ActivationGroup, HeadSharing


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """Numbers that steer the searches; defaults live in stages.commands.quantize_options only."""

    range_rule: RangeRule
    alpha_step: float
    clip_step: float
    clip_min: float
    column_chunk: int
    """Output channels whose clip ratios are searched at once."""
    damping: float
    """The part of the Gram matrix's mean diagonal that GPTQ adds to the diagonal."""
    act_order: bool
    """GPTQ starts with the channels of the largest activations."""
    descent_passes: int
    """Passes of coordinate descent over all columns after GPTQ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupProblem:
    """The sites that share one input scale.

    ``weights`` are [N_i, K] float32, one a site, on the device that the search runs on; ``stats`` lie there too, and
    ``output_grams``, [heads, size, size], where errors of a head's channels count together (None: each by itself).
    ``head_sharing`` is set where the scale must repeat over the query heads of a key/value head. ``rtn_baseline`` is
    rounding to nearest, which every search is compared with, where it was measured already.
    """

    group: ActivationGroup
    weights: tuple[Tensor, ...]
    specs: tuple[QuantSpec, ...]
    stats: ActivationStats | None
    output_grams: tuple[Tensor | None, ...]
    head_sharing: HeadSharing | None
    rtn_baseline: tuple[SiteChoice, ...] = ()
    own_tokens: int | None = None
    """Of an expert: calibration tokens that the router sent there."""

    @property
    def is_unseen(self) -> bool:
        """Return whether calibration never reached these sites."""
        return self.stats is not None and self.stats.calibration.is_silent


@dataclass(frozen=True, slots=True, kw_only=True)
class InputScale:
    """An AWQ scale candidate: W is multiplied by ``scale`` [K] and the activation divided by it.

    ``scale`` is None for the identity.
    """

    family: str
    alpha: float | None
    scale: Tensor | None


IDENTITY = InputScale(family="identity", alpha=None, scale=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """tr(D G D^T) over calibration and held-out tokens: mean squared output errors, summed over channels."""

    calibration: float
    held_out: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteChoice:
    """How one site is stored: the group's input scale, and scales, zero points and codes of the scaled weight.

    ``parameters`` are [N, nB]; ``codes`` [N, K] have the spec's type, or are None where they are what rounding gives.
    ``fallback`` is the choice that this one refines; it is kept where it is better on held-out tokens.
    """

    input_scale: InputScale
    parameters: BlockParameters
    codes: Tensor | None = None
    fallback: SiteChoice | None = None
    errors: Errors | None = None
    """None until they are measured."""

    def refined(self, parameters: BlockParameters, codes: Tensor | None = None) -> SiteChoice:
        """Return a choice with other numbers under the same input scale, which falls back to this one."""
        return SiteChoice(input_scale=self.input_scale, parameters=parameters, codes=codes, fallback=self)


Algorithm = Callable[[GroupProblem, SearchOptions], tuple[SiteChoice, ...]]
"""A pure function that makes one choice for every site of the group."""


COARSE_CHANNELS, FINE_CHANNELS, MEASURED_CHANNELS = 128, 256, 2048
"""Output channels of a site that candidates are compared on: coarse finds the better ones, fine the best of those (the
standard error of a difference is then some five percent of it). On so many more a choice's error is measured, against
rounding to nearest and on held-out tokens (two percent)."""


def evenly_spaced(channels: int, most: int) -> slice:
    """Return which of so many output channels stand for all, ``most`` of them at most.

    The step is odd: where rows of two projections alternate, as in fc1 of many experts, both are among them.
    """
    step = -(-channels // most)
    return slice(0, channels, step if step % 2 else step + 1)


@dataclass(frozen=True, slots=True)
class Sample:
    """At most ``channels`` output channels of each site, evenly spaced, in place of all of ``whole``."""

    whole: GroupProblem
    channels: int

    @property
    def problem(self) -> GroupProblem:
        """Return the same problem for these channels only."""
        weights = tuple(weight[evenly_spaced(len(weight), self.channels)].contiguous() for weight in self.whole.weights)
        return replace(self.whole, weights=weights, output_grams=(None,) * len(weights), rtn_baseline=())

    def joint_error(self, errors: Sequence[float]) -> float:
        """Estimate the joint error of the whole from the ``errors`` of the sample's sites."""
        return sum(
            error * len(weight) / len(weight[evenly_spaced(len(weight), self.channels)])
            for weight, error in zip(self.whole.weights, errors, strict=True)
        )
