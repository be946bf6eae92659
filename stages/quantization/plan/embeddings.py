"""Plan embeddings: the format of every table, and which of them share the stored weight of lm_head.

A table and an lm_head are one weight where both hold the same numbers, however the graph stores them; then one table of
codes can serve both. It has blocks along a token's numbers, which are lm_head's inputs, and is stored as MatMulNBits
and GatherBlockQuantized read it; so blocks must divide a row, and no input scale may be folded into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import onnx_ir as ir

from stages.commands.quantize_options import ShareEmbedding
from stages.errors import OptionError
from stages.model.weights import find_tied_site
from stages.quantization.plan.plan_file import KEEP
from stages.quantization.targets.formats import Explanation, OpenFormats
from stages.records.formats import EmbeddingPlan, EmbeddingTable, PerBlock, QuantSpec, WeightForm
from stages.records.sites import BlockAxis, GatherForm, MatMulSite

_BLOCKS = (256, 128, 64, 32, 16)
_FORMS = (WeightForm.DQ, WeightForm.MATMUL_NBITS)
"""Of the other weights, beside which a shared one may stand as MatMulNBits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableFormat:
    """How a table of its own is stored; see EmbeddingPlan."""

    bits: Literal[4, 8]
    axis: BlockAxis
    block_size: int
    form: GatherForm
    scale_range: Literal["full", "signed"] = "full"


