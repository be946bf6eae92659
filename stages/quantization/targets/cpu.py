"""Know ONNX Runtime's CPU provider: what each release fuses, and which of them run a stored MatMulNBits."""

from __future__ import annotations

from collections.abc import Iterator

from stages.commands.options import AccuracyLevel
from stages.commands.parsing import Release
from stages.commands.quantize_options import LmHead, Rotary, ScaleType
from stages.quantization.targets.formats import EmbeddingBits, ExpertFormat, FormatChoice
from stages.quantization.targets.rules import (
    DQ_FUSES_ALL,
    FROM_DQ,
    NEVER_BFLOAT16,
    READS_BYTES,
    SIGNED,
    Preference,
    Preferences,
    Request,
    column_major_warnings,
    dq_warnings,
    looks_up_quantized,
    smallest_head,
    unfused_in_dq,
)
from stages.records.formats import Granularity, PerBlock, PerChannel, WeightForm

_EIGHT_BIT: Release = (1, 23)
"""First release that runs 8-bit MatMulNBits at every accuracy level; 1.22 does only at level 4, 1.21 never (run)."""
_EXPERTS: Release = (1, 23)
"""First release that runs QMoE, in blocks and per channel (run)."""
_COMPLETE_EXPERTS: Release = (1, 31)
"""First whose QMoE has an accuracy level, and right results with 4-bit zero points and an odd number of blocks in a
row: 1.24 to 1.30 give other numbers there (run)."""
_FAST_LEVEL: AccuracyLevel = 4
_EXPAND_CHANNELS = ("session.qdq_matmulnbits_block_size", "128")
"""ONNX Runtime repeats a scale per channel for blocks of so many inputs when it fuses; its default is 32."""


_ROTARY: Preference[Rotary] = Preference(
    "computed", "from one frequency a column, once, when the model is loaded (run with 1.20 to 1.32)"
)
_SCALE_TYPE: Preference[ScaleType] = Preference(
    "bytes",
    "INT4 scales beside zero points are a row's multiples of one number, others float16, at no loss: nodes widen them "
    "once, when the model is loaded",
)


def prefer(request: Request) -> Preferences:
    """Return what it runs fast; times are of one token on one thread at 4096 x 4096, run with 1.31.1."""
    eight_bit = _eight_bit(request)
    lm_head = _lm_head(request, eight_bit)
    stored = request.stores_eight_bit(eight_bit.value, request.lm_head(lm_head.value))
    form = _form(request, eight_bit=stored)
    written = request.requested.form or form.value
    return Preferences(
        scale_range=SIGNED,
        scale_type=_SCALE_TYPE,
        rotary=_ROTARY,
        form=form,
        block_size=Preference(
            32, "0.91 ms a token at 4096 x 4096, where 128 is less exact and takes 0.87 ms, and 16 takes 1.90 ms"
        ),
        eight_bit=eight_bit,
        zero_point=Preference(
            True, "a fifth to a third less KL for 4 / block_size more bits a weight and a tenth of decoding speed"
        ),
        lm_head=lm_head,
        embedding=_embedding(request),
        experts=_experts(request),
        int8_gather_block_size=Preference(128, "8 bits are as good as exact in any block, and larger ones are smaller"),
        accuracy_level=_accuracy_level(written),
        session_options=(_EXPAND_CHANNELS,) if stored and _expands_channels(request, written) else (),
    )


def _eight_bit(request: Request) -> Preference[Granularity | None]:
    if request.release < _EIGHT_BIT:
        return Preference(None, f"{request.version} neither fuses 8-bit codes nor runs every 8-bit MatMulNBits")
    if request.release < DQ_FUSES_ALL:
        return Preference(PerBlock(block_size=128), "MatMulNBits takes only blocks, and 128 is its fastest with INT4's")
    return Preference(
        PerBlock(block_size=128), "scales per channel are expanded into blocks of 32: 2.00 ms a token, not 0.79 ms"
    )


def _embedding(request: Request) -> Preference[EmbeddingBits | None]:
    if request.release < READS_BYTES:
        return Preference(4, f"{request.version} looks up INT4 only; 1.23 is the first with INT8, which loses less")
    return Preference(8, "it has GatherBlockQuantized, which reads only the rows it needs")


