"""Coordinate descent on codes and scales over the whole output error.

Behdin et al., "QuantEase: Optimization-based Quantization for Language Models", 2023, https://arxiv.org/abs/2309.01885.
Each step sets one number to its best value while all others stay: a code of column k, or the scale of a block. The
error tr(D G D^T) never grows, and blocks compensate for each other's errors, which neither range search nor GPTQ's
single pass does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from stages.quantization.search.affine import round_to_storage
from stages.quantization.search.gptq.columns import ColumnParameters, ColumnSteps
from stages.quantization.search.objective import columns_at_once
from stages.records.formats import PerBlock, QuantSpec

_AT_ONCE = 4
"""Channels of a head whose codes change together: fewer are slower, and with many the error can grow."""
_LEAST_STEPS = 16
"""Steps in which a head's channels change, where it has as many: in a small head each channel changes by itself."""
_STEP = 16
"""Columns between which single changes are carried on."""


def coordinate_descent(
    weights: Float[Tensor, "E K N"],
    codes: Float[Tensor, "E K N"],
    parameters: ColumnParameters,
    spec: QuantSpec,
    grams: Float[Tensor, "E K K"],
    passes: int,
) -> tuple[Float[Tensor, "E K N"], ColumnParameters]:
    """Improve codes and scales in ``passes`` over all columns, of E matrices at once; zero points stay.

    Scales of whole rows (INT8 per channel) stay too: their codes are fine enough.

    Args:
        weights: the weights, times their input scales; a column is a row here.
        codes: what to start from, integers in float32.
        parameters: the scales and zero points to start from.
        spec: the format that the weights are stored in.
        grams: the Gram matrix of each, with a positive diagonal.
        passes: how often each code is visited.

    Returns:
        The codes, and the parameters that go with them.
    """
    state = _Descent(weights, codes, parameters, spec, grams)
    for _ in range(passes):
        state.visit_all()
    return state.codes, ColumnParameters(scales=state.scales, zero_points=parameters.zero_points)


