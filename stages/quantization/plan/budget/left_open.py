"""Leave open what a budget decides: the formats that every site and table may have, and the budget itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from stages.commands.parsing import parse_size
from stages.commands.quantize_options import Algorithm, QuantizeConfig, Sensitivity
from stages.quantization.plan.budget.candidates import (
    BitsBudget,
    Budget,
    BudgetRange,
    SiteCandidates,
    SizeBudget,
    check_budget,
    site_candidates,
)
from stages.quantization.plan.budget.forecast import SearchTraits
from stages.quantization.plan.embeddings import SharedTables, TableCandidates
from stages.quantization.plan.output_size import OutputSize, table_bytes
from stages.quantization.plan.requested import Chooser
from stages.quantization.targets.formats import Explanation, FormatChoice, OpenFormats
from stages.records.sites import ActivationGroup, MatMulSite

_COMPENSATING: frozenset[Algorithm] = frozenset({"gptq", "awq_gptq"})


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenPlan:
    """What is left to decide once losses are known: a format for every site, within the budget that all share."""

    option: str
    """The budget as it was given: ``--target_bpw 5``."""
    candidates: tuple[SiteCandidates, ...]
    tables: tuple[TableCandidates, ...]
    budget: Budget
    reachable: BudgetRange
    sensitivity: Sensitivity
    search: SearchTraits
    size: OutputSize


def open_choice(
    config: QuantizeConfig,
    groups: tuple[ActivationGroup, ...],
    chooser: Chooser,
    formats: OpenFormats,
    of_experts: Sequence[MatMulSite],
) -> tuple[FormatChoice, tuple[SiteCandidates, ...]]:
    """Return the target's choice for what a budget doesn't decide, and the candidates for what it does."""
    named = chooser.requested.named_eight_bit or formats.eight_bit is not None
    choice = replace(chooser, requested=replace(chooser.requested, named_eight_bit=named)).choose()
    explained = tuple(_explained_as_open(line, formats) for line in choice.explanations)
    choice = replace(choice, explanations=explained)
    return choice, site_candidates(groups, config, choice, formats, of_experts)


def _explained_as_open(line: Explanation, formats: OpenFormats) -> Explanation:
    open_to_it = {
        "--block_size": [str(each.block_size) for each in formats.four_bit],
        "--use_zero_point": ["yes" if each else "no" for each in formats.zero_points],
    }
    chosen = open_to_it.get(line.option, [])
    if len(chosen) < 2:
        return line
    return replace(line, chosen=", ".join(chosen), why="the budget chooses among those that this runtime runs fast")


def open_plan(
    config: QuantizeConfig,
    choice: FormatChoice,
    candidates: tuple[SiteCandidates, ...],
    tables: tuple[TableCandidates, ...],
    size: OutputSize,
) -> OpenPlan:
    budget: Budget
    if config.target_bpw is not None:
        budget = BitsBudget(
            bits_per_weight=config.target_bpw,
            cost=lambda each, label: sum(size.number_bytes(site, each.formats[label]) for site in each.sites),
        )
    else:
        typed = (config.target_size or "").strip()
        budget = SizeBudget(
            typed=typed,
            num_bytes=parse_size(typed, "--target_size"),
            fixed_bytes=size.fixed_bytes([site for each in candidates for site in each.sites])
            - sum(table_bytes(each.table, None) for each in tables),
            tables=tables,
            # A table that lm_head shares follows the head's format, or becomes a second one.
            wider_tables=not tables
            and config.requested_embedding != "4"
            and all(each.shared_with is None for each in size.embeddings),
            cost=lambda each, label: sum(size.site_bytes(site, each.formats[label]) for site in each.sites),
        )
    return OpenPlan(
        option=config.budget_description,
        candidates=candidates,
        tables=tables,
        budget=budget,
        reachable=check_budget(candidates, budget),
        sensitivity=config.sensitivity or "cache",
        search=SearchTraits(rule=choice.scale_range, compensates=config.search_algorithm in _COMPENSATING),
        size=size,
    )


def explained_tables(lines: Sequence[Explanation], opened: Sequence[TableCandidates]) -> Iterator[Explanation]:
    """Yield ``lines``; of tables that are open what they may become."""
    for line in lines:
        if opened and line.option == "--embedding":
            yield replace(line, chosen=", ".join(opened[0].formats), why="the budget chooses")
        elif not opened or line.option != "--gather_block_size":
            yield line


def fixed_by_table(candidates: SiteCandidates, shared: SharedTables) -> SiteCandidates:
    """Return the formats of an lm_head that an embedding shares."""
    spec = shared.specs.get(candidates.site.name)
    if spec is None:
        return candidates
    opened = shared.open.get(candidates.site.name)
    if opened:
        return replace(candidates, formats={each.label: each for each in opened})
    return replace(candidates, formats={spec.label: spec}, fixed_because="the embedding reads it too (--embedding)")
