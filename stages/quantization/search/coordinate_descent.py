"""Coordinate descent on codes and scales over the whole output error.

Behdin et al., "QuantEase: Optimization-based Quantization for Language Models", 2023, https://arxiv.org/abs/2309.01885.
Each step sets one number to its best value while all others stay: a code of column k, or the scale of a block. The
error tr(D G D^T) never grows, and blocks compensate for each other's errors, which neither range search nor GPTQ's
single pass does.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from stages.quantization.search.affine import BlockParameters, one_of, round_to_storage, side_by_side
from stages.records.formats import PerBlock, QuantSpec

_AT_ONCE = 4
"""Channels of a head whose codes change together: fewer are slower, and with many the error can grow."""
_LEAST_STEPS = 16
"""Steps in which a head's channels change, where it has as many: in a small head each channel changes by itself."""
_TILE, _STEP = 128, 32
"""Columns whose gradients are computed by one product, and those in between which single changes are carried on."""


def coordinate_descent(
    weights: Float[Tensor, "*problems N K"],
    codes: Float[Tensor, "*problems N K"],
    parameters: BlockParameters,
    spec: QuantSpec,
    grams: Float[Tensor, "*problems K K"],
    passes: int,
) -> tuple[Float[Tensor, "*problems N K"], BlockParameters]:
    """Improve codes and scales in ``passes`` over all columns, of E matrices at once or of one; zero points stay.

    Scales of whole rows (INT8 per channel) stay too: their codes are fine enough.

    Args:
        weights: the weights, times their input scales.
        codes: what to start from, integers in float32.
        parameters: the scales and zero points to start from.
        spec: the format that the weights are stored in.
        grams: the Gram matrix of each, with a positive diagonal.
        passes: how often each code is visited.

    Returns:
        The codes, and the parameters that go with them.
    """
    if weights.ndim == 2:
        alone = side_by_side([parameters])
        found, fitted = coordinate_descent(weights[None], codes[None], alone, spec, grams[None], passes)
        return found[0], one_of(fitted, 0)
    in_features = weights.shape[2]
    block_size = spec.block_size(in_features)
    state = _Descent(weights, codes, parameters, spec, grams)
    blockwise = isinstance(spec.granularity, PerBlock)
    tile = max(_TILE, block_size) if blockwise else _TILE
    for _ in range(passes):
        for start in range(0, in_features, tile):
            state.visit(start, min(start + tile, in_features), refit_blocks=blockwise)
    return state.codes.permute(1, 2, 0).contiguous(), BlockParameters(
        scales=state.scales.permute(1, 2, 0).contiguous(), zero_points=parameters.zero_points
    )


class _Descent:
    """The state of a descent; tensors are [K, E, N], so that a column of the weights is contiguous."""

    def __init__(
        self, weights: Tensor, codes: Tensor, parameters: BlockParameters, spec: QuantSpec, grams: Tensor
    ) -> None:
        self._spec, self._grams = spec, grams
        self._block_size = spec.block_size(weights.shape[2])
        self._weight = weights.permute(2, 0, 1).contiguous()
        self.codes = codes.permute(2, 0, 1).contiguous()
        self.scales = parameters.scales.permute(2, 0, 1).contiguous()
        zero_points = parameters.zero_points
        self._zero_points = (
            torch.zeros_like(self.scales) if zero_points is None else zero_points.permute(2, 0, 1).contiguous()
        )
        self._error = torch.empty_like(self._weight)
        self._update_errors(0, len(self._weight))
        self._diagonal = torch.diagonal(grams, dim1=1, dim2=2).T.unsqueeze(-1)  # [K, E, 1]

    def visit(self, start: int, stop: int, *, refit_blocks: bool) -> None:
        """Improve the codes of some columns one by one, and each block's scale after its columns.

        Args:
            start: the first column, which begins a block where scales are improved.
            stop: the column behind the last.
            refit_blocks: whether scales are improved too.
        """
        gradient = self._product(slice(start, stop), slice(None), self._error)  # half the derivative by each weight
        step = min(_STEP, self._block_size) if refit_blocks else _STEP
        first = start
        while first < stop:
            last = min(first + step, stop)
            if refit_blocks:
                block = first // self._block_size
                last = min(last, (block + 1) * self._block_size)
            moved = self._choose_codes(first, last, gradient[first - start : last - start])
            begun = block * self._block_size if refit_blocks else last
            gradient[begun - start :] += self._product(slice(begun, stop), slice(first, last), moved)
            if refit_blocks and (last % self._block_size == 0 or last == len(self._weight)):
                moved = self._refit_scale(block, gradient[begun - start : last - start])
                gradient[last - start :] += self._product(slice(last, stop), slice(begun, last), moved)
            first = last

    def _update_errors(self, start: int, stop: int) -> None:
        """Compute the errors of some columns from their codes and scales."""
        block = torch.arange(start, stop, device=self.codes.device) // self._block_size
        steps = self.codes[start:stop] - self._zero_points[block]
        torch.mul(steps, self.scales[block], out=self._error[start:stop]).sub_(self._weight[start:stop])

    def _product(self, rows: slice, columns: slice, values: Float[Tensor, "k E N"]) -> Float[Tensor, "rows E N"]:
        """Return a part of each Gram matrix times ``values``."""
        products = [gram[rows, columns] @ values[:, index] for index, gram in enumerate(self._grams)]
        return products[0].unsqueeze(1) if len(products) == 1 else torch.stack(products, dim=1)

    def _choose_codes(self, start: int, stop: int, gradient: Float[Tensor, "k E N"]) -> Float[Tensor, "k E N"]:
        """Set some columns' codes, one after another, to the best; return how their errors changed."""
        pulls = self._grams[:, start:stop, start:stop].permute(2, 1, 0).unsqueeze(-1)  # [column, row, E, 1]
        gradient, before = gradient.clone(), self._error[start:stop].clone()
        blocks = torch.arange(start, stop, device=self.codes.device) // self._block_size
        scales = self.scales[blocks]
        curvatures = scales * self._diagonal[start:stop]
        columns = zip(
            self.codes[start:stop].unbind(), scales.unbind(), curvatures.unbind(), gradient.unbind(), pulls.unbind(),
            strict=True,
        )  # fmt: skip
        for behind, (code, scale, curvature, slope, pull) in enumerate(columns, start=1):
            best = torch.addcdiv(code, slope, curvature, value=-1)
            best.round_().clamp_(self._spec.code_min, self._spec.code_max)
            gradient[behind:].addcmul_(pull[behind:], (best - code).mul_(scale))
            code.copy_(best)
        self._update_errors(start, stop)
        return self._error[start:stop] - before

    def _refit_scale(self, block: int, gradient: Float[Tensor, "B E N"]) -> Float[Tensor, "B E N"]:
        """Set a block's scale to the best, given the gradient of its columns; return how their errors changed."""
        columns = slice(block * self._block_size, min((block + 1) * self._block_size, len(self._weight)))
        steps = self.codes[columns] - self._zero_points[block]
        slope = (steps * gradient).sum(dim=0)
        curvature = (steps * self._product(columns, columns, steps)).sum(dim=0)
        known = self.scales[block]
        wanted = known - slope / curvature.clamp_min(torch.finfo(curvature.dtype).tiny)
        change = round_to_storage(torch.where(wanted * known > 0, wanted, known), self._spec.scale_dtype) - known
        gain = change * (2 * slope + change * curvature)
        change = torch.where(gain < 0, change, torch.zeros_like(change))
        self.scales[block] += change
        moved = steps * change
        self._error[columns] += moved
        return moved