class _Descent:
    """The state of a descent."""

    def __init__(
        self,
        weights: Float[Tensor, "E K N"],
        codes: Float[Tensor, "E K N"],
        parameters: ColumnParameters,
        spec: QuantSpec,
        grams: Float[Tensor, "E K K"],
    ) -> None:
        self._grams = grams
        width, rows = weights.shape[1:]
        self._refits = isinstance(spec.granularity, PerBlock)
        self._block_size = spec.block_size(width)
        self._tile = min(max(columns_at_once(width), self._block_size if self._refits else 1), width)
        self._chunk = min(self._block_size if self._refits else self._tile, width)
        self._steps = ColumnSteps(min(_STEP, self._chunk), weights, spec, one_scale=True)
        self.codes, self.scales = codes.clone(), parameters.scales.clone()
        self._zero_points = parameters.zero_points
        self._diagonal = torch.diagonal(grams, dim1=1, dim2=2).T.unsqueeze(-1).contiguous()  # [K, E, 1]
        self._gradient = weights.new_empty(len(weights), self._tile, rows)
        work = weights.new_empty(3, len(weights), self._chunk, rows)
        self._moved, self._levels, self._products = work[0], work[1], work[2]
        self._error = torch.empty_like(weights)
        for columns in self._chunks(0, width):
            levels = self._read_levels(columns)
            torch.mul(levels, self.scales[:, self._block(columns)], out=self._error[:, columns])
        self._error -= weights

    def visit_all(self) -> None:
        """Improve the codes of all columns one by one, and each block's scale after its columns."""
        width = self._error.shape[1]
        for start in range(0, width, self._tile):
            stop = min(start + self._tile, width)
            # Half the derivative by each weight.
            for into, gram, error in zip(self._gradient, self._grams, self._error, strict=True):
                torch.mm(gram[start:stop], error, out=into[: stop - start])
            for columns in self._chunks(start, stop):
                gradient = self._gradient[:, columns.start - start : columns.stop - start]
                moved = self._choose_codes(columns, gradient)
                if self._refits:
                    self._refit_scale(columns, gradient, moved)
                self._error[:, columns] += moved
                for into, gram, each in zip(self._gradient, self._grams, moved, strict=True):
                    into[columns.stop - start : stop - start].addmm_(gram[columns.stop : stop, columns], each)

    def _chunks(self, start: int, stop: int) -> Iterator[slice]:
        """Yield the columns from ``start`` to ``stop`` in parts that share a scale."""
        for first in range(start, stop, self._chunk):
            yield slice(first, min(first + self._chunk, stop))

    def _block(self, columns: slice) -> slice:
        block = columns.start // self._block_size
        return slice(block, block + 1)

    def _read_levels(self, columns: slice) -> Float[Tensor, "E k N"]:
        codes = self.codes[:, columns]
        if self._zero_points is None:
            return codes
        levels = self._levels[:, : codes.shape[1]]
        torch.sub(codes, self._zero_points[:, self._block(columns)], out=levels)
        return levels

    def _choose_codes(self, columns: slice, gradient: Float[Tensor, "E k N"]) -> Float[Tensor, "E k N"]:
        """Set the columns' codes, one after another, to the best; return how their errors changed."""
        steps, moved = self._steps, self._moved[:, : gradient.shape[1]]
        steps.scales[0] = self.scales[:, self._block(columns)].squeeze(1)
        for first in range(columns.start, columns.stop, _STEP):
            last = min(first + _STEP, columns.stop)
            here, count = slice(first - columns.start, last - columns.start), last - first
            slope = self._products[:, :count]
            for index, gram in enumerate(self._grams):
                before = gram[first:last, columns.start : first], moved[index, : here.start]
                torch.addmm(gradient[index, here], *before, out=slope[index])
            pulls = self._grams[:, first:last, first:last].permute(1, 2, 0).unsqueeze(-1)
            torch.div(pulls, self._diagonal[first:last], out=steps.pulls[:count, :count])
            torch.mul(self.codes[:, first:last].transpose(0, 1), steps.scales[0], out=steps.base[:count])
            slope = slope.transpose(0, 1)
            torch.addcdiv(steps.base[:count], slope, self._diagonal[first:last], value=-1, out=steps.wanted[:count])
            steps.run(count)
            torch.neg(steps.changes[:count].transpose(0, 1), out=moved[:, here])
            self.codes[:, first:last] = steps.codes[:count].transpose(0, 1)
        return moved

    def _refit_scale(self, columns: slice, gradient: Float[Tensor, "E B N"], moved: Float[Tensor, "E B N"]) -> None:
        """Set a block's scale to the best, and add to ``moved`` how that changes the errors of its columns.

        Args:
            columns: the block's.
            gradient: before its codes were chosen.
            moved: how they changed the errors.
        """
        levels, products = self._read_levels(columns), self._products[:, : gradient.shape[1]]
        for gram, each, into in zip(self._grams, levels, products, strict=True):
            torch.mm(gram[columns, columns], each, out=into)
        slope = (levels * gradient).addcmul_(products, moved).sum(dim=1)
        curvature = products.mul_(levels).sum(dim=1)
        known = self.scales[:, self._block(columns)].squeeze(1)
        wanted = known - slope / curvature.clamp_min(torch.finfo(curvature.dtype).tiny)
        change = round_to_storage(torch.where(wanted * known > 0, wanted, known), self._steps.spec.scale_dtype) - known
        gain = change * (2 * slope + change * curvature)
        change = torch.where(gain < 0, change, torch.zeros_like(change))
        known += change
        moved.addcmul_(levels, change.unsqueeze(1))


