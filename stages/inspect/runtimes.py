"""Tell how runtimes treat a model's quantized weights.

``fused_on``: which releases of ONNX Runtime's CPU provider fuse a DequantizeLinear and its MatMul into one MatMulNBits.
The conditions for what this project writes are those of export.verify.fusion; models by other quantizers also break
other conditions of DQMatMulToMatMulNBits (qdq_selectors.cc), measured with releases 1.20 to 1.32.

``runtime_answers``: what each target runtime has against the formats, by the rules that stages.quantize chooses with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType
from typing import Literal

import onnx_ir as ir

from export.verify.fusion import known_reason_not_fused
from stages.commands.options import AccuracyLevel
from stages.commands.parsing import RELEASES, Release, Runtime, parse_target
from stages.inspect.quantized_weights import DequantizedWeight, StoredWeight
from stages.quantization.targets.choose import RULES
from stages.quantization.targets.formats import FormatChoice, ModelFacts, RequestedFormats
from stages.quantization.targets.rules import Request
from stages.records.formats import FLOAT_TYPES, Granularity, PerBlock, PerChannel, QuantSpec, WeightForm

SCALES = MappingProxyType({kind.onnx.name: name for name, kind in FLOAT_TYPES.items()})
"""Types that scales may have, by their ONNX names."""
_BITS: dict[int, Literal[4, 8]] = {4: 4, 8: 8}
_LEVELS: dict[str, AccuracyLevel] = {"0": 0, "1": 1, "2": 2, "3": 3, "4": 4}
_TWO_BITS: Release = (1, 32)
_PER_TENSOR: Release = (1, 25)
_TRANSPOSED_INT8: Release = (1, 25)
_TRANSPOSED_INT8_WITHOUT_ZERO_POINT: Release = (1, 28)
_OPSET = 21
"""First opset whose DequantizeLinear has 4-bit codes and blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseSpan:
    """Consecutive releases that treat a weight the same way."""

    first: str
    last: str
    """The newest known release, for the last span."""
    fused: bool
    why_not: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedOn:
    """Sites that every release treats the same way."""

    sites: tuple[str, ...]
    spans: tuple[ReleaseSpan, ...]


def fused_on(weights: Sequence[DequantizedWeight], opset: int) -> tuple[FusedOn, ...]:
    """Return which releases fuse which sites, those with the same answer together, in graph order."""
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
                first=_version(releases[0]), last=_version(releases[-1]), fused=why_not is None, why_not=why_not or ""
            )
        )
    return tuple(spans)


def _version(release: Release) -> str:
    return f"{release[0]}.{release[1]}"


def _objection(weight: DequantizedWeight, release: Release, opset: int) -> str | None:
    """Return why ``release`` doesn't fuse the weight; None where no reason is known."""
    stored, node = weight.stored, weight.dequantize
    foreign = _because_of_codes(stored, release, opset) or _because_of_scales(stored, node, release)
    if foreign is not None:
        return foreign
    if stored.activations != "float":
        return "its activation is quantized too, so another rule makes an integer product of both"
    if stored.bits == 8 and stored.grouping == "channel" and "Transpose" in stored.operators:
        return _because_of_transpose(stored, release)
    if stored.bits == 2 or stored.grouping == "tensor":
        return None
    return known_reason_not_fused(weight.reader, _spec(stored), release)


def _because_of_codes(stored: StoredWeight, release: Release, opset: int) -> str | None:
    if stored.codes not in ("INT4", "UINT4", "INT8", "UINT8", "INT2", "UINT2"):
        return f"no release fuses {stored.codes} codes"
    if stored.bits == 2 and release < _TWO_BITS:
        return f"2-bit codes were seen fused only on ONNX Runtime {_version(_TWO_BITS)}"
    if stored.bits < 8 and opset < _OPSET:
        return f"the model has opset {opset}, and {stored.bits}-bit DequantizeLinear needs {_OPSET}: it doesn't load"
    return None


def _because_of_scales(stored: StoredWeight, node: ir.Node, release: Release) -> str | None:
    if stored.computed not in SCALES:
        return f"scales are {stored.computed or 'of unknown type'}"
    if len(stored.shape) != 2:
        return f"its weight has rank {len(stored.shape)}"
    if stored.grouping == "tensor" and release < _PER_TENSOR:
        return f"ONNX Runtime {_version(_PER_TENSOR)} is the first to fuse one scale for a whole weight"
    straight = "Transpose" not in stored.operators
    axis = node.attributes.get_int("axis", 1) % 2
    if stored.grouping == "block" and straight and axis == 1:
        return "its blocks run along output channels (axis 1), not along inputs"
    if stored.grouping == "channel" and straight and axis == 0:
        return "it has a scale for each input channel (axis 0), not for each output channel"
    return None


