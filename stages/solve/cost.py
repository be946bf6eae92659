"""What a search costs: the operations of each algorithm, counted by hand, and how fast this device does each kind.

The one place to change when an algorithm changes; tests hold the counts against those of real runs. Counts are of
multiplications and weights, not of seconds: those come from ``measure_rates``, which times the project's own functions
on one small problem.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, fields
from statistics import median

import torch

from stages.records import ActivationGroup, PerChannel, QuantSpec, TokenStats
from stages.solve.affine import choose_parameters, round_trip
from stages.solve.blocks import split
from stages.solve.descent import descend
from stages.solve.evaluate import rows_per_chunk
from stages.solve.factor import inverse_factor
from stages.solve.gptq import gptq_codes
from stages.solve.objective import gram_blocks, output_error
from stages.solve.problem import SearchOptions
from stages.solve.ranges import clip_ratio_grid, site_ranges

# --------------------------------------------------------------------------- what is counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Operations by kind."""

    products: int | float = 0
    """Multiplications with a Gram matrix (or with tokens' own rows): N * K * K for the error of an [N, K] weight."""
    rounded: int | float = 0
    """Weights that a scale is chosen for and that go to codes and back."""
    ranged: int | float = 0
    """Weights whose blocks' ranges are searched, with all clip ratios and refits."""
    factored: int | float = 0
    """K ** 3 of every Gram matrix whose inverse is factored."""
    compensated: int | float = 0
    """Weights whose codes GPTQ chooses."""
    descended: int | float = 0
    """Weights that a walk of coordinate descent visits."""

    def __add__(self, other: Work) -> Work:
        return Work(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(Work)})

    def times(self, factor: int | float) -> Work:
        """The same, ``factor`` times."""
        return Work(**{field.name: getattr(self, field.name) * factor for field in fields(Work)})


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsForm:
    """Tokens whose own rows are kept, on each part of the text; None where their Gram matrix is."""

    calibration_rows: int | None = None
    held_out_rows: int | None = None


# --------------------------------------------------------------------------- counts

_GLANCED, _LOOKED = 128, 256
"""Output channels that all input scales, and the best of them, are compared on (stages.solve.sample)."""
_SECOND_LOOKS = 1 + 8
"""Input scales that awq_lite looks at again, the identity among them (stages.solve.awq)."""
_SHORTLISTED = 1 + 5
"""Input scales whose ranges are searched before one is chosen, likewise (stages.solve.awq_full)."""
_REFITS = 3
"""Refits of scale and codes behind the clip ratios (stages.solve.ranges)."""
_STRIP = 256
"""Rows of D^T D that are computed at once, up to the diagonal (stages.solve.objective)."""
_LARGEST_TIMED_BLOCK = 256
"""Products inside blocks up to this size are part of ``ranged``'s rate; whole rows have products of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Some of a group's output channels: all of them, or a sample."""

    in_features: int
    weights: int
    per_channel: int
    """Weights of sites whose scale spans a whole row."""
    form: StatisticsForm
    options: SearchOptions

    def measured(self, *parts: int | None) -> Work:
        """Errors of all sites on some parts of the text at once, whose kept rows, or None, are given.

        Gram matrices are multiplied with the half of D^T D that all have in common, rows each for itself.
        """
        rows = sum(part for part in parts if part is not None)
        half = (self.in_features + _STRIP) / 2 if None in parts else 0
        return Work(products=self.weights * (half + rows), rounded=self.weights)

    def judged(self) -> Work:
        """Errors on calibration and held-out text."""
        return self.measured(self.form.calibration_rows, self.form.held_out_rows)

    def compared(self, scales: int) -> Work:
        """Errors of so many input scales at full range on the calibration text."""
        depth = self.in_features if self.form.calibration_rows is None else self.form.calibration_rows
        return Work(products=self.weights * depth, rounded=self.weights).times(scales)

    def ranges(self) -> Work:
        """One range search of all sites."""
        evaluations = len(clip_ratio_grid(self.options.clip_min, self.options.clip_step)) + 2 * _REFITS
        return Work(ranged=self.weights, products=self.per_channel * evaluations * self.in_features)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """One group, whole and in samples."""

    whole: _Part
    glance: _Part
    look: _Part

    @property
    def scales(self) -> int:
        """Every exponent of both families, and the identity."""
        return 1 + 2 * round(1 / self.whole.options.alpha_step)


def _around(sizes: _Sizes) -> Work:
    """What every search by statistics begins and ends with: plain rounding, the outputs' energy, the codes."""
    energy = sizes.whole.judged()
    return sizes.whole.judged() + Work(products=energy.products, rounded=sizes.whole.weights)


def _rounding(sizes: _Sizes) -> Work:
    return Work(rounded=sizes.whole.weights)


def _awq_lite(sizes: _Sizes) -> Work:
    looks = sizes.glance.compared(sizes.scales) + sizes.look.compared(_SECOND_LOOKS)
    return _around(sizes) + looks + sizes.whole.judged()


def _clipping(sizes: _Sizes) -> Work:
    """The ranges of all sites, taken or left by the errors with them and without."""
    return sizes.whole.ranges() + sizes.whole.judged().times(2)


def _awq_clip(sizes: _Sizes) -> Work:
    return _around(sizes) + _clipping(sizes)


