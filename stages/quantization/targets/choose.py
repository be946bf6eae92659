"""Choose the runtime, and the number formats for it: what was asked for, and for the rest what it runs fast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from stages.commands.options import AccuracyLevel
from stages.commands.parsing import RELEASES, Runtime, Target, parse_target
from stages.commands.quantize_options import ScaleType
from stages.errors import OptionError
from stages.model.directory import ModelDirectory
from stages.quantization.targets import cpu, cuda, dml, qnn, trt_rtx, webgpu
from stages.quantization.targets.explain import explain
from stages.quantization.targets.formats import (
    EmbeddingBits,
    ExpertFormat,
    FormatChoice,
    ModelFacts,
    OpenFormats,
    RequestedFormats,
)
from stages.quantization.targets.rules import BLOCKS, POSITIVE, Preference, Preferences, Request, Rules
from stages.records.formats import Granularity, PerBlock, PerChannel, WeightForm
from stages.runtime.session import ACCURACY_LEVEL

RULES: Mapping[Runtime, Rules] = {
    "cpu": Rules(cpu.prefer, cpu.warnings),
    "cuda": Rules(cuda.prefer, cuda.warnings),
    "dml": Rules(dml.prefer, dml.warnings),
    "trt-rtx": Rules(trt_rtx.prefer, trt_rtx.warnings),
    "webgpu": Rules(webgpu.prefer, webgpu.warnings),
    "qnn": Rules(qnn.prefer, qnn.warnings),
}
_DEFAULT_EIGHT_BIT = PerChannel()
_EXPERT_BITS: Mapping[str, Literal[4, 8]] = MappingProxyType({"4": 4, "8": 8})
_ANY_EXPERTS_STAY = "no runtime is named (--experts 4 stores them as QMoE)"
_OPEN_EIGHT_BIT = PerBlock(block_size=128)
"""Of a budget: nearly the same bytes as a scale per channel, and exact over long rows too."""
_PROVIDERS: Mapping[str, Runtime] = MappingProxyType(
    {"cpu": "cpu", "cuda": "cuda", "dml": "dml", "nvtensorrtrtx": "trt-rtx", "webgpu": "webgpu", "qnn": "qnn"}
)
"""Execution providers as genai_config.json names them, in small letters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseTarget:
    """The runtime that a base model was built for; None: none whose rules are known."""

    target: Target | None
    why: str


def target_of_base(directory: ModelDirectory, facts: ModelFacts) -> BaseTarget:
    """Return the runtime that ``directory`` and ``facts`` tell of.

    genai_config.json's provider counts first. Where it names none, bfloat16 tells of CUDA, which only has kernels for
    it, and everything else of the CPU.
    """
    if directory.provider is not None:
        runtime = _PROVIDERS.get(directory.provider.lower())
        why = f"the base's genai_config.json names the provider {directory.provider}"
        if runtime is None:
            return BaseTarget(target=None, why=f"{why}, which has no rules here")
        return BaseTarget(target=parse_target(runtime), why=why)
    if "bfloat16" in facts.dtypes:
        return BaseTarget(target=parse_target("cuda"), why="the base is bfloat16, which only CUDA computes with")
    source = "genai_config.json" if directory.has_genai_config else "graph"
    return BaseTarget(target=parse_target("cpu"), why=f"the base's {source} names no provider, so the CPU's")


def choose_formats(target: Target | None, requested: RequestedFormats, facts: ModelFacts) -> FormatChoice:
    """Return the formats for ``target`` with the reasons; without a target those for any runtime, without reasons.

    Args:
        target: the runtime to please.
        requested: what was asked for, which wins.
        facts: what of the base model matters.
    """
    if target is None:
        return _for_any(requested, facts)
    request = Request(release=target.release, requested=requested, facts=facts)
    rules = RULES[target.runtime]
    preferred = rules.prefer(request)
    choice = _merge(request, preferred)
    warnings = (*rules.warnings(request, choice), *_warnings_everywhere(requested, choice))
    return replace(choice, explanations=explain(target, request, preferred, choice), warnings=warnings)


def open_formats(target: Target | None, requested: RequestedFormats, facts: ModelFacts) -> OpenFormats:
    """Return the formats that a budget may give a site.

    Args:
        target: the runtime to please; None: none in particular.
        requested: what was asked for, which wins.
        facts: what of the base model matters.
    """
    if target is None:
        return _opened(requested, BLOCKS, requested.eight_bit or _OPEN_EIGHT_BIT, zero_points=True)
    request = Request(release=target.release, requested=requested, facts=facts)
    preferred = RULES[target.runtime].prefer(request)
    fast = preferred.eight_bit.value
    eight_bit = None if fast is None else requested.eight_bit or fast
    return _opened(requested, preferred.open_blocks, eight_bit, zero_points=preferred.zero_point.value)


def _opened(
    requested: RequestedFormats, blocks: tuple[int, ...], eight_bit: Granularity | None, *, zero_points: bool
) -> OpenFormats:
    """Return what was asked for, and for the rest what the runtime runs fast.

    Args:
        requested: what was asked for.
        blocks: of INT4.
        eight_bit: None where there is no INT8.
        zero_points: whether INT4 with them is nearly as fast as without.
    """
    sizes = blocks if requested.block_size is None else (requested.block_size,)
    both = (False, True) if zero_points else (False,)
    return OpenFormats(
        four_bit=tuple(PerBlock(block_size=size) for size in sizes),
        zero_points=both if requested.zero_point is None else (requested.zero_point,),
        eight_bit=eight_bit,
    )