def two_sided_descent(
    weight: Float[Tensor, "N K"],
    codes: Float[Tensor, "N K"],
    parameters: BlockParameters,
    spec: QuantSpec,
    gram: Float[Tensor, "K K"],
    output_gram: Float[Tensor, "heads size size"],
) -> Float[Tensor, "N K"]:
    """Improve codes in one pass over all columns where errors of a head's output channels count together.

    The error is tr(H D G D^T) with H the block diagonal of ``output_gram`` (Tseng et al., "Model-Preserving Adaptive
    Rounding", 2025, https://arxiv.org/abs/2505.22988, minimize it by another way of rounding). A step sets a few
    channels of each head in one column to the best values that each has while all others stay. Scales stay.

    Args:
        weight: the weight, times its input scale.
        codes: what to start from, integers in float32.
        parameters: their scales and zero points.
        spec: the format that the weight is stored in.
        gram: G, with a positive diagonal.
        output_gram: the blocks of H, with a positive diagonal.
    """
    in_features, (heads, size, _) = weight.shape[1], output_gram.shape
    least = max(size // _AT_ONCE, min(size, _LEAST_STEPS))
    steps = next(steps for steps in range(least, size + 1) if size % steps == 0)

    def in_steps(values: Float[Tensor, "N k"]) -> Float[Tensor, "k heads steps channels"]:
        """Put the channels of a head together that change together: every ``steps``-th of them."""
        return values.T.reshape(-1, heads, size // steps, steps).transpose(2, 3).contiguous()

    def by_steps(gram: Float[Tensor, "heads size size"]) -> Float[Tensor, "heads size size"]:
        place = torch.arange(size, device=gram.device).view(-1, steps).T.flatten()
        return gram[:, place][:, :, place]

    gram_of_outputs = by_steps(output_gram)
    pulls = gram_of_outputs.view(heads, steps, -1, size).transpose(0, 1).contiguous().unbind()
    curvature = torch.diagonal(gram_of_outputs, dim1=-2, dim2=-1).view(heads, steps, -1)
    block = torch.arange(in_features, device=weight.device) // spec.block_size(in_features)
    scales, chosen = in_steps(parameters.scales)[block], in_steps(codes)
    error = chosen if parameters.zero_points is None else chosen - in_steps(parameters.zero_points)[block]
    error = (error * scales - in_steps(weight)).view(in_features, -1)
    for start in range(0, in_features, _STEP):
        stop = min(start + _STEP, in_features)
        gradient = gram[start:stop] @ error
        for column in range(start, stop):
            own, scale, code = gram[column, column], scales[column], chosen[column]
            before = code.clone()
            pull = (gradient[column - start].view(heads, 1, size) @ gram_of_outputs).div_(own)
            parts = zip(
                code.unbind(1), scale.unbind(1), (curvature * scale).unbind(1), pull.view_as(code).unbind(1), pulls,
                strict=True,
            )  # fmt: skip
            for part, step, bend, slope, reach in parts:
                best = torch.addcdiv(part, slope, bend, value=-1).round_().clamp_(spec.code_min, spec.code_max)
                pull.baddbmm_((best - part).mul_(step).unsqueeze(1), reach)
                part.copy_(best)
            moved = ((code - before) * scale).flatten()
            error[column] += moved
            gradient[column + 1 - start :].addr_(gram[column + 1 : stop, column], moved)
    return chosen.transpose(2, 3).reshape(in_features, -1).T.contiguous()
