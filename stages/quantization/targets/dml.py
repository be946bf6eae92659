"""Know ONNX Runtime's DirectML provider, from its operators' source. Not run here."""

from __future__ import annotations

from collections.abc import Iterator

from stages.quantization.targets.formats import FormatChoice
from stages.quantization.targets.rules import (
    FROM_DQ,
    NEVER_BFLOAT16,
    Preference,
    Preferences,
    Request,
    column_major_warnings,
    dq_warnings,
    looks_up_quantized,
    smallest_head,
    unfused_in_dq,
)
from stages.records.formats import Granularity, WeightForm

_EIGHT_BIT: Preference[Granularity | None] = Preference(None, "DirectML has no 8-bit weights (ModelOpt's FAQ 7)")


def prefer(request: Request) -> Preferences:
    return Preferences(
        form=_form(request),
        block_size=Preference(128, "what the tool for DirectML that this one replaces writes; not run here"),
        eight_bit=_EIGHT_BIT,
        zero_point=Preference(False, "the tool for DirectML that this one replaces writes none; not run here"),
        lm_head=smallest_head(_EIGHT_BIT),
        embedding=Preference(None, "DirectML has no GatherBlockQuantized"),
        experts=Preference(None, "DirectML has neither MoE nor QMoE: ONNX Runtime runs both on the CPU"),
    )


def _form(request: Request) -> Preference[WeightForm]:
    if request.is_bfloat16:
        return Preference(WeightForm.MATMUL_NBITS, NEVER_BFLOAT16)
    if unfused := unfused_in_dq(request, eight_bit=False, float16=False):
        return Preference(WeightForm.MATMUL_NBITS, f"{request.version} fuses no DequantizeLinear with {unfused}")
    return Preference(WeightForm.DQ, "fused into MatMulNBits (ORT#22114): rows [K, N], one reader each; not run here")


def warnings(request: Request, choice: FormatChoice) -> Iterator[str]:
    if request.is_bfloat16:
        yield "DirectML has no bfloat16; build the base model as fp16."
    if choice.form in FROM_DQ:
        unfused = unfused_in_dq(request, eight_bit=False, float16=False)
        yield from dq_warnings(request, unfused, "choose --weight_operator matmul_nbits or use 1.25 or later")
    if choice.form is WeightForm.DQ_COLUMN_MAJOR:
        yield from column_major_warnings(request, choice, eight_bit=False)
    if request.requested.named_eight_bit:
        yield (
            "DirectML has no 8-bit weights (ModelOpt's FAQ 7): the sites named for INT8 may run on the CPU or not at "
            "all; leave them out of --layers_8bit and --lm_head 8."
        )
    if looks_up_quantized(choice):
        yield (
            "DirectML has no GatherBlockQuantized: the CPU provider looks up and copies to the GPU for every token; "
            "leave --embedding out."
        )
