"""Budgets in bits a weight or in bytes: the formats open to each site, and the best choice that a budget allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from stages.commands.quantize_options import QuantizeConfig
from stages.errors import OptionError
from stages.quantization.plan.budget.knapsack import Allocation, Candidate, allocate, smallest_cost
from stages.quantization.plan.embeddings import TableCandidates
from stages.quantization.plan.experts import ExpertPlan, fitting, node_name
from stages.quantization.plan.output_size import table_bytes
from stages.quantization.plan.plan_file import KEEP
from stages.quantization.plan.rules import NamedSites, QuantPlan, all_sites, named_sites, plan_of
from stages.quantization.targets.formats import ExpertFormat, FormatChoice, OpenFormats
from stages.records.formats import Granularity, QuantSpec
from stages.records.sites import ActivationGroup, MatMulSite

Losses = Mapping[str, Mapping[str, float]]
"""Expected loss by name of the candidates and label; keep has none and needs no entry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteCandidates:
    """The formats that one site may have, by label; None: it stays as it is."""

    site: MatMulSite
    formats: Mapping[str, QuantSpec | None]
    fixed_because: str = ""
    """The option that left only one format, or only INT4; empty where everything is open."""
    alike: tuple[MatMulSite, ...] = ()
    """Further sites that get the same format: the other experts of a MoE node."""

    @property
    def name(self) -> str:
        """Return the site's name, or that of all experts of its node."""
        return self.site.name if self.site.expert is None else node_name(self.site)

    @property
    def sites(self) -> tuple[MatMulSite, ...]:
        """Return all sites that get the chosen format."""
        return self.site, *self.alike

    @property
    def specs(self) -> dict[str, QuantSpec]:
        """Return the formats without keep."""
        return {label: spec for label, spec in self.formats.items() if spec is not None}

    @property
    def may_stay(self) -> bool:
        """Tell whether the budget decides if the site is quantized at all."""
        return len(self.formats) > 1 and KEEP in self.formats


CandidateCost = Callable[[SiteCandidates, str], int]
"""Bytes that a site takes under a label."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BitsBudget:
    """``--target_bpw``: bits of codes, scales and zero points, a weight of the sites that are quantized.

    ``cost`` counts the bytes of these; nothing for what stays.
    """

    bits_per_weight: float
    cost: CandidateCost


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeBudget:
    """``--target_size``: bytes of the whole model."""

    typed: str
    """As a person wrote it."""
    num_bytes: int
    fixed_bytes: int
    """Everything but what ``cost`` and the tables count."""
    cost: CandidateCost
    tables: tuple[TableCandidates, ...] = ()
    """Embeddings whose formats it chooses too."""
    wider_tables: bool = False
    """Whether --embedding 4 would make others smaller."""


Budget = BitsBudget | SizeBudget


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetRange:
    """The smallest and the largest value that a budget can have, in its own unit."""

    smallest: float
    largest: float
    unit: Literal["bits a weight", "bytes"]

    @property
    def summary(self) -> str:
        return f"{self.words} can be reached"

    @property
    def words(self) -> str:
        """Return both ends as a person can type them: rounded up, so that neither is refused."""
        if self.unit == "bytes":
            low, high = (f"{math.ceil(end / 1e5) / 10:.1f}MB" for end in (self.smallest, self.largest))
            return f"from {low} to {high}"
        low, high = (f"{math.ceil(end * 1000) / 1000:g}" for end in (self.smallest, self.largest))
        return f"from {low} to {high} {self.unit}"


def site_candidates(
    groups: Sequence[ActivationGroup],
    config: QuantizeConfig,
    choice: FormatChoice,
    formats: OpenFormats,
    experts: Sequence[MatMulSite] = (),
) -> tuple[SiteCandidates, ...]:
    """Return the candidates of every site, in graph order.

    lm_head may stay as it is, where nobody said what becomes of it; nothing else may.

    Args:
        groups: all MatMuls of the model.
        config: what becomes of lm_head, and whether zero points were asked for.
        choice: what the budget doesn't decide.
        formats: what it chooses from.
        experts: sites of experts, which patterns may name too.

    Raises:
        OptionError: a pattern matches no site.
    """
    sites = all_sites(groups)
    named = named_sites([*sites, *experts], config, choice)
    return tuple(_candidates_of(site, config, choice, formats, named) for site in sites)


def expert_candidates(
    plan: ExpertPlan, config: QuantizeConfig, choice: FormatChoice, formats: OpenFormats
) -> tuple[SiteCandidates, ...]:
    """Return the candidates of every MoE node whose experts are quantized: all of them get one format.

    Args:
        plan: the experts' formats without a budget.
        config: whether their bits, zero points or sensitivities were asked for.
        choice: what the budget doesn't decide.
        formats: what it chooses from.
    """
    nodes: dict[str, list[MatMulSite]] = {}
    for site in all_sites(plan.groups):
        nodes.setdefault(node_name(site), []).append(site)
    return tuple(
        _candidates_of_node(sites, plan.specs[sites[0].name], config, choice, formats) for sites in nodes.values()
    )


def _candidates_of_node(
    sites: Sequence[MatMulSite], usual: QuantSpec, config: QuantizeConfig, choice: FormatChoice, formats: OpenFormats
) -> SiteCandidates:
    assert choice.experts is not None, "the plan has experts"
    experts, (first, second) = choice.experts, sites[:2]
    bits, because = _bits_of_node(usual, config, experts, formats)
    sizes = {4: formats.four_bit, 8: (formats.eight_bit or choice.eight_bit,)}
    zero_points = {
        4: [each for each in formats.zero_points if experts.zero_points or not each] or [False],
        8: [experts.zero_points and config.use_zero_point is True],
    }
    specs = [
        replace(usual, bits=each, symmetric=not zero_point, granularity=granularity)
        for each in bits
        for size in sizes[each]
        if (granularity := fitting(size, first.in_features, second.in_features, experts)) is not None
        for zero_point in zero_points[each]
    ] or [usual]
    if config.sensitivity == "measured":
        specs, because = [usual], "--sensitivity measured tries the weights of MatMuls only"
    return SiteCandidates(
        site=first, formats={spec.label: spec for spec in specs}, fixed_because=because, alike=tuple(sites[1:])
    )


def _bits_of_node(
    usual: QuantSpec, config: QuantizeConfig, experts: ExpertFormat, formats: OpenFormats
) -> tuple[tuple[Literal[4, 8], ...], str]:
    """Return the bits that are open to a node's experts, and the option that leaves only one of them."""
    if config.experts in ("4", "8"):
        return (usual.bits,), f"--experts {config.experts}"
    if usual.bits != experts.bits:
        return (usual.bits,), "--layers_8bit"
    return ((4,) if formats.eight_bit is None else (4, 8)), ""


