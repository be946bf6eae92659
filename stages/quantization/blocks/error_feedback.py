"""Error feedback (GPTAQ): solve each layer for what the quantized layers before it give, so as to correct them.

With X_f the float model's activation and X_q the quantized one's over the same tokens, the stored weight V should make
X_q V^T what X_f W^T was. That is least squares: V = W - W drift^T G^-1 with G = X_q^T X_q / T and drift =
X_q^T (X_q - X_f) / T. The asymmetric calibration of GPTAQ (Li et al., "GPTAQ: Efficient Finetuning-Free Quantization
for Asymmetric Calibration", 2025, https://arxiv.org/abs/2504.02692) and the target shift of GPTQ's second pass solve
the same problem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from stages.quantization.blocks.context import BlockContext
from stages.quantization.blocks.learnable_weight import effective_weight
from stages.quantization.blocks.signround import StreamPair, TunedBlock
from stages.quantization.search.choices import full_ranges, stored_weight
from stages.quantization.search.gptq.compensate import compensate
from stages.quantization.search.gptq.factor import damped
from stages.quantization.search.objective import mixed_outputs
from stages.quantization.search.problem import IDENTITY, GroupProblem, InputScale, SearchOptions
from stages.quantization.search.ranges import clip_sites
from stages.records.results import ActivationStats, QuantizedWeight, SolvedGroup, TokenStats
from stages.runtime.blocks.stream import in_batches


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedStreamStats:
    """Second-order statistics of one activation on the float and the quantized stream, float32."""

    num_tokens: int
    gram: Float[Tensor, "K K"]
    """X_q^T X_q / T."""
    drift: Float[Tensor, "K K"]
    """X_q^T (X_q - X_f) / T: zero where nothing before was quantized."""


class QuantizedStreamAccumulator:
    """Accumulates QuantizedStreamStats over batches of an activation, as both models compute it."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._num_tokens = 0
        self._gram = torch.zeros(in_features, in_features, device=device)
        self._drift = torch.zeros(in_features, in_features, device=device)

    def add(
        self,
        quantized: Float[Tensor, "*tokens K"],
        exact: Float[Tensor, "*tokens K"],
        weights: Float[Tensor, "*tokens"] | None = None,
    ) -> None:
        """Add the same tokens of both models; each counts by its weight where there are weights."""
        if weights is not None:
            roots = weights.sqrt().unsqueeze(-1)
            quantized, exact = quantized * roots, exact * roots
        rows = quantized.reshape(-1, quantized.shape[-1]).float()
        moved = rows - exact.reshape(-1, exact.shape[-1]).float()
        self._num_tokens += len(rows)
        self._gram.addmm_(rows.T, rows)
        self._drift.addmm_(rows.T, moved)

    def finish(self) -> QuantizedStreamStats:
        """Return the statistics of all tokens so far."""
        tokens = max(self._num_tokens, 1)
        return QuantizedStreamStats(num_tokens=self._num_tokens, gram=self._gram / tokens, drift=self._drift / tokens)


def target_weight(weight: Float[Tensor, "N K"], stats: QuantizedStreamStats, damping: float) -> Float[Tensor, "N K"]:
    """Return V, the weight that gives on X_q what ``weight`` gives on X_f, in the sense of least squares.

    Computed in float64 where the device has it.

    Args:
        weight: the original weight.
        stats: G and the drift.
        damping: the part of G's mean diagonal that keeps V near ``weight``.
    """
    precise = torch.float32 if weight.device.type == "mps" else torch.float64
    pull = weight.to(precise) @ stats.drift.to(precise).T
    shift = torch.linalg.solve(damped(stats.gram.to(precise), damping), pull, left=False)
    target: Tensor = weight.to(precise) - shift
    return target.float()


def drift_error(error: Float[Tensor, "N K"], weight: Float[Tensor, "N K"], stats: QuantizedStreamStats) -> Tensor:
    """Return the mean over tokens of ||X_q (W + D)^T - X_f W^T||^2, less what no weight error D can change.

    Args:
        error: D.
        weight: W, the original weight.
        stats: of both models' activations.
    """
    return ((error @ stats.gram) * error).double().sum() + 2 * ((error @ stats.drift) * weight).double().sum()


def refine(
    problem: GroupProblem,
    options: SearchOptions,
    starts: tuple[QuantizedWeight, ...],
    calibration: QuantizedStreamStats,
    held_out: QuantizedStreamStats,
) -> tuple[QuantizedWeight, ...]:
    """Solve ``starts`` anew for the target weights, under the scale that they share; keep what held-out tokens confirm.

    Args:
        problem: the original weights; its statistics are not read.
        options: of range search and GPTQ.
        starts: the quantization of each site to begin with.
        calibration: what the target weights are computed from.
        held_out: what decides, site by site, whether the start stays.
    """
    aimed = replace(
        problem,
        weights=tuple(target_weight(weight, calibration, options.damping) for weight in problem.weights),
        stats=ActivationStats(calibration=_token_stats(calibration), held_out=_token_stats(held_out)),
    )
    scale = IDENTITY if starts[0].input_scale is None else _scale_of(starts[0], problem.weights[0].device)
    ranges = clip_sites(aimed, options, full_ranges(aimed, options.range_rule, scale))
    solved = zip(aimed.group.sites, aimed.weights, aimed.specs, compensate([aimed], options, [ranges])[0], strict=True)
    refined = (stored_weight(site, weight, spec, choice) for site, weight, spec, choice in solved)
    return tuple(
        _better(weight, output_gram, start, other, held_out)
        for weight, output_gram, start, other in zip(
            problem.weights, problem.output_grams, starts, refined, strict=True
        )
    )


