"""Know ONNX Runtime's CUDA provider, from its kernels' source and pull requests. Not run here."""

from __future__ import annotations

from collections.abc import Iterator

from stages.commands.parsing import Release
from stages.quantization.targets.formats import ExpertFormat, FormatChoice
from stages.quantization.targets.rules import (
    DQ_FUSES_ALL,
    FROM_DQ,
    NEVER_BFLOAT16,
    SIGNED,
    Preference,
    Preferences,
    Request,
    column_major_warnings,
    dq_warnings,
    looks_up_on_cpu,
    looks_up_quantized,
    lookup_since,
    smallest_head,
    unfused_in_dq,
)
from stages.records.formats import Granularity, PerBlock, WeightForm

_EIGHT_BIT: Release = (1, 22)
"""ORT#24509"""
_BFLOAT16: Release = (1, 23)
"""ORT#25161"""
_GATHER: Release = (1, 23)
"""ORT#25575"""
_EXPERTS: Release = (1, 28)
"""First whose QMoE lays out codes itself where weights_prepacked is 0 (ORT#28749, #28978), and takes blocks of 32
(ORT#29038). 1.27 reads blocks only as its own GPU build packs them (ORT#28467), releases before it no blocks."""
_EXPERT_FORMAT = ExpertFormat(
    bits=4,
    whose="CUDA's",
    dtypes=frozenset({"float16", "bfloat16"}),
    blocks=(128, 64, 32),
    per_channel=False,
    multiple=64,
    router_weights=True,
    packed_unless_said=True,
)
"""moe_quantization.cc: T is float16 or bfloat16, and tiles of interleaved weights have 64 inputs. Zero points, which it
takes too, keep a token at a time from its fast path (ORT#29038)."""
_LARGEST_BLOCK = 128
"""matmul_4bits.cu throws "block size ... is not supported" past it."""


def prefer(request: Request) -> Preferences:
    eight_bit = _eight_bit(request)
    lm_head = smallest_head(eight_bit)
    stored = request.stores_eight_bit(eight_bit.value, request.lm_head(lm_head.value))
    return Preferences(
        scale_range=SIGNED,
        form=_form(request, eight_bit=stored),
        block_size=Preference(32, "every kernel takes it, and CUTLASS's compact build (opt-in) no other; not run here"),
        eight_bit=eight_bit,
        zero_point=Preference(False, "CUTLASS's compact build takes none (ORT#32699), other kernels do; not run here"),
        lm_head=lm_head,
        embedding=lookup_since(request, _GATHER, "CUDA has GatherBlockQuantized (ORT#25575)"),
        gather_block_size=_gather_block(request),
        experts=_experts(request),
    )


def _experts(request: Request) -> Preference[ExpertFormat | None]:
    if "float32" in request.facts.dtypes:
        return Preference(None, "CUDA's QMoE takes float16 and bfloat16 only; ONNX Runtime gives others to the CPU")
    if request.release < _EXPERTS:
        return Preference(None, f"{request.version} reads experts only as a GPU packs them; 1.28 packs them itself")
    return Preference(
        _EXPERT_FORMAT, "its QMoE packs them when it is loaded (weights_prepacked 0, ORT#28749); not run here"
    )


def _eight_bit(request: Request) -> Preference[Granularity | None]:
    if request.release < _EIGHT_BIT:
        return Preference(None, f"{request.version} has no 8-bit MatMulNBits on CUDA; 1.22 is the first")
    return Preference(PerBlock(block_size=32), "CUTLASS's compact build (opt-in) takes no other; not run here")


def _form(request: Request, *, eight_bit: bool) -> Preference[WeightForm]:
    if request.is_bfloat16:
        return Preference(WeightForm.MATMUL_NBITS, NEVER_BFLOAT16)
    if eight_bit and request.release >= _EIGHT_BIT:
        why = "it has 8-bit kernels (ORT#24509), but nobody tests fusing 8-bit codes there; not run here"
        return Preference(WeightForm.MATMUL_NBITS, why)
    unfused = unfused_in_dq(request, eight_bit=eight_bit, float16=False)
    if unfused and not eight_bit:
        return Preference(WeightForm.MATMUL_NBITS, f"{request.version} fuses no DequantizeLinear with {unfused}")
    return Preference(WeightForm.DQ, "fused into MatMulNBits as on the CPU: rows [K, N], one reader each; not run here")


def _gather_block(request: Request) -> Preference[int]:
    """Return a size that divides the width: else GatherBlockQuantized reads another block's scale (ORT#32663)."""
    divides = all(width % 32 == 0 for width in request.facts.embedding_widths)
    return Preference(32 if divides else 16, "CUDA's kernel needs a size that divides the width (ORT#32663)")


def warnings(request: Request, choice: FormatChoice) -> Iterator[str]:
    eight_bit = request.stores_eight_bit(_eight_bit(request).value, choice.lm_head)
    if request.is_bfloat16 and request.release < _BFLOAT16:
        yield f"{request.version} has no bfloat16 MatMulNBits on CUDA; use 1.23 or later (ORT#25161)."
    if choice.form in FROM_DQ:
        yield from _dq_warnings(request, eight_bit=eight_bit)
    if choice.form is WeightForm.DQ_COLUMN_MAJOR:
        yield from column_major_warnings(request, choice, eight_bit=eight_bit)
    if choice.form is WeightForm.MATMUL_NBITS and eight_bit and request.release < _EIGHT_BIT:
        yield f"{request.version} has no 8-bit MatMulNBits on CUDA; leave INT8 out or use 1.22 or later."
    if choice.four_bit.block_size > _LARGEST_BLOCK:
        yield (
            f"CUDA's MatMulNBits refuses blocks of {choice.four_bit.block_size}; choose --block_size "
            f"{_LARGEST_BLOCK} or less."
        )
    yield from _gather_warnings(request, choice)


def _dq_warnings(request: Request, *, eight_bit: bool) -> Iterator[str]:
    kernels = not eight_bit or request.release >= _EIGHT_BIT
    fix = "choose --weight_operator matmul_nbits" if kernels else "leave INT8 out"
    unfused = unfused_in_dq(request, eight_bit=eight_bit, float16=False)
    yield from dq_warnings(request, unfused, f"{fix} or use 1.25 or later")
    if eight_bit and request.release >= DQ_FUSES_ALL:
        yield (
            "Nobody tests on CUDA that DequantizeLinear with 8-bit codes is fused; choose --weight_operator "
            "matmul_nbits."
        )


def _gather_warnings(request: Request, choice: FormatChoice) -> Iterator[str]:
    yield from looks_up_on_cpu(request, choice, _GATHER)
    if not looks_up_quantized(choice) or request.release < _GATHER:
        return
    size = choice.gather_block_size
    uneven = sorted(width for width in request.facts.embedding_widths if width % size)
    if choice.embedding_axis == 0:
        yield "CUDA's GatherBlockQuantized reads wrong scales on axis 0 (ORT#32663); choose --gather_quantize_axis 1."
    elif uneven:
        yield (
            f"CUDA's GatherBlockQuantized reads wrong scales where blocks of {size} don't divide the embedding's width "
            f"{uneven[0]} (ORT#32663); choose another --gather_block_size or --embedding none."
        )
