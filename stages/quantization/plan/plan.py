"""Plan from options what every weight of a model becomes, before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

import onnx_ir as ir

from stages.calibration.cache import CalibrationCache
from stages.commands.parsing import Target
from stages.commands.quantize_options import QuantizeConfig
from stages.model.directory import ModelDirectory
from stages.model.sites import find_embeddings, find_expert_layers, find_groups, find_skipped_matmuls
from stages.model.unquantized import find_unquantized, require_float_base
from stages.quantization.checkpoints.imported import ImportedWeights
from stages.quantization.plan.budget.candidates import SiteCandidates, chosen_experts, chosen_plan, expert_candidates
from stages.quantization.plan.budget.left_open import OpenPlan, explained_tables, fixed_by_table, open_choice, open_plan
from stages.quantization.plan.embeddings import (
    SharedTables,
    Sharing,
    TableCandidates,
    TableFormat,
    following_heads,
    open_tables,
    plan_embeddings,
    require_tables,
    share_tables,
    with_tables,
)
from stages.quantization.plan.experts import ExpertPlan, plan_experts
from stages.quantization.plan.given import PlannedFormats, given_plan, imported_plan
from stages.quantization.plan.output_size import output_size
from stages.quantization.plan.requested import Chooser, find_target, requested_formats
from stages.quantization.plan.rules import QuantPlan, all_sites, make_plan, named_sites, names_lm_head
from stages.quantization.targets.formats import Explanation, FormatChoice, OpenFormats, facts_of
from stages.quantization.targets.rules import why_not_shared
from stages.quantization.weights.rotary import RotaryTables, find_rotary_tables
from stages.records.experts import ExpertLayer
from stages.records.formats import EmbeddingPlan, EmbeddingTable
from stages.records.sites import ActivationGroup, MatMulSite, UnquantizedWeights

_SPREADS = frozenset({"cpu"})
"""Runtimes in which INT4 and INT8 of several blocks were run side by side."""

_TENTH = 100_000
"""Bytes of a tenth of a megabyte, to which the budget that nobody gave is rounded up."""

_BITS: Mapping[str, Literal[4, 8]] = MappingProxyType({"4": 4, "8": 8})
"""Values of --lm_head and --embedding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """The formats, what each site and embedding becomes, and the weights that are no site's.

    With a budget ``sites`` holds each site's smallest format until ``left_open`` is decided.
    """

    target: Target | None
    """None: no runtime in particular."""
    target_because: str
    """Why, where the base model decided about the target; empty where it was named."""
    choice: FormatChoice
    sites: QuantPlan
    embeddings: tuple[EmbeddingPlan, ...]
    unquantized: tuple[UnquantizedWeights, ...]
    experts: ExpertPlan = field(default_factory=ExpertPlan)
    """Part of ``sites`` too."""
    rotary: tuple[RotaryTables, ...] = ()
    """Tables that the output computes."""
    by_site: str = ""
    """The option or checkpoint that chooses each site's format; empty where one holds for all but named sites."""
    left_open: OpenPlan | None = None
    imported: ImportedWeights | None = None
    """The sites whose codes come from a checkpoint; None where all are searched."""


def plan_search(
    config: QuantizeConfig, model: ir.Model, directory: ModelDirectory, cache: CalibrationCache | None
) -> ModelPlan:
    """Return ``plan_model``'s plan, with the budget that ``own_budget`` gives where it gives one.

    Args:
        config: valid options.
        model: the base model.
        directory: where it lies.
        cache: the statistics; None where there are none.

    Raises:
        UserError: what ``plan_model`` raises.
    """
    plan = plan_model(config, model, directory)
    budget = own_budget(config, plan, model, directory, cache)
    return plan if budget is None else plan_model(replace(config, target_size=budget), model, directory)


def own_budget(
    config: QuantizeConfig,
    plan: ModelPlan,
    model: ir.Model,
    directory: ModelDirectory,
    cache: CalibrationCache | None,
) -> str | None:
    """Return the size of ``plan`` as a budget, where nobody chose the format of each site; else None.

    Spent site by site its bytes lose less than one format for all. That needs losses in nats, which only statistics
    weighted by the end loss give, and a runtime in which formats side by side were run.

    Args:
        config: valid options.
        plan: what ``plan_model`` makes of them.
        model: the base model.
        directory: where it lies.
        cache: the statistics; None where there are none.
    """
    in_nats = cache is not None and cache.manifest.key.token_weights == "end loss"
    if not in_nats or not spreads_its_bytes(config, plan):
        return None
    size = output_size(directory, model, plan.choice, plan.embeddings, plan.rotary)
    num_bytes = size.total_bytes(all_sites(plan.sites.groups), plan.sites.specs)
    return f"{math.ceil(num_bytes / _TENTH) / 10:.1f}MB"


