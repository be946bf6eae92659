"""Know TensorRT for RTX (NvTensorRTRTX provider), from NVIDIA's "Quantized types and schemes". Not run here.

There: INT4 "requires per-block scales. The supported block sizes are {64, 128}"; INT8 and INT4 are code * scale, with
no zero point. Scales are positive there, so --scale_range signed is never its default.
"""

from __future__ import annotations

from collections.abc import Iterator

from stages.commands.parsing import Release
from stages.quantization.targets.formats import ExpertFormat, FormatChoice, ModelFacts
from stages.quantization.targets.rules import Preference, Preferences, Request, looks_up_quantized, smallest_head
from stages.records.formats import Granularity, PerChannel, WeightForm

_BLOCKS = (128, 64)
_EIGHT_BIT: Preference[Granularity | None] = Preference(
    PerChannel(), "what the tool that this one replaces writes; blocks are only for INT4; not run here"
)
_EXPERTS: Release = (1, 24)
"""The one that was new when onnxruntime-genai's builder began to write blocks for it (onnxruntime-genai#1926)."""
_EXPERT_FORMAT = ExpertFormat(
    bits=4,
    whose="TensorRT for RTX's",
    dtypes=frozenset({"float16", "bfloat16"}),
    activations=frozenset({"swiglu"}),
    blocks=_BLOCKS,
    per_channel=False,
)
"""What the builder writes there: raw codes, positive scales, no zero points, no router weights, swiglu."""


def prefer(request: Request) -> Preferences:
    return Preferences(
        form=Preference(WeightForm.DQ, "what onnxruntime-genai's builder writes for it (use_qdq); not run here"),
        block_size=_block(request.facts),
        open_blocks=_dividing(request.facts) or _BLOCKS,
        eight_bit=_EIGHT_BIT,
        zero_point=Preference(False, "TensorRT multiplies a code with a positive scale, nothing else"),
        lm_head=smallest_head(_EIGHT_BIT),
        embedding=Preference(None, "TensorRT for RTX has no GatherBlockQuantized"),
        experts=_experts(request),
    )


def _experts(request: Request) -> Preference[ExpertFormat | None]:
    if "float32" in request.facts.dtypes:
        return Preference(None, "onnxruntime-genai's builder writes QMoE for it in 16 bits only; not run here")
    if request.release < _EXPERTS:
        return Preference(None, f"nobody wrote QMoE for it before 1.24, {request.version} is older")
    why = "what onnxruntime-genai's builder writes for it (onnxruntime-genai#1926), in other blocks; not run here"
    return Preference(_EXPERT_FORMAT, why)


def _block(facts: ModelFacts) -> Preference[int]:
    if dividing := _dividing(facts):
        return Preference(dividing[0], "TensorRT takes 64 and 128: the larger that divides every row; not run here")
    return Preference(_BLOCKS[0], "TensorRT takes 64 and 128, and neither divides every row; not run here")


def _dividing(facts: ModelFacts) -> tuple[int, ...]:
    return tuple(size for size in _BLOCKS if all(features % size == 0 for features in facts.in_features))


def warnings(request: Request, choice: FormatChoice) -> Iterator[str]:
    yield from _block_warnings(request, choice)
    if not choice.symmetric:
        yield "TensorRT knows no zero point (microsoft/olive-recipes#573); leave --use_zero_point out."
    if choice.symmetric and request.requested.scale_range == "signed":
        yield "TensorRT takes only positive scales; leave --scale_range out."
    if choice.form is WeightForm.MATMUL_NBITS:
        yield "TensorRT for RTX runs no MatMulNBits; choose --weight_operator dq."
    if choice.eight_bit != PerChannel() and request.stores_eight_bit(choice.eight_bit, choice.lm_head):
        yield "TensorRT takes blocks only for INT4; choose --int8_block_size channel."
    if looks_up_quantized(choice):
        yield "TensorRT for RTX has no GatherBlockQuantized; leave --embedding out."


def _block_warnings(request: Request, choice: FormatChoice) -> Iterator[str]:
    size = choice.four_bit.block_size
    if size not in _BLOCKS:
        yield f"TensorRT takes INT4 in blocks of 64 and 128, not of {size}; choose one of these."
    elif uneven := sorted(features for features in request.facts.in_features if features % size):
        yield f"Blocks of {size} don't divide rows of {uneven[0]}, which TensorRT may refuse; not run here."
