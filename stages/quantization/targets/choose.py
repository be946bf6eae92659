"""Choose every format for a target: what was asked for, and for the rest what the target prefers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from stages.commands.options import AccuracyLevel
from stages.records.formats import Granularity
from stages.records.formats import PerBlock
from stages.records.formats import PerChannel
from stages.records.formats import WeightForm
from stages.runtime.session import ACCURACY_LEVEL
from stages.quantization.targets import cpu
from stages.quantization.targets import cuda
from stages.quantization.targets import dml
from stages.quantization.targets import qnn
from stages.quantization.targets import trt_rtx
from stages.quantization.targets import webgpu
from stages.quantization.targets.explain import explain
from stages.quantization.targets.formats import FormatChoice
from stages.quantization.targets.formats import FormatWishes
from stages.quantization.targets.formats import ModelTraits
from stages.quantization.targets.formats import OpenFormats
from stages.commands.parsing import Runtime
from stages.commands.parsing import Target
from stages.quantization.targets.rules import BLOCKS
from stages.quantization.targets.rules import POSITIVE
from stages.quantization.targets.rules import Preferences
from stages.quantization.targets.rules import Request
from stages.quantization.targets.rules import Rules

RULES: Mapping[Runtime, Rules] = {
    "cpu": Rules(cpu.prefer, cpu.objections),
    "cuda": Rules(cuda.prefer, cuda.objections),
    "dml": Rules(dml.prefer, dml.objections),
    "trt-rtx": Rules(trt_rtx.prefer, trt_rtx.objections),
    "webgpu": Rules(webgpu.prefer, webgpu.objections),
    "qnn": Rules(qnn.prefer, qnn.objections),
}
_DEFAULT_EIGHT_BIT = PerChannel()
_OPEN_EIGHT_BIT = PerBlock(block_size=128)
"""Of a budget: nearly the same bytes as a scale per channel, and exact over long rows too."""


def choose_formats(target: Target | None, wishes: FormatWishes, traits: ModelTraits) -> FormatChoice:
    """Formats for ``target``, with the reasons; without a target the tool's defaults, without reasons."""
    if target is None:
        return _defaults(wishes, traits)
    request = Request(release=target.release, wishes=wishes, traits=traits)
    rules = RULES[target.runtime]
    preferred = rules.prefer(request)
    choice = _merge(wishes, preferred)
    warnings = (*rules.objections(request, choice), *_objections_everywhere(wishes, choice))
    return replace(choice, explanations=explain(target, request, preferred, choice), warnings=warnings)


def open_formats(target: Target | None, wishes: FormatWishes, traits: ModelTraits) -> OpenFormats:
    """The formats that a budget may give a site; what was asked for wins here too."""
    if target is None:
        return _opened(wishes, BLOCKS, wishes.eight_bit or _OPEN_EIGHT_BIT)
    request = Request(release=target.release, wishes=wishes, traits=traits)
    preferred = RULES[target.runtime].prefer(request)
    fast = preferred.eight_bit.value
    return _opened(wishes, preferred.open_blocks, None if fast is None else wishes.eight_bit or fast)


def _opened(wishes: FormatWishes, blocks: tuple[int, ...], eight_bit: Granularity | None) -> OpenFormats:
    sizes = blocks if wishes.block_size is None else (wishes.block_size,)
    return OpenFormats(four_bit=tuple(PerBlock(block_size=size) for size in sizes), eight_bit=eight_bit)


def _defaults(wishes: FormatWishes, traits: ModelTraits) -> FormatChoice:
    form = WeightForm.MATMUL_NBITS if "bfloat16" in traits.dtypes else WeightForm.DQ
    return FormatChoice(
        form=wishes.form or form,
        four_bit=PerBlock(block_size=wishes.block_size or 128),
        eight_bit=wishes.eight_bit or _DEFAULT_EIGHT_BIT,
        symmetric=not wishes.zero_point,
        scale_range=wishes.scale_range or "full",
        gather_form=wishes.gather_form or "gather_block_quantized",
        gather_block_size=wishes.gather_block_size or 32,
        accuracy_level=wishes.accuracy_level,
    )


def _merge(wishes: FormatWishes, preferred: Preferences) -> FormatChoice:
    eight_bit: Granularity = wishes.eight_bit or preferred.eight_bit.value or _DEFAULT_EIGHT_BIT
    wanted = None if preferred.accuracy_level is None else preferred.accuracy_level.value
    # QuantizeLinear by a negative scale was never run.
    scale_range = POSITIVE if wishes.form is WeightForm.QDQ else preferred.scale_range
    return FormatChoice(
        form=wishes.form or preferred.form.value,
        four_bit=PerBlock(block_size=wishes.block_size or preferred.block_size.value),
        eight_bit=eight_bit,
        symmetric=not wishes.zero_point,
        scale_range=wishes.scale_range or scale_range.value,
        gather_form=wishes.gather_form or "gather_block_quantized",
        gather_block_size=wishes.gather_block_size or preferred.gather_block_size.value,
        accuracy_level=wanted if wishes.accuracy_level is None else wishes.accuracy_level,
        keep_mixed_because=preferred.eight_bit.why if preferred.eight_bit.value is None else "",
        session_options=(*preferred.session_options, *_level_option(wishes, wanted)),
    )


def _level_option(wishes: FormatWishes, wanted: AccuracyLevel | None) -> tuple[tuple[str, str], ...]:
    """Recorded, so that exporting again alone gives the same level; a level that was asked for is given again."""
    return () if wanted is None or wishes.accuracy_level is not None else ((ACCURACY_LEVEL, str(wanted)),)


def _objections_everywhere(wishes: FormatWishes, choice: FormatChoice) -> Iterator[str]:
    if wishes.mixed and choice.keep_mixed_because:
        yield f"{choice.keep_mixed_because}: the sites of --enable_mixed_quant stay in floating point."
    if wishes.gather_axis is not None and choice.gather_form == "dq":
        yield (
            "ONNX Runtime never fuses DequantizeLinear and Gather: it expands the whole table for every token; leave "
            "--gather_form dq out."
        )
