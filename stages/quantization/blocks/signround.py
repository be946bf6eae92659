"""SignRound: tune a block's roundings and ranges by signed gradient descent on the block's output.

Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs" (AutoRound), 2023,
https://arxiv.org/abs/2309.05516. The reference is the float block on the float stream; the tuned block reads the stream
that the blocks tuned before it make. Two things differ from the paper: tuning starts from any quantization, not only
from rounding to nearest, and what is kept is decided on windows that the descent never saw; the start is a candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from stages.quantization.blocks.learnable_weight import LearnableWeight
from stages.records.results import QuantizedWeight

BlockFunction = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
"""(stream [batch, length, hidden], weights [N, K] by site name) -> the stream behind the block."""

_CHECKS = 10
"""How often the held-out loss is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignRoundOptions:
    """Numbers that steer the descent; defaults live in stages.commands.quantize_options only."""

    iterations: int
    learning_rate: float | None
    """First step of every offset and factor; it falls linearly to 0. None: 1 / iterations, so that an offset can move
    by half a code in total."""
    batch_size: int
    """Windows in one step."""
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPair:
    """Windows in front of a block, and what is wanted behind it: [windows, length, hidden] float32, on any device.

    ``exact`` comes from the float blocks, ``quantized`` from the blocks as quantized so far; ``wanted`` is what the
    float block makes of ``exact``.
    """

    exact: Tensor
    quantized: Tensor
    wanted: Tensor

    def batch(self, indices: Tensor, device: torch.device) -> StreamPair:
        """Return the windows of ``indices``, on ``device``."""
        exact, quantized, wanted = (stream[indices].to(device) for stream in (self.exact, self.quantized, self.wanted))
        return StreamPair(exact=exact, quantized=quantized, wanted=wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedBlock:
    """The sites as they are kept, and the held-out loss at the start and of what is kept."""

    weights: tuple[QuantizedWeight, ...]
    start_loss: float
    loss: float


def block_loss(found: Float[Tensor, "*batch hidden"], wanted: Float[Tensor, "*batch hidden"]) -> Float[Tensor, ""]:
    """Return the mean over tokens of the squared error, relative to the token's own squared length.

    The next norm divides every token by its length. Without that, the few tokens whose stream is a thousand times
    longer than the others' (attention sinks) would be all that is tuned for.
    """
    return ((found - wanted).square().sum(dim=-1) / wanted.square().sum(dim=-1).clamp_min(1e-12)).mean()


def tune_block(
    run: BlockFunction,
    originals: Mapping[str, Tensor],
    starts: tuple[QuantizedWeight, ...],
    calibration: StreamPair,
    held_out: StreamPair,
    options: SignRoundOptions,
    advance: Callable[[], None],
) -> TunedBlock:
    """Tune ``starts``, the block's quantized sites; its other sites keep their original weight.

    Ensures: the held-out loss of what is returned is not above the start's.

    Args:
        run: the block.
        originals: the float32 weights [N, K] of all the block's sites by name, on the device where tuning runs.
        starts: what to begin with.
        calibration: the windows to tune on.
        held_out: the windows that decide what is kept.
        options: the numbers that steer the descent.
        advance: called after each iteration.
    """
    device = next(iter(originals.values())).device
    tuned = {start.site.name: LearnableWeight(originals[start.site.name], start) for start in starts}

    def loss_of(pair: StreamPair) -> Tensor:
        weights = {name: tuned[name].weight() if name in tuned else originals[name] for name in originals}
        return block_loss(run(pair.quantized, weights), pair.wanted)

    def held_out_loss() -> float:
        with torch.no_grad():
            parts = torch.split(torch.arange(len(held_out.wanted)), options.batch_size)
            return sum(float(loss_of(held_out.batch(part, device))) * len(part) for part in parts) / len(
                held_out.wanted
            )

    start_loss = best_loss = held_out_loss()
    best = starts
    rate = options.learning_rate or 1 / options.iterations
    for index, batch in enumerate(_batches(len(calibration.wanted), options)):
        torch.autograd.backward(loss_of(calibration.batch(batch, device)))
        for weight in tuned.values():
            weight.step(rate * (1 - index / options.iterations))
        advance()
        if is_check(index + 1, options.iterations, _CHECKS) and (loss := held_out_loss()) < best_loss:
            best, best_loss = tuple(weight.quantized() for weight in tuned.values()), loss
    return TunedBlock(weights=best, start_loss=start_loss, loss=best_loss)


def is_check(done: int, steps: int, checks: int) -> bool:
    """Return whether what is held out is measured after ``done`` steps: ``checks`` times, evenly, the last included."""
    return done * checks // steps > (done - 1) * checks // steps


def _batches(windows: int, options: SignRoundOptions) -> Iterator[Tensor]:
    """Yield the indices of every iteration's windows: all windows in a random order, then in another."""
    generator = torch.Generator().manual_seed(options.seed)
    waiting = torch.empty(0, dtype=torch.int64)
    size = min(options.batch_size, windows)
    for _ in range(options.iterations):
        if len(waiting) < size:
            waiting = torch.randperm(windows, generator=generator)
        batch, waiting = waiting[:size], waiting[size:]
        yield batch
