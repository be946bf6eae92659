"""Keep scales as bytes: whole multiples of one step a row, which the graph multiplies again when it is loaded.

The steps are float32 and the products are taken in float32, so that every runtime gives the same scales. A scale moves
by at most half a step, 1/510 of its row's largest: next to the rounding of the codes that is nothing (QLoRA's "double
quantization", Dettmers et al. 2023, does it to save the same bytes).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from stages.records.formats import NARROW_SCALES, PerBlock, QuantSpec, WeightForm
from stages.records.sites import MatMulSite

_LARGEST = 255
_STEP_BYTES = 4
_NODE_BYTES = 400
"""Of a Mul, its names and those of the steps."""
_FORMS = (WeightForm.DQ, WeightForm.MATMUL_NBITS)


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteScales:
    """Scales as they are stored."""

    multiples: UInt8[Tensor, "N nB"]
    steps: Float32[Tensor, "N 1"]

    @property
    def scales(self) -> Float32[Tensor, "N nB"]:
        """Return the scales as the graph computes them."""
        return self.multiples.float() * self.steps


def in_bytes(scales: Float[Tensor, "N nB"]) -> ByteScales:
    """Return the nearest multiples of each row's largest scale / 255, none of them 0.

    Args:
        scales: positive.
    """
    wide = scales.float()
    steps = wide.amax(dim=1, keepdim=True) / _LARGEST
    return ByteScales(multiples=(wide / steps).round().clamp(1, _LARGEST).to(torch.uint8), steps=steps)


def has_byte_scales(site: MatMulSite, spec: QuantSpec, form: WeightForm) -> bool:
    """Return whether a weight's scales may be bytes: narrow, positive and many, of codes that are coarser by far."""
    narrow = spec.scale_dtype == NARROW_SCALES.get(site.dtype)
    coarse = spec.bits == 4 and not spec.symmetric and isinstance(spec.granularity, PerBlock)
    return narrow and coarse and form in _FORMS and site.expert is None and saved_bytes(site, spec) > 0


def stored_bytes(site: MatMulSite, spec: QuantSpec, form: WeightForm, *, byte_scales: bool) -> int:
    """Return the bytes of a weight's codes, scales and zero points.

    Args:
        site: whose weight it is.
        spec: its number format.
        form: the nodes before the MatMul.
        byte_scales: whether scales are bytes where they may be.
    """
    whole = spec.format_bytes(site.out_features, site.in_features)
    return whole - saved_bytes(site, spec) if byte_scales and has_byte_scales(site, spec, form) else whole


def stored_in_words(site: MatMulSite, spec: QuantSpec, form: WeightForm, *, byte_scales: bool) -> str:
    """Describe how a weight is stored.

    Args:
        site, spec, form, byte_scales: see ``stored_bytes``.
    """
    in_bytes = byte_scales and has_byte_scales(site, spec, form)
    return spec.in_words("one-byte") if in_bytes else spec.description


def saved_bytes(site: MatMulSite, spec: QuantSpec) -> int:
    """Return what bytes and steps take less than float16 scales."""
    return site.out_features * (spec.num_blocks(site.in_features) - _STEP_BYTES) - _NODE_BYTES
