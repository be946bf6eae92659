"""Error feedback: a layer reads what the quantized layers before it give, and makes up for it where it can.

With X_f the float model's activation and X_q the quantized one's over the same tokens, the stored weight V should make
X_q V^T what X_f W^T was. That is least squares: V = W - W drift^T G^-1 with G = X_q^T X_q / T and drift =
X_q^T (X_q - X_f) / T. The asymmetric calibration of GPTAQ (Li et al., 2025) and the target shift of GPTQ's second pass
solve the same problem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from stages.quantization.blocks.learnable_weight import effective_weight
from stages.quantization.blocks.signround import StreamPair, TunedBlock
from stages.quantization.blocks.stream import BlockContext, in_batches
from stages.quantization.search.choices import full_ranges, stored_weight
from stages.quantization.search.gptq import compensate, damped
from stages.quantization.search.problem import IDENTITY, GroupProblem, InputScale, SearchOptions
from stages.quantization.search.ranges import clip_sites
from stages.records.results import ActivationStats, QuantizedWeight, SolvedGroup, TokenStats


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedStreamStats:
    """Second-order statistics of one activation in both models, float32."""

    num_tokens: int
    gram: Float[Tensor, "K K"]
    """X_q^T X_q / T."""
    drift: Float[Tensor, "K K"]
    """X_q^T (X_q - X_f) / T: zero where nothing before was quantized."""


class QuantizedStreamAccumulator:
    """Folds batches of an activation, as both models compute it, into QuantizedStreamStats."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._num_tokens = 0
        self._gram = torch.zeros(in_features, in_features, device=device)
        self._drift = torch.zeros(in_features, in_features, device=device)

    def add(self, quantized: Float[Tensor, "*tokens K"], exact: Float[Tensor, "*tokens K"]) -> None:
        """Fold in the same tokens of both models."""
        rows = quantized.reshape(-1, quantized.shape[-1]).float()
        moved = rows - exact.reshape(-1, exact.shape[-1]).float()
        self._num_tokens += len(rows)
        self._gram.addmm_(rows.T, rows)
        self._drift.addmm_(rows.T, moved)

    def finish(self) -> QuantizedStreamStats:
        """The statistics of all tokens so far."""
        tokens = max(self._num_tokens, 1)
        return QuantizedStreamStats(num_tokens=self._num_tokens, gram=self._gram / tokens, drift=self._drift / tokens)


def target_weight(weight: Float[Tensor, "N K"], stats: QuantizedStreamStats, damping: float) -> Float[Tensor, "N K"]:
    """V, the weight that gives on X_q what ``weight`` gives on X_f, in the sense of least squares.

    ``damping`` (a part of G's mean diagonal) keeps it near ``weight``. Computed in float64 where the device has it.
    """
    precise = torch.float32 if weight.device.type == "mps" else torch.float64
    pull = weight.to(precise) @ stats.drift.to(precise).T
    shift = torch.linalg.solve(damped(stats.gram.to(precise), damping), pull, left=False)
    target: Tensor = weight.to(precise) - shift
    return target.float()


def drift_error(error: Float[Tensor, "N K"], weight: Float[Tensor, "N K"], stats: QuantizedStreamStats) -> Tensor:
    """Mean over tokens of ||X_q (W + D)^T - X_f W^T||^2 for the weight error D, less what no D can change."""
    return ((error @ stats.gram) * error).double().sum() + 2 * ((error @ stats.drift) * weight).double().sum()


def refine(
    problem: GroupProblem,
    options: SearchOptions,
    starts: tuple[QuantizedWeight, ...],
    calibration: QuantizedStreamStats,
    held_out: QuantizedStreamStats,
) -> tuple[QuantizedWeight, ...]:
    """``starts`` solved anew for the target weights, under the scale that they share, where held-out tokens agree.

    ``problem`` holds the original weights; its statistics are not read.
    """
    aimed = replace(
        problem,
        weights=tuple(target_weight(weight, calibration, options.damping) for weight in problem.weights),
        stats=ActivationStats(calibration=_token_stats(calibration), held_out=_token_stats(held_out)),
    )
    scale = IDENTITY if starts[0].input_scale is None else _scale_of(starts[0], problem.weights[0].device)
    ranges = clip_sites(aimed, options, full_ranges(aimed, options.range_rule, scale))
    solved = zip(aimed.group.sites, aimed.weights, aimed.specs, compensate(aimed, options, ranges), strict=True)
    refined = (stored_weight(site, weight, spec, choice) for site, weight, spec, choice in solved)
    return tuple(
        _better(weight, start, other, held_out)
        for weight, start, other in zip(problem.weights, starts, refined, strict=True)
    )