def _awq_full(sizes: _Sizes) -> Work:
    tried = sizes.look.ranges() + sizes.look.measured(sizes.look.form.calibration_rows)
    return _awq_clip(sizes) + sizes.glance.compared(sizes.scales) + tried.times(_SHORTLISTED)


def _compensation(sizes: _Sizes) -> Work:
    """GPTQ, whose later columns hear of half the others, and walks that multiply all with the Gram matrix."""
    whole = sizes.whole
    passes = whole.options.descent_passes
    steps = Work(
        factored=float(whole.in_features) ** 3,
        products=whole.weights * whole.in_features * (0.5 + passes),
        compensated=whole.weights,
        descended=passes * whole.weights,
    )
    # Codes are there already when errors are measured: nothing is rounded.
    return steps + Work(products=whole.judged().products).times(2 if passes else 1)


_COUNTS: Mapping[str, Callable[[_Sizes], Work]] = {
    "rtn": _rounding,
    "rtn_dq": _rounding,
    "awq_lite": _awq_lite,
    "awq_clip": _awq_clip,
    "awq_full": _awq_full,
    "gptq": lambda sizes: _awq_clip(sizes) + _compensation(sizes),
    "awq_gptq": lambda sizes: _awq_full(sizes) + _compensation(sizes),
}


def count_work(
    algorithm: str,
    group: ActivationGroup,
    specs: Mapping[str, QuantSpec],
    form: StatisticsForm,
    options: SearchOptions,
) -> Work:
    """The operations that ``algorithm`` takes for ``group``, whose sites become ``specs``."""

    def part(channels: int | None) -> _Part:
        """At most so many output channels of every site, or all."""
        rows = {site.name: _sampled(site.out_features, channels) for site in group.sites}
        whole_rows = [site.name for site in group.sites if isinstance(specs[site.name].granularity, PerChannel)]
        return _Part(
            in_features=group.in_features,
            weights=group.in_features * sum(rows.values()),
            per_channel=group.in_features * sum(rows[name] for name in whole_rows),
            form=form,
            options=options,
        )

    return _COUNTS[algorithm](_Sizes(whole=part(None), glance=part(_GLANCED), look=part(_LOOKED)))


def _sampled(rows: int, at_most: int | None) -> int:
    """Rows that are left of evenly spaced ones."""
    return rows if at_most is None else -(-rows // -(-rows // at_most))


# --------------------------------------------------------------------------- rates

_CHANNELS = 1024
"""Inputs of the weight that products and roundings are timed on."""
_FACTORED = 768
"""Channels of the Gram matrix whose factorization is timed."""
_WALKED = 128
"""Inputs of the weights that walks over columns are timed on: one tile, so that products between tiles aren't in it."""
_REPEATS = 3


def measure_rates(device: torch.device, spec: QuantSpec, options: SearchOptions) -> Work:
    """How much of each kind of work ``device`` does in a second, with ``spec``'s formats, by the clock.

    Takes a few seconds.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(options.column_chunk, _CHANNELS, generator=generator).to(device)
    stats = TokenStats(
        num_tokens=_CHANNELS,
        abs_mean=torch.ones(_CHANNELS, device=device),
        gram=_gram(_CHANNELS, generator, device),
    )
    size = min(spec.block_size(_CHANNELS), _LARGEST_TIMED_BLOCK)
    gram = None if isinstance(spec.granularity, PerChannel) else gram_blocks(stats, size)
    many = weight.repeat(-(-rows_per_chunk(weight) // len(weight)), 1)
    walked = weight[:, :_WALKED].contiguous()
    few, large = (_gram(channels, generator, device) for channels in (_WALKED, _FACTORED))
    parameters = choose_parameters(split(walked, spec.block_size(_WALKED)), spec)
    factor = inverse_factor(few, options.damping, act_order=options.act_order)
    codes = gptq_codes(walked, parameters, spec, factor)

    def seconds(call: Callable[[], object]) -> float:
        return _seconds(call, device)

    return Work(
        products=weight.numel() * _CHANNELS / seconds(lambda: output_error(weight, stats)),
        rounded=many.numel() / seconds(lambda: _there_and_back(many, spec)),
        ranged=weight.numel() / seconds(lambda: site_ranges(weight, spec, gram, options)),
        factored=float(_FACTORED) ** 3 / seconds(lambda: inverse_factor(large, options.damping, act_order=True)),
        compensated=walked.numel() / seconds(lambda: gptq_codes(walked, parameters, spec, factor)),
        descended=walked.numel() / seconds(lambda: descend(walked, codes, parameters, spec, few, 1)),
    )


def _gram(channels: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    rows = torch.randn(2 * channels, channels, generator=generator)
    return (rows.T @ rows / len(rows)).to(device)


def _there_and_back(weight: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    blocks = split(weight, spec.block_size(weight.shape[1]))
    return round_trip(blocks, choose_parameters(blocks, spec), spec).sub_(blocks)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The median of a few runs, after one that warms up: what other processes take now, they will take then."""
    times = []
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return max(median(times[1:]), 1e-9)


def estimated_seconds(work: Work, rates: Work) -> float:
    """The time that ``work`` takes at these ``rates``."""
    return float(sum(amount / rate for amount, rate in zip(astuple(work), astuple(rates), strict=True)))