def _scale_of(start: QuantizedWeight, device: torch.device) -> InputScale:
    assert start.input_scale is not None
    return InputScale(family="given", alpha=None, scale=start.input_scale.to(device))


def _better(
    weight: Tensor,
    output_gram: Tensor | None,
    start: QuantizedWeight,
    other: QuantizedWeight,
    held_out: QuantizedStreamStats,
) -> QuantizedWeight:
    mixed = mixed_outputs(weight, output_gram)
    found = (effective_weight(candidate, weight.device) for candidate in (start, other))
    errors = [float(drift_error(mixed_outputs(each, output_gram) - mixed, mixed, held_out)) for each in found]
    return other if errors[1] < errors[0] else start


def _token_stats(stats: QuantizedStreamStats) -> TokenStats:
    """Return what range search and GPTQ read; mean |x|, which they don't read, is the root mean square here."""
    return TokenStats(num_tokens=stats.num_tokens, abs_mean=torch.diagonal(stats.gram).sqrt(), gram=stats.gram)


@dataclass(frozen=True, slots=True)
class ErrorFeedback:
    """Solves a block's groups one after another, in graph order."""

    block: BlockContext
    options: SearchOptions

    def refine_block(self, advance: Callable[[], None]) -> TunedBlock:
        """Solve the block's sites with error feedback; keep the start where the held-out loss doesn't fall.

        Experts stay: routers send other tokens to them than in the float model. ``advance`` is called after each
        group. Both models' blocks run once a group, as far as its activation.
        """
        start = self.block.stored
        stored = dict(start)
        for group in self.block.starts:
            if not group.group.is_of_expert:
                stored |= {weight.site.name: weight for weight in self._refine_group(group, stored)}
            advance()
        losses = [self.block.held_out_loss(weights) for weights in (start, stored)]
        kept = stored if losses[1] < losses[0] else start
        return TunedBlock(weights=tuple(kept.values()), start_loss=losses[0], loss=min(losses))

    def _refine_group(self, solved: SolvedGroup, stored: Mapping[str, QuantizedWeight]) -> Iterator[QuantizedWeight]:
        names = [weight.site.name for weight in solved.weights]
        weights = self.block.effective(stored)
        counts = self.block.searched[solved.group.activation].token_weights
        seen, unseen = (None, None) if counts is None else (counts.calibration, counts.held_out)
        calibration = self._drift(self.block.calibration, names[0], weights, seen)
        held_out = self._drift(self.block.held_out, names[0], weights, unseen)
        for starts in _by_input_scale(tuple(stored[name] for name in names)):
            problem = GroupProblem(
                group=replace(solved.group, sites=tuple(start.site for start in starts)),
                weights=tuple(self.block.originals[start.site.name] for start in starts),
                specs=tuple(start.spec for start in starts),
                stats=None,
                output_grams=tuple(self._output_gram(solved, start) for start in starts),
                head_sharing=None,
            )
            yield from refine(problem, self.options, starts, calibration, held_out)

    def _output_gram(self, solved: SolvedGroup, start: QuantizedWeight) -> Tensor | None:
        found = self.block.searched[solved.group.activation].output_grams.get(start.site.name)
        return None if found is None else found.to(self.block.originals[start.site.name].device)

    def _drift(
        self, pair: StreamPair, site: str, weights: Mapping[str, Tensor], counts: Tensor | None
    ) -> QuantizedStreamStats:
        """Return the statistics of what ``site`` reads in both models.

        Args:
            pair: the windows in front of the block.
            site: the name of the site.
            weights: of the block as it is quantized so far.
            counts: how much each token counts, [windows, length]; None: all alike.
        """
        original = self.block.originals[site]
        accumulator = QuantizedStreamAccumulator(original.shape[1], original.device)
        for batch in in_batches(len(pair.wanted), self.block.run.batch_size):
            exact, quantized = (
                self.block.run.read(stream[batch].to(original.device), used, site)
                for stream, used in ((pair.exact, self.block.originals), (pair.quantized, weights))
            )
            accumulator.add(quantized, exact, None if counts is None else counts[batch].to(original.device))
        return accumulator.finish()


def _by_input_scale(starts: tuple[QuantizedWeight, ...]) -> list[tuple[QuantizedWeight, ...]]:
    """Keep all together where they have one input scale, else return each by itself."""
    scales = [start.input_scale for start in starts]
    found = [scale for scale in scales if scale is not None]
    alike = not found or (len(found) == len(scales) and all(torch.equal(scale, found[0]) for scale in found))
    return [starts] if alike else [(start,) for start in starts]