def chosen_experts(plan: ExpertPlan, candidates: Sequence[SiteCandidates], labels: Mapping[str, str]) -> ExpertPlan:
    """Return ``plan`` with the format of each node's label.

    Args:
        plan: the experts that are quantized.
        candidates: the formats that each node may have, among others.
        labels: the chosen one, by name.
    """
    chosen = {site.name: each.formats[labels[each.name]] for each in candidates for site in each.sites}
    return replace(plan, specs={name: chosen[name] or spec for name, spec in plan.specs.items()})


def chosen_plan(
    groups: Sequence[ActivationGroup],
    candidates: Sequence[SiteCandidates],
    labels: Mapping[str, str],
    skipped_because: str,
) -> QuantPlan:
    """Return the plan that gives every site the format of its label.

    Args:
        groups: all sites of the model.
        candidates: the formats that each site may have.
        labels: the chosen one, by name.
        skipped_because: why a site stays as it is where no option says so.
    """
    formats = {each.site.name: each.formats[labels[each.name]] for each in candidates}
    specs = {name: spec for name, spec in formats.items() if spec is not None}
    skipped = {
        each.site.name: each.fixed_because or skipped_because for each in candidates if formats[each.site.name] is None
    }
    return plan_of(groups, specs, skipped)


def check_budget(candidates: Sequence[SiteCandidates], budget: Budget) -> BudgetRange:
    """Return the values that can be reached.

    Raises:
        OptionError: nothing would be quantized, or ``budget`` lies below the smallest.
    """
    if all(set(each.formats) == {KEEP} for each in candidates):
        raise OptionError("--exclude matches every MatMul of the model: nothing would be quantized.")
    reachable = _budget_range(candidates, budget)
    match budget:
        case BitsBudget(bits_per_weight=bits) if bits < reachable.smallest:
            raise OptionError(f"--target_bpw {bits:g} can't be reached: these sites can have {reachable.words}.")
        case SizeBudget(typed=typed, num_bytes=size) if size < reachable.smallest:
            hints = list(_ways_to_less(candidates, budget))
            smaller = f" ({', '.join(hints)})" if hints else ""
            unit = "." if typed[-1].isalpha() else f"; a number without a unit counts bytes, did you mean {typed}MB?"
            raise OptionError(
                f"--target_size {typed} can't be reached: this model can have {reachable.words}{smaller}{unit}"
            )
    return reachable


def _ways_to_less(candidates: Sequence[SiteCandidates], budget: SizeBudget) -> Iterator[str]:
    """Yield options that make a model smaller than any choice that this budget has."""
    if budget.wider_tables:
        yield "--embedding 4 makes embeddings smaller"
    heads = [each for each in candidates if each.site.is_lm_head]
    if any(all(spec.bits != 4 for spec in each.specs.values()) for each in heads):
        yield "--lm_head 4 makes the head smaller"


def best_allocation(candidates: Sequence[SiteCandidates], budget: Budget, losses: Losses) -> Allocation:
    """Return a label for every site, with the smallest sum of ``losses`` that ``budget`` allows.

    Requires: ``check_budget`` raised nothing.
    """
    found = []
    for case in _cases(candidates, budget):
        costs = _costs_and_losses(case, losses)
        if smallest_cost(costs) <= case.num_bytes:
            found.append(allocate(costs, case.num_bytes))
    return min(found, key=lambda allocation: allocation.loss)