def two_sided_descent(
    weights: Float[Tensor, "E K N"],
    codes: Float[Tensor, "E K N"],
    parameters: ColumnParameters,
    spec: QuantSpec,
    grams: Float[Tensor, "E K K"],
    output_grams: Float[Tensor, "E heads size size"],
) -> Float[Tensor, "E K N"]:
    """Improve codes in one pass over all columns where errors of a head's output channels count together.

    The error is tr(H D G D^T) with H the block diagonal of ``output_grams`` (Tseng et al., "Model-Preserving Adaptive
    Rounding", 2025, https://arxiv.org/abs/2505.22988, minimize it by another way of rounding). A step sets a few
    channels of each head in one column to the best values that each has while all others stay. Scales stay.

    Args:
        weights: the weights, times their input scales; a column is a row here.
        codes: what to start from, integers in float32.
        parameters: their scales and zero points.
        spec: the format that the weights are stored in.
        grams: G of each, with a positive diagonal.
        output_grams: the blocks of each H, with a positive diagonal.
    """
    (problems, in_features, rows), (heads, size) = weights.shape, output_grams.shape[1:3]
    least = max(size // _AT_ONCE, min(size, _LEAST_STEPS))
    count = next(steps for steps in range(least, size + 1) if size % steps == 0)

    def in_steps(values: Float[Tensor, "E k N"]) -> Float[Tensor, "k heads size"]:
        """Put the channels of a head side by side that change together: every ``count``-th of them."""
        ordered = values.reshape(problems, -1, heads, size // count, count).permute(1, 0, 2, 4, 3)
        return ordered.reshape(-1, problems * heads, size).contiguous()

    place = torch.arange(size, device=weights.device).view(-1, count).T.flatten()
    outputs = output_grams.flatten(0, 1)[:, place][:, :, place]
    # How a change of one channel moves what another should be.
    reach = outputs / torch.diagonal(outputs, dim1=1, dim2=2).unsqueeze(1)
    steps, scales, chosen = _HeadSteps(reach, count, spec), in_steps(parameters.scales), in_steps(codes)
    block = torch.arange(in_features, device=weights.device) // spec.block_size(in_features)
    error = chosen if parameters.zero_points is None else chosen - in_steps(parameters.zero_points)[block]
    error = error * scales[block] - in_steps(weights)
    of_problems = error.view(in_features, problems, rows)
    gradient = error.new_empty(_STEP, *error.shape[1:])
    pulls = grams.permute(1, 2, 0).unsqueeze(-1)  # [K, K, E, 1]
    own = torch.diagonal(grams, dim1=1, dim2=2).T.repeat_interleave(heads, dim=1).unsqueeze(-1)  # [K, E heads, 1]
    for start in range(0, in_features, _STEP):
        stop = min(start + _STEP, in_features)
        for index, gram in enumerate(grams):
            torch.mm(
                gram[start:stop], of_problems[:, index], out=gradient.view(_STEP, problems, rows)[: stop - start, index]
            )
        for column in range(start, stop):
            changes = steps.run(chosen[column], scales[block[column]], gradient[column - start], own[column])
            error[column] -= changes
            behind = gradient[column + 1 - start : stop - start].view(-1, problems, rows)
            behind.addcmul_(pulls[column, column + 1 : stop], changes.view(problems, rows), value=-1)
    ordered = chosen.view(in_features, problems, heads, count, -1).permute(1, 0, 2, 4, 3)
    found: Tensor = ordered.reshape(problems, in_features, rows)
    return found


class _HeadSteps:
    """Steps over the channels of all heads in one column; views are made once, over a place that it is copied to."""

    def __init__(self, reach: Float[Tensor, "heads size size"], count: int, spec: QuantSpec) -> None:
        heads, size = reach.shape[:2]
        self._reach, self._spec = reach, spec
        self._pull = reach.new_empty(heads, 1, size)
        made = reach.new_empty(5, heads, size)
        self._wanted, self._base, self._scales, self._codes, self._changes = (made[index] for index in range(5))
        each = (self._wanted, self._base, self._scales, self._codes, self._changes)
        at_once = size // count
        behind = [
            (self._wanted[:, None, first + at_once :], reach[:, first : first + at_once, first + at_once :])
            for first in range(0, size, at_once)
        ]
        parts = (values.view(heads, count, at_once).unbind(1) for values in each)
        self._views = list(zip(*parts, behind, strict=True))

    def run(
        self,
        codes: Float[Tensor, "heads size"],
        scales: Float[Tensor, "heads size"],
        gradient: Float[Tensor, "heads size"],
        own: Float[Tensor, "heads 1"],
    ) -> Float[Tensor, "heads size"]:
        """Improve ``codes`` in place; return by how much the weights fell.

        Args:
            codes: of a column.
            scales: theirs.
            gradient: the column's row of G D.
            own: the column's place on the diagonal of G.
        """
        least, most = self._spec.code_min, self._spec.code_max
        self._scales.copy_(scales)
        torch.mul(codes, scales, out=self._base)
        torch.bmm(gradient.unsqueeze(1), self._reach, out=self._pull)
        torch.addcdiv(self._base, self._pull.squeeze(1), own, value=-1, out=self._wanted)
        for wanted, base, scale, code, change, (behind, reach) in self._views:
            torch.div(wanted, scale, out=code).round_().clamp_(least, most)
            torch.addcmul(base, code, scale, value=-1, out=change)
            behind.baddbmm_(change.unsqueeze(1), reach)
        codes.copy_(self._codes)
        return self._changes
