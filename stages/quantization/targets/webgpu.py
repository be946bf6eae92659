"""Know ONNX Runtime's WebGPU provider, from its pull requests. Not run here."""

from __future__ import annotations

from collections.abc import Iterator

from stages.commands.parsing import Release
from stages.quantization.targets.formats import ExpertFormat, FormatChoice
from stages.quantization.targets.rules import (
    SIGNED,
    Preference,
    Preferences,
    Request,
    looks_up_on_cpu,
    lookup_since,
    smallest_head,
)
from stages.records.formats import Granularity, PerBlock, WeightForm

_EIGHT_BIT: Release = (1, 23)
"""ORT#24546 and #24590"""
_GATHER: Release = (1, 23)
"""ORT#25413"""
_EXPERTS: Release = (1, 24)
"""ORT#26489"""
_EXPERT_FORMAT = ExpertFormat(
    bits=4,
    whose="WebGPU's",
    activations=frozenset({"swiglu"}),
    blocks=(128, 64, 32),
    per_channel=False,
    most=256,
)
"""qmoe.cc: raw codes, "zero_points for QMoE are not yet supported", nor router weights, and "only swiglu"; its gate has
one thread an expert, of which WebGPU promises 256. ORT#32447, which adds more, was open."""


def prefer(request: Request) -> Preferences:
    eight_bit = _eight_bit(request)
    return Preferences(
        scale_range=SIGNED,
        form=Preference(
            WeightForm.MATMUL_NBITS, "the rule that fuses DequantizeLinear leaves WebGPU out; not run here"
        ),
        block_size=Preference(32, "its fastest kernels take no other (ORT#23908); not run here"),
        open_blocks=(32,),
        eight_bit=eight_bit,
        zero_point=Preference(False, "some of its kernels take none (ORT#23908); not run here"),
        lm_head=smallest_head(eight_bit),
        embedding=lookup_since(request, _GATHER, "WebGPU has GatherBlockQuantized (ORT#25413)"),
        experts=_experts(request),
        accuracy_level=Preference(
            4, "activations as int8 for its fastest kernels (ORT#23365), as onnxruntime-genai's builder; not run here"
        ),
    )


def _experts(request: Request) -> Preference[ExpertFormat | None]:
    if request.is_bfloat16:
        return Preference(None, "WebGPU has no bfloat16")
    if request.release < _EXPERTS:
        return Preference(None, f"{request.version} has no QMoE on WebGPU; 1.24 is the first")
    return Preference(_EXPERT_FORMAT, "WebGPU has QMoE (ORT#26489), without zero points; not run here")


def _eight_bit(request: Request) -> Preference[Granularity | None]:
    if request.release < _EIGHT_BIT:
        return Preference(None, f"{request.version} has no 8-bit MatMulNBits on WebGPU; 1.23 is the first")
    return Preference(PerBlock(block_size=32), "as for INT4; not run here")


def warnings(request: Request, choice: FormatChoice) -> Iterator[str]:
    if request.is_bfloat16:
        yield "WebGPU has no bfloat16; build the base model as fp16."
    if choice.form is not WeightForm.MATMUL_NBITS:
        yield "ONNX Runtime fuses no DequantizeLinear for WebGPU; choose --weight_operator matmul_nbits."
    if request.requested.named_eight_bit and request.release < _EIGHT_BIT:
        yield f"{request.version} has no 8-bit MatMulNBits on WebGPU; leave INT8 out or use 1.23 or later."
    yield from looks_up_on_cpu(request, choice, _GATHER)