def _candidates_of(
    site: MatMulSite, config: QuantizeConfig, choice: FormatChoice, formats: OpenFormats, named: NamedSites
) -> SiteCandidates:
    scale_dtype = choice.scale_dtype(site.dtype)

    def specs(
        bits: Literal[4, 8], granularities: Iterable[Granularity], zero_points: Iterable[bool]
    ) -> dict[str, QuantSpec | None]:
        made = (
            QuantSpec(bits=bits, symmetric=not zero_point, granularity=each, scale_dtype=scale_dtype)
            for each in granularities
            for zero_point in zero_points
        )
        return {spec.label: spec for spec in made}

    four_bit = specs(4, formats.four_bit, formats.zero_points)
    # A zero point gains nothing among 256 levels, unless it was asked for.
    eight_bit = specs(8, [formats.eight_bit or choice.eight_bit], [config.use_zero_point is True])
    everything = four_bit if formats.eight_bit is None else four_bit | eight_bit
    if site.name in named.skipped:
        return SiteCandidates(site=site, formats={KEEP: None}, fixed_because=named.skipped[site.name])
    if site.name in named.eight_bit:
        because = "--lm_head 8" if site.is_lm_head and config.lm_head == "8" else "--layers_8bit"
        return SiteCandidates(site=site, formats=eight_bit, fixed_because=because)
    if not site.is_lm_head:
        return SiteCandidates(site=site, formats=everything)
    if config.lm_head == "4":
        return SiteCandidates(site=site, formats=four_bit, fixed_because="--lm_head 4")
    return SiteCandidates(site=site, formats={**everything, KEEP: None})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """A budget in bytes over candidates whose number of quantized weights is settled."""

    candidates: tuple[SiteCandidates, ...]
    cost: CandidateCost
    num_bytes: int
    tables: tuple[TableCandidates, ...] = ()


def _cases(candidates: Sequence[SiteCandidates], budget: Budget) -> list[_Case]:
    """Return the problems to solve, the best of which counts.

    A site that stays counts for no bits a weight: with it and without it are two problems, each with its bytes.
    """
    if isinstance(budget, SizeBudget):
        left = budget.num_bytes - budget.fixed_bytes
        return [_Case(candidates=tuple(candidates), cost=budget.cost, num_bytes=left, tables=budget.tables)]
    quantized = tuple(replace(each, formats=each.specs) if each.may_stay else each for each in candidates)
    kept = tuple(replace(each, formats={KEEP: None}) if each.may_stay else each for each in candidates)
    variants = [quantized] if kept == quantized else [quantized, kept]
    return [
        _Case(candidates=variant, cost=budget.cost, num_bytes=int(budget.bits_per_weight * weights / 8))
        for variant in variants
        if (weights := _num_weights(variant))
    ]


def _num_weights(candidates: Sequence[SiteCandidates]) -> int:
    """Return the number of weights of the sites that are quantized in any case."""
    return sum(
        site.in_features * site.out_features for each in candidates if KEEP not in each.formats for site in each.sites
    )


def _costs_and_losses(case: _Case, losses: Losses) -> dict[str, list[Candidate]]:
    tables = {
        each.name: [
            Candidate(
                key=label,
                cost=table_bytes(each.table, plan),
                loss=0.0 if plan is None else losses[each.name][label],
            )
            for label, plan in each.formats.items()
        ]
        for each in case.tables
    }
    return tables | {
        each.name: [
            Candidate(
                key=label,
                cost=case.cost(each, label),
                loss=0.0 if spec is None else losses[each.name][label],
            )
            for label, spec in each.formats.items()
        ]
        for each in case.candidates
    }


def _budget_range(candidates: Sequence[SiteCandidates], budget: Budget) -> BudgetRange:
    if isinstance(budget, SizeBudget):
        low, high = _cost_range(candidates, budget.cost)
        tables = [[table_bytes(each.table, plan) for plan in each.formats.values()] for each in budget.tables]
        fixed = budget.fixed_bytes
        low, high = fixed + low + sum(map(min, tables)), fixed + high + sum(map(max, tables))
        return BudgetRange(smallest=float(low), largest=float(high), unit="bytes")
    ends: list[float] = []
    for case in _cases(candidates, budget):
        ends += [8 * total / _num_weights(case.candidates) for total in _cost_range(case.candidates, budget.cost)]
    return BudgetRange(smallest=min(ends), largest=max(ends), unit="bits a weight")


def _cost_range(candidates: Sequence[SiteCandidates], cost: CandidateCost) -> tuple[int, int]:
    """Return the smallest and the largest sum of the sites' costs."""
    costs = [[cost(each, label) for label in each.formats] for each in candidates]
    return sum(map(min, costs)), sum(map(max, costs))