def spreads_its_bytes(config: QuantizeConfig, plan: ModelPlan) -> bool:
    """Return whether the bytes of ``plan`` are spent site by site once there are losses in nats."""
    is_open = config.leaves_formats_open and config.accuracy_level is None
    return is_open and plan.target is not None and plan.target.runtime in _SPREADS


def plan_model(config: QuantizeConfig, model: ir.Model, directory: ModelDirectory) -> ModelPlan:
    """Decide about every weight of a model.

    Args:
        config: valid options.
        model: the base model; of its weights only an embedding and what could be its lm_head are read, to tell whether
            they are one.
        directory: where it lies.

    Raises:
        GraphError: the model holds nothing to quantize, or is quantized already.
        OptionError: options that fit neither each other nor the model, a budget that can't be reached, or a plan file
            that can't be used.
    """
    require_float_base(model, directory)
    asked = _Question.about(config, model, directory)
    planned = asked.formats_of_sites()
    alone = asked.embeddings(planned.choice)
    shared = share_tables(model, alone, all_sites(asked.groups), asked.sharing(planned))
    rotary = find_rotary_tables(model) if planned.choice.rotary == "computed" else ()
    decided = _Decided(
        choice=planned.choice,
        sites=replace(planned.sites, specs={**planned.sites.specs, **shared.specs}),
        experts=asked.experts(planned),
        embeddings=shared.joined(alone),
    )
    if planned.candidates:
        decided = asked.left_to_budget(decided, planned.candidates, shared, rotary)
    choice, experts, sites = decided.choice, decided.experts, decided.experts.joined(decided.sites)
    return ModelPlan(
        target=asked.chooser.target,
        target_because=asked.target_because,
        choice=replace(choice, explanations=(*choice.explanations, *shared.explanations, *_explained(rotary))),
        sites=replace(sites, skipped=(*sites.skipped, *find_skipped_matmuls(model))),
        embeddings=decided.embeddings,
        unquantized=find_unquantized(
            model, {plan.table.weight for plan in decided.embeddings} | experts.tables, experts.stay
        ),
        experts=experts,
        rotary=rotary,
        by_site=_chooses_by_site(config),
        left_open=decided.left_open,
        imported=planned.imported,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decided:
    """What each kind of weight becomes; with a budget the smallest of ``left_open``."""

    choice: FormatChoice
    sites: QuantPlan
    experts: ExpertPlan
    embeddings: tuple[EmbeddingPlan, ...]
    left_open: OpenPlan | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    """What is decided about: the options, the weights that a model holds, and the formats that its target has."""

    config: QuantizeConfig
    model: ir.Model
    directory: ModelDirectory
    groups: tuple[ActivationGroup, ...]
    tables: tuple[EmbeddingTable, ...]
    layers: tuple[ExpertLayer, ...]
    chooser: Chooser
    target_because: str
    open_formats: OpenFormats | None
    """Those that a budget chooses from; None without one."""

    @classmethod
    def about(cls, config: QuantizeConfig, model: ir.Model, directory: ModelDirectory) -> _Question:
        groups, tables, layers = find_groups(model), find_embeddings(model), find_expert_layers(model)
        facts = facts_of(groups, tables, layers)
        decided = find_target(config, directory, facts)
        sites = [*all_sites(groups), *_sites_of(layers)]
        chooser = Chooser(target=decided.target, requested=requested_formats(config, sites), facts=facts)
        return cls(
            config=config,
            model=model,
            directory=directory,
            groups=groups,
            tables=tables,
            layers=layers,
            chooser=chooser,
            target_because=decided.why,
            open_formats=chooser.open() if config.has_budget else None,
        )

    def formats_of_sites(self) -> PlannedFormats:
        """Return each site's format as a file gives it or the target wants it; with a budget the smallest."""
        config, groups, chooser = self.config, self.groups, self.chooser
        if config.plan is not None:
            return given_plan(config, groups, chooser, self.layers)
        if config.checkpoint is not None:
            return imported_plan(config, config.checkpoint, self.model, groups, chooser, self.layers)
        of_experts = _sites_of(self.layers)
        if self.open_formats is None:
            choice = chooser.choose()
            return PlannedFormats(choice=choice, sites=make_plan(groups, config, choice, of_experts))
        choice, candidates = open_choice(config, groups, chooser, self.open_formats, of_experts)
        return PlannedFormats(choice=choice, sites=_smallest(groups, candidates), candidates=candidates)

    def experts(self, planned: PlannedFormats) -> ExpertPlan:
        """Return what the experts of each layer become."""
        named = named_sites([*all_sites(self.groups), *_sites_of(self.layers)], self.config, planned.choice)
        return plan_experts(self.model, self.layers, planned.choice, named, planned.experts, planned.stays_because)

    def embeddings(self, choice: FormatChoice) -> tuple[EmbeddingPlan, ...]:
        """Return what each table becomes where it shares nothing with lm_head."""
        if self.config.requested_embedding in ("4", "8"):
            require_tables(self.tables)
        if choice.embedding_bits is None:
            return ()
        wanted = TableFormat(
            bits=choice.embedding_bits,
            axis=choice.embedding_axis,
            block_size=choice.gather_block_size,
            form=choice.gather_form,
            scale_range="signed" if choice.scale_range == "signed" else "full",
        )
        plans = plan_embeddings(self.tables, wanted)
        return tuple(replace(plan, scale_dtype=choice.scale_dtype(plan.table.dtype)) for plan in plans)

    def sharing(self, planned: PlannedFormats) -> Sharing:
        """Return on what terms a table and lm_head may be one weight."""
        config, choice, sites = self.config, planned.choice, planned.sites
        wanted = Sharing(
            option=config.share_embedding,
            form=choice.form,
            symmetric=choice.symmetric,
            eight_bit_symmetric=not config.use_zero_point if config.has_budget else choice.symmetric,
            head_bits=8 if names_lm_head(all_sites(sites.groups), config) else _BITS.get(config.lm_head or ""),
            four_bit=choice.four_bit,
            table_bits=_BITS.get(config.requested_embedding or ""),
            skipped=dict(sites.skipped),
            given=sites.specs if config.plan is not None or config.checkpoint is not None else {},
            runtime_cannot=why_not_shared(self.chooser.target),
        )
        if self.open_formats is None or config.gather_block_size is not None:
            return wanted
        return replace(wanted, open=self.open_formats)

    def left_to_budget(
        self,
        decided: _Decided,
        candidates: tuple[SiteCandidates, ...],
        shared: SharedTables,
        rotary: tuple[RotaryTables, ...],
    ) -> _Decided:
        """Return ``decided`` with all that a budget chooses left open.

        Args:
            decided: what holds without a budget.
            candidates: the formats of each site that is no expert's.
            shared: tables that share lm_head's weight.
            rotary: tables that the output computes.
        """
        config, choice, embeddings = self.config, decided.choice, decided.embeddings
        assert self.open_formats is not None, "without a budget there are no candidates"
        candidates = tuple(fixed_by_table(each, shared) for each in candidates)
        candidates += expert_candidates(decided.experts, config, choice, self.open_formats)
        opened = self._open_tables(embeddings)
        settled = tuple(plan for plan in embeddings if plan.table not in [each.table for each in opened])
        size = output_size(self.directory, self.model, choice, settled, rotary)
        sites = _smallest(self.groups, candidates)
        return _Decided(
            choice=replace(choice, explanations=tuple(explained_tables(choice.explanations, opened))),
            sites=sites,
            experts=chosen_experts(decided.experts, candidates, _smallest_labels(candidates)),
            embeddings=with_tables(following_heads(embeddings, sites.specs), opened, _smallest_labels(opened)),
            left_open=open_plan(config, choice, candidates, opened, size),
        )

    def _open_tables(self, usual: tuple[EmbeddingPlan, ...]) -> tuple[TableCandidates, ...]:
        """Return the tables whose formats a size chooses: where no option says anything, and only rows are read."""
        config = self.config
        if config.target_size is None or config.requested_embedding is not None or config.gather_block_size is not None:
            return ()
        choice = replace(self.chooser, requested=replace(self.chooser.requested, embedding="4")).choose()
        if not usual or choice.gather_form != "gather_block_quantized":
            return ()
        return open_tables(usual, self.embeddings(choice), all_sites(self.groups))


def _sites_of(layers: Sequence[ExpertLayer]) -> list[MatMulSite]:
    return [site for layer in layers for site in layer.sites]


def _explained(rotary: tuple[RotaryTables, ...]) -> Iterator[Explanation]:
    if rotary:
        saved = sum(tables.saved_bytes for tables in rotary) / 1e6
        why = f"one frequency a column gives them when the model is loaded: {saved:,.1f} MB less"
        yield Explanation(option="--rotary_tables", chosen="computed", why=why)


def _smallest(groups: tuple[ActivationGroup, ...], candidates: tuple[SiteCandidates, ...]) -> QuantPlan:
    """Return the plan that gives every site the first of its formats."""
    return chosen_plan(groups, candidates, _smallest_labels(candidates), "")


def _smallest_labels(candidates: Sequence[SiteCandidates | TableCandidates]) -> dict[str, str]:
    return {each.name: next(iter(each.formats)) for each in candidates}


def _chooses_by_site(config: QuantizeConfig) -> str:
    if config.checkpoint is not None:
        return config.checkpoint.absolute().name
    if config.plan is not None:
        return "--plan"
    return config.budget_description if config.has_budget else ""
