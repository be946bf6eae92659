"""Know QNN's GPU backend, from matmulnbits_op_builder.cc of ORT#26340. Not run here.

That file takes bits 4, block_size 32, zero points that are all 8 or absent, no bias, and float32 activations.
"""

from __future__ import annotations

from collections.abc import Iterator

from stages.commands.parsing import Release
from stages.quantization.targets.formats import FormatChoice
from stages.quantization.targets.rules import Preference, Preferences, Request, smallest_head
from stages.records.formats import Granularity, WeightForm

_MATMUL_NBITS: Release = (1, 24)
"""ORT#26340"""
_BLOCK = 32
_EIGHT_BIT: Preference[Granularity | None] = Preference(None, "QNN's GPU backend translates only 4-bit MatMulNBits")


def prefer(_: Request) -> Preferences:
    return Preferences(
        form=Preference(
            WeightForm.MATMUL_NBITS, "QNN's GPU backend translates it (ORT#26340), not DequantizeLinear; not run here"
        ),
        block_size=Preference(_BLOCK, "the only size that QNN's GPU backend translates; not run here"),
        open_blocks=(_BLOCK,),
        eight_bit=_EIGHT_BIT,
        zero_point=Preference(False, "QNN's GPU backend translates only symmetric codes"),
        lm_head=smallest_head(_EIGHT_BIT),
        embedding=Preference(
            None, "QNN has GatherBlockQuantized on the GPU only from onnxruntime-qnn#356 on; not run here"
        ),
        experts=Preference(None, "QNN's GPU backend has no QMoE (onnxruntime-qnn#819 was open)"),
    )


def warnings(request: Request, choice: FormatChoice) -> Iterator[str]:
    if request.release < _MATMUL_NBITS:
        yield f"QNN of {request.version} translates no MatMulNBits, so it runs on the CPU; use 1.24 or later."
    if request.facts.dtypes != {"float32"}:
        yield (
            "QNN's GPU backend translated MatMulNBits only with float32 activations when that was added (ORT#26340); "
            "build the base model as fp32 or check a newer release."
        )
    if choice.form is not WeightForm.MATMUL_NBITS:
        yield "QNN's GPU backend takes no INT4 blocks from DequantizeLinear; choose --weight_operator matmul_nbits."
    if choice.four_bit.block_size != _BLOCK:
        yield f"QNN's GPU backend translates blocks of 32, not of {choice.four_bit.block_size}; choose --block_size 32."
    if not choice.symmetric:
        yield "QNN's GPU backend translates only symmetric codes; leave --use_zero_point out."
    if request.requested.named_eight_bit:
        yield (
            "QNN's GPU backend translates no 8-bit MatMulNBits, so the sites named for INT8 run on the CPU; leave them "
            "out of --layers_8bit and --lm_head 8."
        )