def _scale_of(start: QuantizedWeight, device: torch.device) -> InputScale:
    assert start.input_scale is not None
    return InputScale(family="given", alpha=None, scale=start.input_scale.to(device))


def _better(
    weight: Tensor, start: QuantizedWeight, other: QuantizedWeight, held_out: QuantizedStreamStats
) -> QuantizedWeight:
    errors = [
        float(drift_error(effective_weight(candidate, weight.device) - weight, weight, held_out))
        for candidate in (start, other)
    ]
    return other if errors[1] < errors[0] else start


def _token_stats(stats: QuantizedStreamStats) -> TokenStats:
    """What range search and GPTQ read; only the search of input scales reads mean |x|, here its root mean square."""
    return TokenStats(num_tokens=stats.num_tokens, abs_mean=torch.diagonal(stats.gram).sqrt(), gram=stats.gram)


@dataclass(frozen=True, slots=True)
class ErrorFeedback:
    """Solves a block's groups one after another, in graph order."""

    hand: BlockContext
    options: SearchOptions

    def refine_block(self, advance: Callable[[], None]) -> TunedBlock:
        """The block's sites with errors fed back, or as they start where held-out windows come out no nearer.

        ``advance`` is called behind each group. Both models' blocks are run once a group, as far as its activation.
        """
        begun = self.hand.stored
        stored = dict(begun)
        for group in self.hand.starts:
            stored |= {weight.site.name: weight for weight in self._refine_group(group, stored)}
            advance()
        losses = [self.hand.held_out_loss(weights) for weights in (begun, stored)]
        kept = stored if losses[1] < losses[0] else begun
        return TunedBlock(weights=tuple(kept.values()), start_loss=losses[0], loss=min(losses))

    def _refine_group(self, solved: SolvedGroup, stored: Mapping[str, QuantizedWeight]) -> Iterator[QuantizedWeight]:
        names = [weight.site.name for weight in solved.weights]
        weights = self.hand.effective(stored)
        calibration, held_out = (
            self._drift(pair, names[0], weights) for pair in (self.hand.calibration, self.hand.held_out)
        )
        for starts in _sharing_a_scale(tuple(stored[name] for name in names)):
            problem = GroupProblem(
                group=replace(solved.group, sites=tuple(start.site for start in starts)),
                weights=tuple(self.hand.originals[start.site.name] for start in starts),
                specs=tuple(start.spec for start in starts),
                stats=None,
                head_sharing=None,
            )
            yield from refine(problem, self.options, starts, calibration, held_out)

    def _drift(self, pair: StreamPair, site: str, weights: Mapping[str, Tensor]) -> QuantizedStreamStats:
        """Statistics of what ``site`` reads in both models."""
        original = self.hand.originals[site]
        accumulator = QuantizedStreamAccumulator(original.shape[1], original.device)
        for batch in in_batches(len(pair.wanted), self.hand.run.batch_size):
            exact, quantized = (
                self.hand.run.read(stream[batch].to(original.device), used, site)
                for stream, used in ((pair.exact, self.hand.originals), (pair.quantized, weights))
            )
            accumulator.add(quantized, exact)
        return accumulator.finish()


def _sharing_a_scale(starts: tuple[QuantizedWeight, ...]) -> list[tuple[QuantizedWeight, ...]]:
    """All together where they have one input scale, else each alone."""
    scales = [start.input_scale for start in starts]
    found = [scale for scale in scales if scale is not None]
    alike = not found or (len(found) == len(scales) and all(torch.equal(scale, found[0]) for scale in found))
    return [starts] if alike else [(start,) for start in starts]
