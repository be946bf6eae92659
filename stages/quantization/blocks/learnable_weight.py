"""A quantized weight that gradient descent can tune: an offset for every rounding, a factor for every range.

    scale = stored(S * (high * (top - z) + low * z) / top),   zero point = round(z * low * S / scale)
    code  = clamp(round(w / scale + offset) + zero point),    weight = (code - zero point) * scale / input scale

with S and z the scale and zero point that the weight starts with, w the weight times its input scale, and top the
largest code; without zero points scale = stored(S * high). Rounding passes gradients through unchanged
(straight-through estimator), as in SignRound (Cheng et al., 2023, https://arxiv.org/abs/2309.05516).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stages.quantization.search.affine import BlockParameters, dequantize, join, levels, round_to_storage, split
from stages.records.formats import torch_float
from stages.records.results import QuantizedWeight

_SMALLEST_FACTOR, _LARGEST_FACTOR = 0.25, 1.5
_FROM_CENTRE = 0.25
"""Where a code that rounding doesn't give starts: this far from the middle of its interval, on the weight's side."""


class LearnableWeight:
    """One site's weight while it is tuned.

    ``offsets`` [N, nB, B] and the factors ``high`` and ``low`` [N, nB] are the leaves to tune; ``low`` is None where
    there are no zero points.
    """

    def __init__(self, weight: Float[Tensor, "N K"], start: QuantizedWeight) -> None:
        """Begin exactly at ``start``; ``weight`` is the original one in float32, on the device where tuning runs."""
        self._start = start
        self._in_features = weight.shape[1]
        self._input_scale = None if start.input_scale is None else start.input_scale.to(weight.device)
        scaled = weight if self._input_scale is None else weight * self._input_scale
        self._blocks = split(scaled, start.spec.block_size(self._in_features))
        self._parameters = _parameters(start, weight.device)
        codes = split(start.codes.to(weight.device).float(), self._blocks.shape[-1])
        self.offsets = _offsets(self._blocks, codes, self._parameters, start).requires_grad_()
        self.high = torch.ones_like(self._parameters.scales).requires_grad_()
        self.low = None if start.zero_points is None else torch.ones_like(self.high).requires_grad_()

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """Return the tensors to tune."""
        return (self.offsets, self.high) if self.low is None else (self.offsets, self.high, self.low)

    def weight(self) -> Float[Tensor, "N K"]:
        """Return what the site multiplies its unscaled activation with; differentiable in the leaves."""
        parameters = self._tuned_parameters()
        spec = self._start.spec
        stored: Tensor = _RoundTrip.apply(  # type: ignore[no-untyped-call]
            self._blocks, self.offsets, parameters.scales, parameters.zero_points, spec.code_min, spec.code_max
        )
        joined = join(stored, self._in_features)
        return joined if self._input_scale is None else joined / self._input_scale

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move every leaf against its gradient's sign by ``rate``, and forget the gradients."""
        for leaf in self.leaves:
            if leaf.grad is not None:
                leaf.sub_(leaf.grad.sign_(), alpha=rate)
                leaf.grad = None
        for factor in self.leaves[1:]:
            factor.clamp_(_SMALLEST_FACTOR, _LARGEST_FACTOR)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """Return the codes, scales and zero points as they stand, on the CPU."""
        parameters, spec = self._tuned_parameters(), self._start.spec
        codes = _codes(self._blocks, self.offsets, parameters, spec.code_min, spec.code_max)
        zero_points = parameters.zero_points
        return QuantizedWeight(
            site=self._start.site,
            spec=spec,
            codes=join(codes, self._in_features).to(spec.code_dtype).cpu(),
            scales=parameters.scales.to(torch_float(spec.scale_dtype)).cpu(),
            zero_points=None if zero_points is None else zero_points.to(torch.uint8).cpu(),
            input_scale=self._start.input_scale,
        )

    def _tuned_parameters(self) -> BlockParameters:
        start, spec = self._parameters, self._start.spec
        if start.zero_points is None or self.low is None:
            scales = _through(start.scales * self.high, lambda wide: round_to_storage(wide, spec.scale_dtype))
            return BlockParameters(scales=scales, zero_points=None)
        above, below = self.high * (spec.code_max - start.zero_points), self.low * start.zero_points
        wide = start.scales * ((above + below) / spec.code_max)
        scales = _through(wide, lambda wide: round_to_storage(wide, spec.scale_dtype))
        places = (below * start.scales / scales).clamp(spec.code_min, spec.code_max)
        return BlockParameters(scales=scales, zero_points=_through(places, torch.round))


def effective_weight(quantized: QuantizedWeight, device: torch.device) -> Float[Tensor, "N K"]:
    """Return the weight that ``quantized`` stands for, as the unscaled activation sees it, in float32."""
    size = quantized.spec.block_size(quantized.codes.shape[1])
    codes = split(quantized.codes.to(device).float(), size)
    stored = join(dequantize(codes, _parameters(quantized, device)), quantized.codes.shape[1])
    return stored if quantized.input_scale is None else stored / quantized.input_scale.to(device)


def _parameters(quantized: QuantizedWeight, device: torch.device) -> BlockParameters:
    zero_points = quantized.zero_points
    return BlockParameters(
        scales=quantized.scales.to(device).float(),
        zero_points=None if zero_points is None else zero_points.to(device).float(),
    )


def _offsets(blocks: Tensor, codes: Tensor, parameters: BlockParameters, start: QuantizedWeight) -> Tensor:
    """Return 0 where rounding gives the code already, else what leads into the code's interval."""
    spec = start.spec
    zeros = torch.zeros_like(blocks)
    rounded = _codes(blocks, zeros, parameters, spec.code_min, spec.code_max)
    distance = levels(codes, parameters) - blocks / parameters.scales.unsqueeze(-1)
    return torch.where(rounded == codes, zeros, distance - _FROM_CENTRE * distance.sign())


def _codes(blocks: Tensor, offsets: Tensor, parameters: BlockParameters, code_min: int, code_max: int) -> Tensor:
    codes = torch.round(blocks / parameters.scales.unsqueeze(-1) + offsets)
    if parameters.zero_points is not None:
        codes = codes + parameters.zero_points.unsqueeze(-1)
    return codes.clamp_(code_min, code_max)


def _through(value: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``function(value)`` with the gradient of the identity."""
    return value + (function(value) - value).detach()


class _RoundTrip(torch.autograd.Function):
    """Quantize and dequantize with straight-through gradients, in few passes over the weight.

    Where a code lies inside its range, the weight follows its offset; where it is clamped, the scale and zero point.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's context
        blocks: Tensor,
        offsets: Tensor,
        scales: Tensor,
        zero_points: Tensor | None,
        code_min: int,
        code_max: int,
    ) -> Tensor:
        ratios = blocks / scales.unsqueeze(-1)
        rounded = torch.round(ratios + offsets)
        shift = 0.0 if zero_points is None else zero_points.unsqueeze(-1)
        clamped = (rounded + shift).clamp_(code_min, code_max) - shift
        inside = clamped == rounded
        ctx.save_for_backward(scales, inside, torch.where(inside, clamped - ratios, clamped))
        ctx.has_zero_points = zero_points is not None
        return clamped * scales.unsqueeze(-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        scales, inside, by_scale = ctx.saved_tensors
        within = gradient * inside
        of_zero_points = None
        if ctx.has_zero_points:
            of_zero_points = (within - gradient).sum(dim=-1) * scales
        of_offsets = within * scales.unsqueeze(-1)
        return None, of_offsets, (gradient * by_scale).sum(dim=-1), of_zero_points, None, None
