"""Affine quantization of weights in blocks: cut rows into blocks, choose scales and zero points, quantize, dequantize.

w = (code - zero_point) * scale, codes rounded half to even, as ONNX QuantizeLinear / DequantizeLinear define it.
Scales are rounded to their stored type before any code is chosen, so that the codes fit what the runtime reads.
Blocks are consecutive inputs of a row, the last one padded with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn.functional import pad

from stages.records.formats import QuantSpec, torch_float
from stages.records.sites import FloatName

_ROOM = 4
"""Factor that searches and folds may move scales by."""

RangeRule = Literal["signed", "full", "compat7"]
"""How a symmetric range without zero point becomes a scale, b being its bits.

full: scale = max(-min / 2^(b-1), max / (2^(b-1) - 1)). signed: the same for INT8; for INT4 the scale is negative where
the block's maximum is farther from 0 than its minimum, so that the larger side always has the extra level (ONNX
Runtime's own MatMulNBits quantizer and llama.cpp's Q4_0 do so too). compat7: |w|max / (2^(b-1) - 1).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockParameters:
    """Scales and zero points of blocks, in float32 (zero points hold integers); None means zero point 0."""

    scales: Float[Tensor, "*batch nB"]
    zero_points: Float[Tensor, "*batch nB"] | None


def stack_parameters(parts: Sequence[BlockParameters]) -> BlockParameters:
    """Stack the parameters of several matrices, one's rows below the other's."""
    zero_points = [part.zero_points for part in parts if part.zero_points is not None]
    return BlockParameters(
        scales=torch.cat([part.scales for part in parts]),
        zero_points=torch.cat(zero_points) if zero_points else None,
    )


def rows_of(parameters: BlockParameters, rows: slice) -> BlockParameters:
    """Return the parameters of some rows: a view."""
    zero_points = parameters.zero_points
    return BlockParameters(
        scales=parameters.scales[rows], zero_points=None if zero_points is None else zero_points[rows]
    )


def empty_like(parameters: BlockParameters) -> BlockParameters:
    """Return a place for as many parameters."""
    zero_points = parameters.zero_points
    return BlockParameters(
        scales=torch.empty_like(parameters.scales),
        zero_points=None if zero_points is None else torch.empty_like(zero_points),
    )


def copy_rows(into: BlockParameters, rows: slice, part: BlockParameters) -> None:
    """Copy the parameters of some rows to their place in ``into``."""
    into.scales[rows] = part.scales
    if into.zero_points is not None and part.zero_points is not None:
        into.zero_points[rows] = part.zero_points


def round_to_storage(scales: Float[Tensor, "*batch nB"], name: FloatName) -> Float[Tensor, "*batch nB"]:
    """Round scales to what the file will hold, in float32; the sign stays.

    They are never nearer to 0 than the smallest normal number of the type ``name``.
    """
    dtype = torch_float(name)
    info = torch.finfo(dtype)
    return torch.copysign(scales.abs().clamp_(info.tiny, info.max), scales).to(dtype).float()


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRange:
    """The smallest and the largest number of every block."""

    low: Float[Tensor, "*batch nB"]
    high: Float[Tensor, "*batch nB"]


def block_range(blocks: Float[Tensor, "*batch nB B"]) -> BlockRange:
    """Return the full range of every block."""
    return BlockRange(low=blocks.amin(dim=-1), high=blocks.amax(dim=-1))  # aminmax is several times slower here


def choose_parameters(
    blocks: Float[Tensor, "*batch nB B"],
    spec: QuantSpec,
    rule: RangeRule = "full",
    clip_ratio: float | Float[Tensor, "*#batch nB"] = 1.0,
) -> BlockParameters:
    """Turn the full range of every block into scales and zero points.

    Args:
        blocks: the weights.
        spec, rule, clip_ratio: see ``range_parameters``.
    """
    return range_parameters(block_range(blocks), spec, rule, clip_ratio)


def range_parameters(
    full: BlockRange, spec: QuantSpec, rule: RangeRule, clip_ratio: float | Float[Tensor, "*#batch nB"]
) -> BlockParameters:
    """Turn ranges into scales and zero points.

    An all-zero block gets the smallest scale of its row, or 1 in a row of zeros: scales that are stored as bytes are
    parts of the row's largest. The asymmetric range always contains 0, so that the zero point exists for blocks of one
    sign.

    Args:
        full: the range of every block.
        spec: the format that the blocks are stored in.
        rule: how a symmetric range becomes a scale.
        clip_ratio: what the range is multiplied by first.
    """
    if spec.symmetric:
        return _symmetric(full, spec, rule, clip_ratio)
    return _asymmetric(full, spec, clip_ratio)


def _symmetric(full: BlockRange, spec: QuantSpec, rule: RangeRule, clip_ratio: float | Tensor) -> BlockParameters:
    if rule != "signed" or spec.bits != 4:
        return BlockParameters(scales=_storable(_extent(full, spec, rule) * clip_ratio, spec), zero_points=None)
    upward = full.high > -full.low
    mirrored = BlockRange(low=torch.where(upward, -full.high, full.low), high=torch.where(upward, -full.low, full.high))
    scales = _storable(_extent(mirrored, spec, "full") * clip_ratio, spec)
    return BlockParameters(scales=torch.where(upward, -scales, scales), zero_points=None)


def _extent(full: BlockRange, spec: QuantSpec, rule: RangeRule) -> Tensor:
    if rule == "compat7":
        return torch.maximum(-full.low, full.high) / spec.code_max
    return torch.maximum(full.low / spec.code_min, full.high / spec.code_max)