def _because_of_transpose(stored: StoredWeight, release: Release) -> str | None:
    first = _TRANSPOSED_INT8 if stored.zero_point else _TRANSPOSED_INT8_WITHOUT_ZERO_POINT
    if release >= first:
        return None
    return f"ONNX Runtime {_version(first)} is the first to fuse INT8 per channel through a Transpose"


def _spec(stored: StoredWeight) -> QuantSpec:
    granularity: Granularity = PerChannel() if stored.block_size is None else PerBlock(block_size=stored.block_size)
    return QuantSpec(
        bits=_BITS[stored.bits],
        symmetric=not stored.zero_point,
        granularity=granularity,
        scale_dtype=SCALES[stored.computed],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeAnswer:
    """One runtime's warnings about the model; none where it runs everything fast as far as is known."""

    runtime: str
    """With its release: cpu@1.32."""
    objections: tuple[str, ...]
    """A key of --json, which keeps its name."""


def runtime_answers(weights: Sequence[StoredWeight], accuracy_level: str | None) -> tuple[RuntimeAnswer, ...]:
    """Return every runtime's answer; none where the rules don't know the formats.

    Args:
        weights: all quantized weights of the model.
        accuracy_level: that of genai_config.json's session options, if any.
    """
    forms = {form: [each for each in weights if _form(each) is form] for form in WeightForm}
    if not any(forms.values()) or any(_is_foreign(each) for each in weights):
        return ()
    return tuple(
        RuntimeAnswer(
            runtime=parse_target(runtime).label,
            objections=tuple(
                dict.fromkeys(
                    sentence
                    for form, members in forms.items()
                    if members
                    for sentence in _warnings(runtime, form, [*members, *_lookups(weights)], accuracy_level)
                )
            ),
        )
        for runtime in RULES
    )


def _is_foreign(weight: StoredWeight) -> bool:
    """Return whether the runtimes' rules don't cover its format."""
    return weight.computed not in SCALES or weight.bits not in (4, 8) or weight.activations != "float"


def _form(weight: StoredWeight) -> WeightForm | None:
    operators = weight.operators
    if operators[-1] not in ("MatMul", "Gemm", "MatMulNBits"):
        return None
    if operators[0] == "MatMulNBits":
        return WeightForm.MATMUL_NBITS
    if operators[0] == "QuantizeLinear":
        return WeightForm.QDQ
    return WeightForm.DQ_COLUMN_MAJOR if "Transpose" in operators else WeightForm.DQ


def _lookups(weights: Sequence[StoredWeight]) -> list[StoredWeight]:
    return [each for each in weights if each.operators[-1] in ("GatherBlockQuantized", "Gather")]


def _warnings(
    runtime: Runtime, form: WeightForm, weights: Sequence[StoredWeight], accuracy_level: str | None
) -> tuple[str, ...]:
    tables = _lookups(weights)
    products = [each for each in weights if each not in tables]
    four_bit, eight_bit = ([each for each in products if each.bits == bits] for bits in (4, 8))
    levels = [each.accuracy_level for each in products if each.accuracy_level is not None]
    level = str(levels[0]) if levels else accuracy_level
    requested = RequestedFormats(
        form=form,
        named_eight_bit=bool(eight_bit),
        zero_point=any(each.zero_point for each in products),
        gather_form="dq" if any(each.operators[-1] == "Gather" for each in tables) else "gather_block_quantized",
    )
    facts = ModelFacts(
        dtypes=frozenset(SCALES[each.computed] for each in products),
        in_features=frozenset(each.shape[0] for each in products),
        has_gemm=any(each.operators[-1] == "Gemm" for each in products),
        embedding_widths=frozenset(each.shape[-1] for each in tables),
    )
    rules = RULES[runtime]
    request = Request(release=parse_target(runtime).release, requested=requested, facts=facts)
    preferred = rules.prefer(request)
    commonest = _commonest(four_bit)
    choice = FormatChoice(
        form=form,
        four_bit=commonest if isinstance(commonest, PerBlock) else PerBlock(block_size=preferred.block_size.value),
        eight_bit=_commonest(eight_bit) or preferred.eight_bit.value or PerChannel(),
        symmetric=not requested.zero_point,
        scale_range=preferred.scale_range.value,
        scale_type=preferred.scale_type.value,
        gather_form=requested.gather_form or "gather_block_quantized",
        gather_block_size=next((each.block_size for each in tables if each.block_size), 32),
        accuracy_level=_LEVELS.get(level or ""),
        embedding_bits=4 if tables else None,
    )
    return tuple(rules.warnings(request, choice))


def _commonest(weights: Sequence[StoredWeight]) -> Granularity | None:
    """Return the block size, or the scale per channel, that most weights have; None where there are none."""
    if not weights:
        return None
    size = Counter(each.block_size for each in weights).most_common(1)[0][0]
    return PerChannel() if size is None else PerBlock(block_size=size)