def _experts(request: Request) -> Preference[ExpertFormat | None]:
    if request.is_bfloat16:
        return Preference(None, "the CPU's QMoE takes float32 and float16 only")
    if request.release < _EXPERTS:
        return Preference(None, f"{request.version} has no QMoE that takes such experts; 1.23 is the first")
    newest = request.release >= _COMPLETE_EXPERTS
    zero_points = "" if newest else f", without zero points, which {request.version} may read wrong"
    experts = ExpertFormat(bits=4, zero_points=newest, router_weights=newest, takes_level=newest)
    return Preference(experts, f"it runs QMoE in blocks{zero_points}")


def _lm_head(request: Request, eight_bit: Preference[Granularity | None]) -> Preference[LmHead]:
    level = request.requested.accuracy_level
    if level not in (None, _FAST_LEVEL):
        return Preference("4", f"at --accuracy_level {level} INT8 is copied to floating point for every token")
    return smallest_head(eight_bit)


def _form(request: Request, *, eight_bit: bool) -> Preference[WeightForm]:
    if request.is_bfloat16:
        return Preference(WeightForm.MATMUL_NBITS, NEVER_BFLOAT16)
    unfused = unfused_in_dq(request, eight_bit=eight_bit, float16=True)
    if not unfused:
        return Preference(WeightForm.DQ, f"{request.version} fuses it into MatMulNBits: rows [K, N], one reader each")
    if eight_bit and request.release < _EIGHT_BIT:
        return Preference(WeightForm.DQ, "the sites named for INT8 could not run as MatMulNBits")
    return Preference(WeightForm.MATMUL_NBITS, f"{request.version} fuses no DequantizeLinear with {unfused}")


def _accuracy_level(form: WeightForm) -> Preference[AccuracyLevel | None]:
    """Return level 4 where it is not the default: ONNX Runtime fuses with 4, a stored MatMulNBits has 0 unless told."""
    advice = "activations as int8: 0.87 ms a token at 4096 x 4096, not 3.09 ms, at 1 % more KL"
    if form is WeightForm.MATMUL_NBITS:
        return Preference(_FAST_LEVEL, advice)
    return Preference(None, f"the runtime's default {_FAST_LEVEL}, {advice}")


def _expands_channels(request: Request, form: WeightForm) -> bool:
    return form in FROM_DQ and request.requested.eight_bit == PerChannel() and request.release >= DQ_FUSES_ALL


def warnings(request: Request, choice: FormatChoice) -> Iterator[str]:
    eight_bit = request.stores_eight_bit(_eight_bit(request).value, choice.lm_head)
    if request.is_bfloat16:
        yield (
            "The CPU provider has no bfloat16 kernel of MatMulNBits or GatherBlockQuantized; build the base model as "
            "fp32 or fp16."
        )
    if choice.embedding_bits == 8 and looks_up_quantized(choice) and request.release < READS_BYTES:
        yield f"{request.version} refuses a model with an INT8 embedding; choose --embedding 4 or use 1.23 or later."
    if choice.form in FROM_DQ:
        unfused = unfused_in_dq(request, eight_bit=eight_bit, float16=True)
        yield from dq_warnings(request, unfused, _fix(request, eight_bit=eight_bit))
    if choice.form is WeightForm.MATMUL_NBITS and eight_bit and request.release < _EIGHT_BIT:
        yield (
            f"{request.version} can't run 8-bit MatMulNBits on the CPU (1.22 can only at accuracy level 4); leave "
            "INT8 out or use 1.23 or later."
        )
    yield from slower_than_base(request, choice)


def slower_than_base(request: Request, choice: FormatChoice) -> Iterator[str]:
    """Warn of what every release runs slower than the base model."""
    eight_bit = request.stores_eight_bit(choice.eight_bit, choice.lm_head)
    if choice.form is WeightForm.DQ_COLUMN_MAJOR:
        yield from column_major_warnings(request, choice, eight_bit=eight_bit)
    exact = choice.accuracy_level is None and choice.form is WeightForm.MATMUL_NBITS
    level = 0 if exact else choice.accuracy_level
    if eight_bit and level not in (None, _FAST_LEVEL) and not request.is_bfloat16:
        yield (
            f"At accuracy level {level} ONNX Runtime's CPU provider copies every INT8 weight to floating point for "
            "each token (49 ms and more at 4096 x 4096 on x86, 1.3 ms at level 4); "
            f"{'choose --accuracy_level 4' if exact else 'leave --accuracy_level out'} or store no INT8."
        )


def _fix(request: Request, *, eight_bit: bool) -> str:
    if eight_bit and request.release < _EIGHT_BIT:
        return "leave INT8 out or use 1.25 or later"
    return "choose --weight_operator matmul_nbits or use 1.25 or later"