def _asymmetric(full: BlockRange, spec: QuantSpec, clip_ratio: float | Tensor) -> BlockParameters:
    low = full.low.clamp(max=0) * clip_ratio
    high = full.high.clamp(min=0) * clip_ratio
    scales = _storable((high - low) / spec.code_max, spec)
    zero_points = torch.round(-low / scales).clamp(spec.code_min, spec.code_max)
    return BlockParameters(scales=scales, zero_points=zero_points)


def _storable(extent: Float[Tensor, "*batch nB"], spec: QuantSpec) -> Float[Tensor, "*batch nB"]:
    smallest = extent.where(extent > 0, torch.inf).amin(dim=-1, keepdim=True)
    for_zeros = smallest.where(smallest.isfinite(), 1.0)
    return round_to_storage(extent.where(extent > 0, for_zeros), spec.scale_dtype)


def spec_for(weight: Float[Tensor, "N K"], spec: QuantSpec, computed: FloatName) -> QuantSpec:
    """Return ``spec``, or the same with scales of the type ``computed`` where its narrower type has no room for them.

    A few small blocks lose nothing that counts; a weight all of whose scales come near the ends of the type does.

    Args:
        weight: the weight.
        spec: the format that is wanted.
        computed: the type that scales are widened to.
    """
    if spec.scale_dtype == computed:
        return spec
    return spec_for_range(block_range(split(weight, spec.block_size(weight.shape[1]))), spec, computed)


def spec_for_range(full: BlockRange, spec: QuantSpec, computed: FloatName) -> QuantSpec:
    """Do what ``spec_for`` does, given the ranges of a weight's blocks."""
    if spec.scale_dtype == computed:
        return spec
    wide = replace(spec, scale_dtype=computed)
    scales = range_parameters(full, wide, "full", 1.0).scales
    info = torch.finfo(torch_float(spec.scale_dtype))
    fits = scales.median() > _ROOM * info.tiny and scales.max() * _ROOM < info.max
    return spec if fits else wide


def quantize(
    blocks: Float[Tensor, "*batch nB B"], parameters: BlockParameters, spec: QuantSpec
) -> Float[Tensor, "*batch nB B"]:
    """Round to codes: integers in [code_min, code_max], in float32.

    Args:
        blocks: the weights.
        parameters: their scales and zero points.
        spec: the format that they are stored in.
    """
    codes = (blocks / parameters.scales.unsqueeze(-1)).round_()
    if parameters.zero_points is not None:
        codes += parameters.zero_points.unsqueeze(-1)
    return codes.clamp_(spec.code_min, spec.code_max)


def as_stored(codes: Float[Tensor, "N K"], spec: QuantSpec) -> Integer[Tensor, "N K"]:
    """Return codes in the type that they are stored in, in the same order of memory."""
    if codes.device.type != "cpu":
        return codes.to(spec.code_dtype)
    # numpy: torch takes six times as long to make uint8 of float32.
    return torch.from_numpy(codes.numpy().astype(np.int8 if spec.symmetric else np.uint8))


def dequantize(codes: Float[Tensor, "*batch nB B"], parameters: BlockParameters) -> Float[Tensor, "*batch nB B"]:
    """Return (codes - zero_points) * scales, in float32."""
    return levels(codes, parameters) * parameters.scales.unsqueeze(-1)


def levels(codes: Float[Tensor, "*batch nB B"], parameters: BlockParameters) -> Float[Tensor, "*batch nB B"]:
    """Return codes - zero_points: the weights in units of their scales."""
    return codes if parameters.zero_points is None else codes - parameters.zero_points.unsqueeze(-1)


def round_trip(
    blocks: Float[Tensor, "*batch nB B"], parameters: BlockParameters, spec: QuantSpec
) -> Float[Tensor, "*batch nB B"]:
    """Quantize and dequantize: return what the runtime will compute with in place of ``blocks``, a new tensor.

    Args:
        blocks, parameters, spec: see ``quantize``.
    """
    # In place: dequantize(quantize(...)) would go through memory once more.
    stored = quantize(blocks, parameters, spec)
    if parameters.zero_points is not None:
        stored -= parameters.zero_points.unsqueeze(-1)
    stored *= parameters.scales.unsqueeze(-1)
    return stored


def split(weight: Float[Tensor, "*batch K"], block_size: int) -> Float[Tensor, "*batch nB B"]:
    """Cut rows into blocks: [..., K] -> [..., nB, B], zero-padded; a view of ``weight`` where nothing is added."""
    *batch, in_features = weight.shape
    blocks = -(-in_features // block_size)
    missing = blocks * block_size - in_features
    whole = pad(weight, (0, missing)) if missing else weight  # pad copies even where there is nothing to add
    return whole.reshape(*batch, blocks, block_size)


def join(blocks: Float[Tensor, "*batch nB B"], in_features: int) -> Float[Tensor, "*batch K"]:
    """Undo ``split``: [..., nB, B] -> [..., K], the padding cut off."""
    return blocks.flatten(-2)[..., :in_features]


def diagonal_blocks(gram: Float[Tensor, "K K"], block_size: int) -> Float[Tensor, "nB B B"]:
    """Return the B x B blocks on the diagonal of a Gram matrix, zero where the last one is padded."""
    padded = split(split(gram, block_size).movedim(0, -1), block_size)  # [nB, B, nB, B]: columns, then rows
    return torch.diagonal(padded, dim1=0, dim2=2).permute(2, 0, 1).contiguous()