def _for_any(requested: RequestedFormats, facts: ModelFacts) -> FormatChoice:
    form = WeightForm.MATMUL_NBITS if "bfloat16" in facts.dtypes else WeightForm.DQ
    experts = _any_experts(requested)
    choice = FormatChoice(
        form=requested.form or form,
        four_bit=PerBlock(block_size=requested.block_size or 128),
        eight_bit=requested.eight_bit or _DEFAULT_EIGHT_BIT,
        symmetric=not requested.zero_point,
        scale_range=requested.scale_range or "full",
        scale_type=requested.scale_type or "base",
        rotary=requested.rotary or "stored",
        gather_form=requested.gather_form or "gather_block_quantized",
        gather_block_size=requested.gather_block_size or 32,
        accuracy_level=requested.accuracy_level,
        lm_head=requested.lm_head,
        embedding_bits=_embedding_bits(requested, None),
        embedding_axis=requested.embedding_axis,
        experts=experts,
        experts_stay="" if experts is not None or not facts.has_experts else _ANY_EXPERTS_STAY,
    )
    request = Request(release=RELEASES[-1], requested=requested, facts=facts)
    warnings = (*cpu.slower_than_base(request, choice), *_warnings_everywhere(requested, choice))
    return replace(choice, warnings=warnings)


def _embedding_bits(requested: RequestedFormats, preferred: EmbeddingBits | None) -> EmbeddingBits | None:
    match requested.embedding:
        case None:
            return preferred
        case "none":
            return None
        case "4":
            return 4
        case "8":
            return 8


def _any_experts(requested: RequestedFormats) -> ExpertFormat | None:
    """Return what every release with QMoE takes, where experts are asked for."""
    bits = _EXPERT_BITS.get(requested.experts or "")
    return None if bits is None else ExpertFormat(bits=bits)


def _experts(request: Request, preferred: Preference[ExpertFormat | None]) -> tuple[ExpertFormat | None, str]:
    """Return the format of experts, or why they stay.

    Raises:
        OptionError: they are asked for, and the runtime can't.
    """
    if not request.facts.has_experts:
        return None, ""
    asked = request.requested.experts
    if asked == "none":
        return None, "--experts none"
    if preferred.value is None:
        if asked is not None:
            raise OptionError(f"--experts {asked}: {preferred.why}; leave it out, or choose --target cpu.")
        return None, preferred.why
    return replace(preferred.value, bits=_EXPERT_BITS.get(asked or "", preferred.value.bits)), ""


def _merge(request: Request, preferred: Preferences) -> FormatChoice:
    requested = request.requested
    eight_bit: Granularity = requested.eight_bit or preferred.eight_bit.value or _DEFAULT_EIGHT_BIT
    wanted = None if preferred.accuracy_level is None else preferred.accuracy_level.value
    bits = _embedding_bits(requested, preferred.embedding.value) if request.facts.embedding_widths else None
    experts, stay = _experts(request, preferred.experts)
    # QuantizeLinear by a negative scale was never run.
    scale_range = POSITIVE if requested.form is WeightForm.QDQ else preferred.scale_range
    return FormatChoice(
        form=requested.form or preferred.form.value,
        four_bit=PerBlock(block_size=requested.block_size or preferred.block_size.value),
        eight_bit=eight_bit,
        symmetric=not (preferred.zero_point.value if requested.zero_point is None else requested.zero_point),
        scale_range=requested.scale_range or scale_range.value,
        scale_type=_scale_type(requested, preferred),
        rotary=requested.rotary or preferred.rotary.value,
        gather_form=requested.gather_form or "gather_block_quantized",
        gather_block_size=requested.gather_block_size or preferred.table_block_size(bits).value,
        accuracy_level=wanted if requested.accuracy_level is None else requested.accuracy_level,
        lm_head=request.lm_head(preferred.lm_head.value),
        embedding_bits=bits,
        embedding_axis=requested.embedding_axis,
        experts=experts,
        experts_stay=stay,
        keep_mixed_because=preferred.eight_bit.why if preferred.eight_bit.value is None else "",
        session_options=(*preferred.session_options, *_level_option(requested, wanted)),
    )


def _scale_type(requested: RequestedFormats, preferred: Preferences) -> ScaleType:
    """Return the type of stored scales: the graph's own where a QuantizeLinear divides by them."""
    if requested.form is WeightForm.QDQ:
        return "base"
    return requested.scale_type or preferred.scale_type.value


def _level_option(requested: RequestedFormats, wanted: AccuracyLevel | None) -> tuple[tuple[str, str], ...]:
    """Return the level as a session option, so that a later export without options gives the same level.

    A level that was asked for is given to that export again.
    """
    return () if wanted is None or requested.accuracy_level is not None else ((ACCURACY_LEVEL, str(wanted)),)


def _warnings_everywhere(requested: RequestedFormats, choice: FormatChoice) -> Iterator[str]:
    if requested.mixed and choice.keep_mixed_because:
        yield f"{choice.keep_mixed_because}: the sites of --enable_mixed_quant stay in floating point."
    if choice.embedding_bits is not None and choice.gather_form == "dq":
        yield (
            "ONNX Runtime never fuses DequantizeLinear and Gather: it expands the whole table for every token; leave "
            "--gather_form dq out."
        )
