"""Explain what was chosen for a target and why: the lines of a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stages.commands.parsing import Target
from stages.commands.tables import Column, DataTable
from stages.quantization.targets.formats import Explanation, FormatChoice
from stages.quantization.targets.rules import Preferences, Request
from stages.records.formats import Granularity, PerBlock, WeightForm
from stages.records.sites import FloatName
from stages.runtime.session import ACCURACY_LEVEL

_ASKED = "as asked"
_FORMS = {
    WeightForm.DQ: "dq",
    WeightForm.QDQ: "Q -> dq, of --algo rtn",
    WeightForm.DQ_COLUMN_MAJOR: "dq, column-major",
    WeightForm.MATMUL_NBITS: "matmul_nbits",
}


def explain(target: Target, request: Request, preferred: Preferences, choice: FormatChoice) -> tuple[Explanation, ...]:
    """Return one line for each thing that the target decides.

    Args:
        target: the runtime.
        request: what was asked for, and the model.
        preferred: what the runtime runs fast.
        choice: what was chosen.
    """
    return (
        *_release(target),
        *_weights(request, preferred, choice),
        *_scale_range(request, preferred, choice),
        *_lm_head(request, preferred, choice),
        *_eight_bit(request, preferred, choice),
        *_embedding(request, preferred, choice),
        *_experts(request, preferred, choice),
        *_session(request, preferred, choice),
    )


def _release(target: Target) -> Iterator[Explanation]:
    if target.about_release:
        yield Explanation(option="--target", chosen=target.label, why=target.about_release)


def _weights(request: Request, preferred: Preferences, choice: FormatChoice) -> Iterator[Explanation]:
    requested = request.requested
    yield Explanation(
        option="--weight_operator",
        chosen=_FORMS[choice.form],
        why=_ASKED if requested.form else preferred.form.why,
    )
    yield Explanation(
        option="--block_size",
        chosen=str(choice.four_bit.block_size),
        why=_ASKED if requested.block_size else preferred.block_size.why,
    )
    yield Explanation(
        option="--use_zero_point",
        chosen="no" if choice.symmetric else "yes",
        why=preferred.zero_point.why if requested.zero_point is None else _ASKED,
    )
    yield Explanation(
        option="--scale_type",
        chosen=", ".join(sorted({_scales(choice, computed) for computed in request.facts.dtypes})),
        why=_ASKED if requested.scale_type else preferred.scale_type.why,
    )


def _scales(choice: FormatChoice, computed: FloatName) -> str:
    narrow = choice.scale_dtype(computed)
    return f"bytes, {narrow}" if choice.scale_type == "bytes" and narrow != computed else narrow


def _scale_range(request: Request, preferred: Preferences, choice: FormatChoice) -> Iterator[Explanation]:
    if not choice.symmetric or choice.form is WeightForm.QDQ:
        return
    why = _ASKED if request.requested.scale_range else preferred.scale_range.why
    yield Explanation(option="--scale_range", chosen=choice.scale_range, why=why)


def _lm_head(request: Request, preferred: Preferences, choice: FormatChoice) -> Iterator[Explanation]:
    if choice.lm_head is not None:
        why = _ASKED if request.requested.lm_head else preferred.lm_head.why
        yield Explanation(option="--lm_head", chosen=choice.lm_head, why=why)


def _eight_bit(request: Request, preferred: Preferences, choice: FormatChoice) -> Iterator[Explanation]:
    requested = request.requested
    if requested.mixed and choice.keep_mixed_because:
        yield Explanation(
            option="--enable_mixed_quant",
            chosen="floating point",
            why=f"{choice.keep_mixed_because}; INT4 would cost accuracy where it matters most",
        )
    if request.stores_eight_bit(preferred.eight_bit.value, choice.lm_head):
        yield Explanation(
            option="--int8_block_size",
            chosen=_describe(choice.eight_bit),
            why=_ASKED if requested.eight_bit else preferred.eight_bit.why,
        )


def _describe(granularity: Granularity) -> str:
    return str(granularity.block_size) if isinstance(granularity, PerBlock) else "channel"


def _embedding(request: Request, preferred: Preferences, choice: FormatChoice) -> Iterator[Explanation]:
    if not request.facts.embedding_widths:
        return
    asked, bits = request.requested.embedding is not None, choice.embedding_bits
    why = _ASKED if asked else preferred.embedding.why
    if bits is None and not asked:
        why += f": {request.facts.embedding_bytes / 1e6:,.1f} MB stay in floating point"
    yield Explanation(option="--embedding", chosen="none" if bits is None else str(bits), why=why)
    if bits is not None:
        why = _ASKED if request.requested.gather_form else "DequantizeLinear and Gather expand the table for each token"
        yield Explanation(option="--gather_form", chosen=choice.gather_form, why=why)
        asked = request.requested.gather_block_size is not None
        yield Explanation(
            option="--gather_block_size",
            chosen=str(choice.gather_block_size),
            why=_ASKED if asked else preferred.table_block_size(bits).why,
        )


def _experts(request: Request, preferred: Preferences, choice: FormatChoice) -> Iterator[Explanation]:
    if request.facts.has_experts:
        chosen = "none" if choice.experts is None else str(choice.experts.bits)
        why = _ASKED if request.requested.experts else preferred.experts.why
        yield Explanation(option="--experts", chosen=chosen, why=why)


def _session(request: Request, preferred: Preferences, choice: FormatChoice) -> Iterator[Explanation]:
    if preferred.accuracy_level is not None:
        asked = request.requested.accuracy_level is not None
        yield Explanation(
            option="--accuracy_level",
            chosen="not set" if choice.accuracy_level is None else str(choice.accuracy_level),
            why=_ASKED if asked else preferred.accuracy_level.why,
        )
    for key, value in choice.session_options:
        if key == ACCURACY_LEVEL:
            continue
        yield Explanation(option=key, chosen=value, why="written into genai_config.json's session options")


def choice_table(target: str, explanations: Sequence[Explanation]) -> DataTable:
    """Return what was chosen for ``target``, one line an option."""
    columns = (Column(heading="option"), Column(heading="chosen"), Column(heading="why", wraps=True))
    rows = tuple((line.option, line.chosen, line.why) for line in explanations)
    return DataTable(title=f"formats for {target}", columns=columns, rows=rows)