def plan_embeddings(tables: Sequence[EmbeddingTable], wanted: TableFormat) -> tuple[EmbeddingPlan, ...]:
    """Return the same format for every table.

    Raises:
        OptionError: no operator looks such a table up.
    """
    if wanted.bits == 8 and wanted.axis == 0 and wanted.form == "gather_block_quantized":
        raise OptionError(
            "--gather_quantize_axis 0 can't be combined with --embedding 8: GatherBlockQuantized takes INT8 only with "
            "scales along a token's numbers; leave one of them out."
        )
    return tuple(
        EmbeddingPlan(
            table=table,
            axis=wanted.axis,
            block_size=wanted.block_size,
            form=wanted.form,
            bits=wanted.bits,
            scale_range=wanted.scale_range,
        )
        for table in tables
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TableCandidates:
    """How a budget may store a table that is no weight of a MatMul, by label; None: it stays as it is."""

    table: EmbeddingTable
    formats: Mapping[str, EmbeddingPlan | None]

    @property
    def name(self) -> str:
        """Return what losses and choices are kept under."""
        return f"embedding {self.table.weight}"

    @property
    def specs(self) -> dict[str, QuantSpec]:
        """Return the formats without keep."""
        return {label: plan.spec for label, plan in self.formats.items() if plan is not None}


def open_tables(
    usual: Sequence[EmbeddingPlan], four_bit: Sequence[EmbeddingPlan], sites: Sequence[MatMulSite]
) -> tuple[TableCandidates, ...]:
    """Return what a budget may choose from for each table that neither shares nor is the weight of a MatMul.

    Args:
        usual: what the tables get without a budget.
        four_bit: the same in INT4.
        sites: all of the model.
    """
    weights = {site.weight for site in sites}
    by_table = {plan.table.weight: plan for plan in four_bit}
    return tuple(
        TableCandidates(
            table=plan.table,
            formats={each.spec.label: each for each in (by_table[plan.table.weight], plan)} | {KEEP: None},
        )
        for plan in usual
        if plan.shared_with is None and plan.table.weight not in weights
    )


def with_tables(
    plans: Sequence[EmbeddingPlan], tables: Sequence[TableCandidates], labels: Mapping[str, str]
) -> tuple[EmbeddingPlan, ...]:
    """Return ``plans`` in which the tables that were open have the formats of ``labels``, without those that stay."""
    chosen = {each.table.weight: each.formats[labels[each.name]] for each in tables}
    found = (chosen.get(plan.table.weight, plan) for plan in plans)
    return tuple(plan for plan in found if plan is not None)


def require_tables(tables: Sequence[EmbeddingTable]) -> None:
    """Raise OptionError where a model without embeddings is asked to quantize one."""
    if not tables:
        raise OptionError(
            "--embedding: no Gather of the model looks input_ids up in a constant rank-2 floating-point table; leave "
            "the option out."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedTables:
    """Tables that share lm_head's weight, with the format that both get."""

    specs: Mapping[str, QuantSpec]
    """By the name of the lm_head site."""
    heads: Mapping[str, str]
    """Name of the site by the table's initializer."""
    open: Mapping[str, tuple[QuantSpec, ...]] = field(default_factory=dict)
    """Formats that a budget chooses from, the smallest first, by the name of the lm_head site."""
    explanations: tuple[Explanation, ...] = ()
    """One for each table that is one weight with lm_head in the base."""

    def joined(self, plans: Sequence[EmbeddingPlan]) -> tuple[EmbeddingPlan, ...]:
        """Return ``plans`` in which the shared tables have lm_head's format and name."""
        return tuple(self._joined(plan) for plan in plans)

    def _joined(self, plan: EmbeddingPlan) -> EmbeddingPlan:
        head = self.heads.get(plan.table.weight)
        if head is None:
            return plan
        return _as_head(replace(plan, shared_with=head), self.specs[head])


def following_heads(plans: Sequence[EmbeddingPlan], specs: Mapping[str, QuantSpec]) -> tuple[EmbeddingPlan, ...]:
    """Return ``plans`` in which shared tables have the formats that ``specs`` give their lm_heads."""
    return tuple(plan if plan.shared_with is None else _as_head(plan, specs[plan.shared_with]) for plan in plans)


def _as_head(plan: EmbeddingPlan, spec: QuantSpec) -> EmbeddingPlan:
    """Return a shared table's plan with the format of its lm_head."""
    return replace(
        plan,
        bits=spec.bits,
        symmetric=spec.symmetric,
        block_size=spec.block_size(plan.table.hidden),
        scale_range="full",
        scale_dtype=spec.scale_dtype,
    )


NOTHING_SHARED = SharedTables(specs={}, heads={})


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """What is wanted of tables that could be shared."""

    option: ShareEmbedding
    form: WeightForm
    symmetric: bool
    """Whether INT4 has no zero points."""
    eight_bit_symmetric: bool
    head_bits: Literal[4, 8] | None
    """What was asked for lm_head; None: nothing."""
    table_bits: Literal[4, 8] | None = None
    """What was asked for the embedding; None: nothing."""
    four_bit: PerBlock
    """Blocks of an INT4 table that the embedding alone would not have."""
    open: OpenFormats | None = None
    """What a budget may choose from; None: there is none, or it was asked for a format."""
    skipped: Mapping[str, str]
    """(site, why) for sites that stay as they are."""
    given: Mapping[str, QuantSpec]
    """Formats that a plan file gives to sites, which stay; empty where lm_head takes the table's."""
    runtime_cannot: str = ""
    """Why the target reads no such table; empty where it does."""


def share_tables(
    model: ir.Model, plans: Sequence[EmbeddingPlan], sites: Sequence[MatMulSite], wanted: Sharing
) -> SharedTables:
    """Return which tables share the stored weight of lm_head.

    Args:
        model: the base; the weights of a table and of what could be its lm_head are compared.
        plans: the tables that are quantized, each with the format that it would have alone.
        sites: all sites of the model.
        wanted: what options say.

    Raises:
        OptionError: ``--share_embedding on`` can't be had.
    """
    if wanted.option == "off":
        return NOTHING_SHARED
    specs, heads, explained = dict[str, QuantSpec](), dict[str, str](), list[Explanation]()
    opened = dict[str, tuple[QuantSpec, ...]]()
    for plan in plans:
        head = find_tied_site(model, plan.table, sites)
        found = _shared_spec(plan, head, wanted)
        if isinstance(found, str) and wanted.option == "on":
            raise OptionError(f"--share_embedding on: {found}; leave the option out.")
        if head is None:
            continue
        if not isinstance(found, str):
            specs[head.name], heads[plan.table.weight] = found, head.name
            if wanted.open is not None and not wanted.head_bits and not wanted.table_bits:
                opened[head.name] = _open_specs(found, plan.table.hidden, wanted.open)
        explained.append(_explanation(found, is_open=bool(opened)))
    if wanted.option == "on" and not plans:
        raise OptionError("--share_embedding on: no embedding is quantized; add --embedding 8.")
    return SharedTables(specs=specs, heads=heads, open=opened, explanations=tuple(explained))


def _open_specs(found: QuantSpec, hidden: int, formats: OpenFormats) -> tuple[QuantSpec, ...]:
    """Return INT4 in every block that divides a row, and what the table has without a budget."""
    return (
        *(
            replace(found, bits=4, symmetric=not zero_point, granularity=blocks)
            for blocks in formats.four_bit
            for zero_point in formats.zero_points
            if hidden % blocks.block_size == 0
        ),
        found,
    )


def _explanation(found: QuantSpec | str, *, is_open: bool) -> Explanation:
    if isinstance(found, str):
        return Explanation(option="--share_embedding", chosen="no", why=found)
    tied = "embedding and lm_head are one weight in the base, and one table of codes serves both"
    if is_open:
        return Explanation(option="--share_embedding", chosen="yes", why=f"{tied}; the budget chooses its format")
    return Explanation(option="--share_embedding", chosen=f"yes, {found.label}", why=tied)


def _shared_spec(plan: EmbeddingPlan, head: MatMulSite | None, wanted: Sharing) -> QuantSpec | str:
    """Return the format of the table that both read, or why there is none."""
    if head is None:
        return f"'{plan.table.weight}' holds other numbers than every lm_head of the model, so one table can't be both"
    if head.name in wanted.skipped:
        return f"'{head.name}' stays as it is ({wanted.skipped[head.name]})"
    if wanted.runtime_cannot:
        return wanted.runtime_cannot
    if wanted.form not in _FORMS:
        return f"weights in the form {wanted.form.value} are not for MatMulNBits, which a shared table needs"
    if plan.form != "gather_block_quantized" or plan.axis != 1:
        return "only GatherBlockQuantized over blocks of one token's numbers reads what lm_head reads"
    given = wanted.given.get(head.name)
    if given is not None:
        if wanted.table_bits not in (None, given.bits):
            return f"lm_head is INT{given.bits} and the embedding INT{wanted.table_bits} (--plan, --embedding)"
        return given if _divides(given, plan) else f"blocks of {given.label} don't divide rows of {plan.table.hidden}"
    if wanted.head_bits and wanted.table_bits and wanted.head_bits != wanted.table_bits:
        return f"lm_head is INT{wanted.head_bits} and the embedding INT{wanted.table_bits} (--lm_head, --embedding)"
    bits = wanted.table_bits or wanted.head_bits or plan.bits
    largest = wanted.four_bit.block_size if bits < plan.bits else plan.block_size
    size = next((size for size in _BLOCKS if size <= largest and plan.table.hidden % size == 0), None)
    if size is None:
        return f"no block size divides rows of {plan.table.hidden} numbers"
    granularity = PerBlock(block_size=size)
    symmetric = wanted.eight_bit_symmetric if bits == 8 else wanted.symmetric
    return QuantSpec(bits=bits, symmetric=symmetric, granularity=granularity, scale_dtype=plan.spec.scale_dtype)


def _divides(spec: QuantSpec, plan: EmbeddingPlan) -> bool:
    return isinstance(spec.granularity, PerBlock) and plan.table.hidden % spec.granularity.block_size == 0
