"""What each runtime, at its newest release known, would say against the formats that a model has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from stages.config import AccuracyLevel
from stages.inspection.fusing import SCALES
from stages.inspection.stored import StoredWeight
from stages.records import Granularity, PerBlock, PerChannel, WeightForm
from stages.target.choose import RULES
from stages.target.formats import FormatChoice, FormatWishes, ModelTraits
from stages.target.name import Runtime, parse_target
from stages.target.rules import Request

_LEVELS: dict[str, AccuracyLevel] = {"0": 0, "1": 1, "2": 2, "3": 3, "4": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeAnswer:
    """One runtime's objections to the model as it is; none where it runs everything fast as far as is known."""

    runtime: str
    """With its release: cpu@1.32."""
    objections: tuple[str, ...]


def runtime_answers(weights: Sequence[StoredWeight], accuracy_level: str | None) -> tuple[RuntimeAnswer, ...]:
    """The answers for weights in blocks or with a scale per channel; none for models with other integer products.

    ``accuracy_level`` is that of genai_config.json's session options, if any.
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
                    for sentence in _objections(runtime, form, [*members, *_lookups(weights)], accuracy_level)
                )
            ),
        )
        for runtime in RULES
    )


def _is_foreign(weight: StoredWeight) -> bool:
    """Whether the runtimes' rules have nothing to say about it."""
    return weight.scales not in SCALES or weight.bits not in (4, 8) or weight.activations != "float"


def _form(weight: StoredWeight) -> WeightForm | None:
    operators = weight.form.split(" -> ")
    if operators[-1] not in ("MatMul", "Gemm", "MatMulNBits"):
        return None
    if operators[0] == "MatMulNBits":
        return WeightForm.MATMUL_NBITS
    if operators[0] == "QuantizeLinear":
        return WeightForm.QDQ
    return WeightForm.DQ_COLUMN_MAJOR if "Transpose" in operators else WeightForm.DQ


def _lookups(weights: Sequence[StoredWeight]) -> list[StoredWeight]:
    return [each for each in weights if each.form == "GatherBlockQuantized" or each.form.endswith(" -> Gather")]


def _objections(
    runtime: Runtime, form: WeightForm, weights: Sequence[StoredWeight], accuracy_level: str | None
) -> tuple[str, ...]:
    tables = _lookups(weights)
    products = [each for each in weights if each not in tables]
    four_bit, eight_bit = ([each for each in products if each.bits == bits] for bits in (4, 8))
    levels = [each.accuracy_level for each in products if each.accuracy_level is not None]
    level = str(levels[0]) if levels else accuracy_level
    wishes = FormatWishes(
        form=form,
        named_eight_bit=bool(eight_bit),
        zero_point=any(each.zero_point for each in products),
        gather_axis=1 if tables else None,
        gather_form="dq" if any(each.form.endswith(" -> Gather") for each in tables) else "gather_block_quantized",
    )
    traits = ModelTraits(
        dtypes=frozenset(SCALES[each.scales] for each in products),
        in_features=frozenset(each.shape[0] for each in products),
        has_gemm=any(each.form.endswith("Gemm") for each in products),
        embedding_widths=frozenset(each.shape[-1] for each in tables),
    )
    rules = RULES[runtime]
    request = Request(release=parse_target(runtime).release, wishes=wishes, traits=traits)
    preferred = rules.prefer(request)
    commonest = _commonest(four_bit)
    choice = FormatChoice(
        form=form,
        four_bit=commonest if isinstance(commonest, PerBlock) else PerBlock(block_size=preferred.block_size.value),
        eight_bit=_commonest(eight_bit) or preferred.eight_bit.value or PerChannel(),
        symmetric=not wishes.zero_point,
        scale_range=preferred.scale_range.value,
        gather_form=wishes.gather_form or "gather_block_quantized",
        gather_block_size=next((each.block_size for each in tables if each.block_size), 32),
        accuracy_level=_LEVELS.get(level or ""),
    )
    return tuple(rules.objections(request, choice))


def _commonest(weights: Sequence[StoredWeight]) -> Granularity | None:
    """The block size, or the scale per channel, that most of them have; None where there are none."""
    if not weights:
        return None
    size = Counter(each.block_size for each in weights).most_common(1)[0][0]
    return PerChannel() if size is None else PerBlock(block_size=size)
