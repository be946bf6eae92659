"""On which releases of ONNX Runtime's CPU provider a DequantizeLinear and its MatMul become one MatMulNBits.

The rules for what this project writes are export.fusion's; what others write breaks conditions that ours never does.
Those are DQMatMulToMatMulNBits' (qdq_selectors.cc), measured with 1.20 to 1.32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType
from typing import Literal

import onnx_ir as ir

from export.fusion import known_objection
from stages.inspection.stored import DequantizedWeight, StoredWeight
from stages.records import FLOAT_TYPES, Granularity, PerBlock, PerChannel, QuantSpec
from stages.target.name import RELEASES, Release

SCALES = MappingProxyType({kind.onnx.name: name for name, kind in FLOAT_TYPES.items()})
"""Types that scales may have, by their ONNX names."""
_BITS: dict[int, Literal[4, 8]] = {4: 4, 8: 8}
_TWO_BITS: Release = (1, 32)
_PER_TENSOR: Release = (1, 25)
_TRANSPOSED_INT8: Release = (1, 25)
_TRANSPOSED_INT8_WITHOUT_ZERO_POINT: Release = (1, 28)
_OPSET = 21
"""First opset whose DequantizeLinear has 4-bit codes and blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseSpan:
    """Consecutive releases that treat a weight alike."""

    first: str
    last: str
    """The newest release known where nothing newer was looked at."""
    fused: bool
    why_not: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedOn:
    """Sites that all releases treat alike."""

    sites: tuple[str, ...]
    spans: tuple[ReleaseSpan, ...]


def fused_on(weights: Sequence[DequantizedWeight], opset: int) -> tuple[FusedOn, ...]:
    """What becomes of the sites, those with the same answer together, in graph order."""
    found: dict[tuple[ReleaseSpan, ...], list[str]] = {}
    for weight in weights:
        found.setdefault(_spans(weight, opset), []).append(weight.stored.node)
    return tuple(FusedOn(sites=tuple(sites), spans=spans) for spans, sites in found.items())


def _spans(weight: DequantizedWeight, opset: int) -> tuple[ReleaseSpan, ...]:
    answers = [(release, _objection(weight, release, opset)) for release in RELEASES]
    spans = []
    for why_not, group in groupby(answers, key=lambda answer: answer[1]):
        releases = [release for release, _ in group]
        spans.append(
            ReleaseSpan(
                first=_called(releases[0]), last=_called(releases[-1]), fused=why_not is None, why_not=why_not or ""
            )
        )
    return tuple(spans)


def _called(release: Release) -> str:
    return f"{release[0]}.{release[1]}"


def _objection(weight: DequantizedWeight, release: Release, opset: int) -> str | None:
    """Why ``release`` doesn't fuse it; None where nothing known is against it."""
    stored, node = weight.stored, weight.dequantize
    foreign = _because_of_codes(stored, release, opset) or _because_of_scales(stored, node, release)
    if foreign is not None:
        return foreign
    if stored.activations != "float":
        return "its activation is quantized too, so that another rule makes an integer product of both"
    if stored.bits == 8 and stored.grouping == "channel" and "Transpose" in stored.form:
        return _because_of_transpose(stored, release)
    if stored.bits == 2 or stored.grouping == "tensor":
        return None
    return known_objection(weight.reader, _spec(stored), release)


def _because_of_codes(stored: StoredWeight, release: Release, opset: int) -> str | None:
    if stored.codes not in ("INT4", "UINT4", "INT8", "UINT8", "INT2", "UINT2"):
        return f"{stored.codes} codes are fused nowhere"
    if stored.bits == 2 and release < _TWO_BITS:
        return f"2-bit codes were seen fused on ONNX Runtime {_called(_TWO_BITS)} alone"
    if stored.bits < 8 and opset < _OPSET:
        return f"the model has opset {opset}, and {stored.bits}-bit DequantizeLinear needs {_OPSET}: it doesn't load"
    return None


def _because_of_scales(stored: StoredWeight, node: ir.Node, release: Release) -> str | None:
    if stored.scales not in SCALES:
        return f"scales are {stored.scales or 'of unknown type'}"
    if len(stored.shape) != 2:
        return f"its weight has rank {len(stored.shape)}"
    if stored.grouping == "tensor" and release < _PER_TENSOR:
        return f"ONNX Runtime {_called(_PER_TENSOR)} is the first to fuse one scale for a whole weight"
    straight = "Transpose" not in stored.form
    axis = node.attributes.get_int("axis", 1) % 2
    if stored.grouping == "block" and straight and axis == 1:
        return "its blocks run along output channels (axis 1), not along inputs"
    if stored.grouping == "channel" and straight and axis == 0:
        return "it has a scale for each input channel (axis 0), not for each output channel"
    return None


def _because_of_transpose(stored: StoredWeight, release: Release) -> str | None:
    """INT8 with a scale per channel is fused behind a Transpose too."""
    first = _TRANSPOSED_INT8 if stored.zero_point else _TRANSPOSED_INT8_WITHOUT_ZERO_POINT
    if release >= first:
        return None
    return f"ONNX Runtime {_called(first)} is the first to fuse INT8 per channel behind a Transpose"


def _spec(stored: StoredWeight) -> QuantSpec:
    granularity: Granularity = PerChannel() if stored.block_size is None else PerBlock(block_size=stored.block_size)
    return QuantSpec(
        bits=_BITS[stored.bits],
        symmetric=not stored.zero_point,
        granularity=granularity,
        scale_dtype=SCALES[stored.scales],
    )
