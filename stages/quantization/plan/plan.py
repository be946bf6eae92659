"""Plan from options what every weight of a model becomes, before anything is computed."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import onnx_ir as ir
import torch
from pydantic import TypeAdapter
from torch import Tensor

from stages.calibration.cache import CalibrationCache
from stages.commands.parsing import Target, parse_size
from stages.commands.quantize_options import Algorithm, QuantizeConfig, Sensitivity
from stages.errors import OptionError
from stages.model.directory import ModelDirectory
from stages.model.sites import find_embeddings, find_expert_layers, find_groups, find_skipped_matmuls
from stages.model.unquantized import find_unquantized, require_float_base
from stages.model.weights import read_vector, read_weight
from stages.quantization.blocks.signround import SignRoundOptions
from stages.quantization.checkpoints.checkpoint import open_checkpoint
from stages.quantization.checkpoints.imported import (
    GraphWeights,
    ImportedWeights,
    WantedFormats,
    find_imported,
    split_groups,
)
from stages.quantization.plan.budget import (
    BitsBudget,
    Budget,
    BudgetRange,
    SiteCandidates,
    SizeBudget,
    check_budget,
    chosen_experts,
    chosen_plan,
    expert_candidates,
    site_candidates,
)
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
from stages.quantization.plan.experts import ExpertPlan, import_experts, node_name, plan_experts, runs_experts
from stages.quantization.plan.forecast import SearchTraits
from stages.quantization.plan.output_size import OutputSize, output_size, table_bytes
from stages.quantization.plan.plan_file import read_plan, spec_of
from stages.quantization.plan.rules import (
    QuantPlan,
    all_sites,
    asked_by_name,
    excludes_lm_head,
    make_plan,
    named_sites,
    names_lm_head,
    plan_of,
)
from stages.quantization.search.problem import SearchOptions
from stages.quantization.search.solver import ALGORITHMS, GroupSolver
from stages.quantization.targets.choose import BaseTarget, choose_formats, open_formats, target_of_base
from stages.quantization.targets.formats import (
    Explanation,
    FormatChoice,
    ModelFacts,
    OpenFormats,
    RequestedFormats,
    facts_of,
)
from stages.quantization.targets.rules import why_not_shared
from stages.quantization.weights.rotary import RotaryTables, find_rotary_tables
from stages.records.experts import ExpertLayer
from stages.records.formats import (
    EmbeddingPlan,
    EmbeddingTable,
    Granularity,
    PerBlock,
    PerChannel,
    QuantSpec,
    WeightForm,
)
from stages.records.quantities import counted
from stages.records.results import ExportRecipe, SearchStats
from stages.records.sites import ActivationGroup, MatMulSite, UnquantizedWeights

_SPREADS = frozenset({"cpu"})
"""Runtimes in which INT4 and INT8 of several blocks were run side by side."""
_TENTH = 100_000
"""Bytes of a tenth of a megabyte, to which the budget that nobody gave is rounded up."""
_CPU = torch.device("cpu")
_COMPENSATING: frozenset[Algorithm] = frozenset({"gptq", "awq_gptq"})
_STAYS: Literal["none"] = "none"
_LEFT_IN_FLOAT = "--checkpoint leaves it in floating point"
_BITS: Mapping[str, Literal[4, 8]] = MappingProxyType({"4": 4, "8": 8})
"""Values of --lm_head and --embedding."""


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
    groups, tables, layers = find_groups(model), find_embeddings(model), find_expert_layers(model)
    facts = facts_of(groups, tables, layers)
    decided = _target(config, directory, facts)
    of_experts = [site for layer in layers for site in layer.sites]
    every_site = [*all_sites(groups), *of_experts]
    chooser = _Chooser(target=decided.target, requested=_requested(config, every_site), facts=facts)
    candidates: tuple[SiteCandidates, ...] = ()
    formats = chooser.open() if config.has_budget else None
    imported: ImportedWeights | None = None
    given: dict[str, QuantSpec | None] = {}
    if config.plan is not None:
        choice, sites, given = _given_plan(config, groups, chooser, layers)
    elif config.checkpoint is not None:
        choice, sites, imported, given = _imported_plan(config, config.checkpoint, model, groups, chooser, layers)
    elif formats is not None:
        choice, candidates = _open_choice(config, groups, chooser, formats, of_experts)
        sites = _smallest(groups, candidates)
    else:
        choice = chooser.choose()
        sites = make_plan(groups, config, choice, of_experts)
    kept_because = "--plan: keep" if config.checkpoint is None else _LEFT_IN_FLOAT
    experts = plan_experts(model, layers, choice, named_sites(every_site, config, choice), given, kept_because)
    alone = _embedding_plans(config, choice, tables)
    wanted = _sharing(config, decided.target, choice, sites)
    if formats is not None and config.gather_block_size is None:
        wanted = replace(wanted, open=formats)
    shared = share_tables(model, alone, all_sites(groups), wanted)
    embeddings = shared.joined(alone)
    rotary = find_rotary_tables(model) if choice.rotary == "computed" else ()
    left_open: OpenPlan | None = None
    if candidates:
        assert formats is not None, "without a budget there are no candidates"
        candidates = tuple(_fixed_by_table(each, shared) for each in candidates)
        candidates += expert_candidates(experts, config, choice, formats)
        opened = _open_tables(config, chooser, tables, embeddings, all_sites(groups))
        settled = tuple(plan for plan in embeddings if plan.table not in [each.table for each in opened])
        size = output_size(directory, model, choice, settled, rotary)
        left_open = _open_plan(config, choice, candidates, opened, size)
        sites = _smallest(groups, candidates)
        experts = chosen_experts(experts, candidates, _smallest_labels(candidates))
        embeddings = with_tables(following_heads(embeddings, sites.specs), opened, _smallest_labels(opened))
        choice = replace(choice, explanations=tuple(_explained_tables(choice.explanations, opened)))
    else:
        sites = replace(sites, specs={**sites.specs, **shared.specs})
    sites = experts.joined(sites)
    return ModelPlan(
        target=decided.target,
        target_because=decided.why,
        choice=replace(choice, explanations=(*choice.explanations, *shared.explanations, *_explained(rotary))),
        sites=replace(sites, skipped=(*sites.skipped, *find_skipped_matmuls(model))),
        embeddings=embeddings,
        unquantized=find_unquantized(model, {plan.table.weight for plan in embeddings} | experts.tables, experts.stay),
        experts=experts,
        rotary=rotary,
        by_site=_chooses_by_site(config),
        left_open=left_open,
        imported=imported,
    )


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


def _open_tables(
    config: QuantizeConfig,
    chooser: _Chooser,
    tables: tuple[EmbeddingTable, ...],
    usual: tuple[EmbeddingPlan, ...],
    sites: Sequence[MatMulSite],
) -> tuple[TableCandidates, ...]:
    """Return the tables whose formats a size chooses: where no option says anything, and rows are all that is read."""
    if config.target_size is None or config.requested_embedding is not None or config.gather_block_size is not None:
        return ()
    choice = replace(chooser, requested=replace(chooser.requested, embedding="4")).choose()
    if not usual or choice.gather_form != "gather_block_quantized":
        return ()
    return open_tables(usual, _embedding_plans(config, choice, tables), sites)


def _explained_tables(lines: Sequence[Explanation], opened: Sequence[TableCandidates]) -> Iterator[Explanation]:
    """Yield ``lines``; of tables that are open what they may become."""
    for line in lines:
        if opened and line.option == "--embedding":
            yield replace(line, chosen=", ".join(opened[0].formats), why="the budget chooses")
        elif not opened or line.option != "--gather_block_size":
            yield line


def _fixed_by_table(candidates: SiteCandidates, shared: SharedTables) -> SiteCandidates:
    """Return the formats of an lm_head that an embedding shares."""
    spec = shared.specs.get(candidates.site.name)
    if spec is None:
        return candidates
    opened = shared.open.get(candidates.site.name)
    if opened:
        return replace(candidates, formats={each.label: each for each in opened})
    return replace(candidates, formats={spec.label: spec}, fixed_because="the embedding reads it too (--embedding)")


def _sharing(config: QuantizeConfig, target: Target | None, choice: FormatChoice, sites: QuantPlan) -> Sharing:
    return Sharing(
        option=config.share_embedding,
        form=choice.form,
        symmetric=choice.symmetric,
        eight_bit_symmetric=not config.use_zero_point if config.has_budget else choice.symmetric,
        head_bits=8 if names_lm_head(all_sites(sites.groups), config) else _BITS.get(config.lm_head or ""),
        four_bit=choice.four_bit,
        table_bits=_BITS.get(config.requested_embedding or ""),
        skipped=dict(sites.skipped),
        given=sites.specs if config.plan is not None or config.checkpoint is not None else {},
        runtime_cannot=why_not_shared(target),
    )


def make_recipe(config: QuantizeConfig, plan: ModelPlan, fingerprint: str, cache_digest: str) -> ExportRecipe:
    """Return the recipe of the quantized weights; its ``search`` digest covers all that the codes depend on.

    Args:
        config: the algorithm and its options.
        plan: the formats.
        fingerprint: the base model's.
        cache_digest: identifies the calibration; empty where none is used.
    """
    digest = hashlib.sha256()
    for part in (
        TypeAdapter(SearchOptions).dump_json(search_options(config, plan.choice)),
        TypeAdapter(dict[str, QuantSpec]).dump_json(dict(plan.sites.specs)),
        repr((config.algo, config.awqlite_run_per_subgraph, config.awqlite_disable_fuse_nodes)).encode(),
        TypeAdapter(tuple[EmbeddingPlan, ...]).dump_json(plan.embeddings),
        cache_digest.encode(),
        _tuning(config),
        b"" if plan.imported is None else plan.imported.checkpoint.fingerprint().encode(),
    ):
        digest.update(part)
    return ExportRecipe(
        model_fingerprint=fingerprint,
        weight_form=plan.choice.form,
        fold_input_scales=not config.awqlite_disable_fuse_nodes,
        groups=plan.sites.groups,
        kept=plan.sites.skipped,
        search=digest.hexdigest(),
        summary=describe_recipe(config, plan),
        embeddings=plan.embeddings,
        session_options=plan.choice.session_options,
        unreached=plan.unquantized,
        experts_take_level=plan.choice.experts is not None and plan.choice.experts.takes_level,
        experts_say_raw=plan.choice.experts is not None and plan.choice.experts.packed_unless_said,
        byte_scales=plan.choice.scale_type == "bytes",
        computes_rotary=bool(plan.rotary),
    )


def describe_recipe(config: QuantizeConfig, plan: ModelPlan) -> str:
    """Return the algorithm and the formats, in one line."""
    choice = plan.choice
    if plan.by_site:
        formats = _describe_formats(plan)
    else:
        formats = f"INT4 block {choice.four_bit.block_size} {'without' if choice.symmetric else 'with'} zero point"
    count = plan.sites.eight_bit_sites
    mixed = f", INT8 at {counted(count, 'site')}" if count and not plan.by_site else ""
    table = _describe_embedding(plan.embeddings)
    target = "" if plan.target is None else f" for {plan.target.label}"
    algorithm = f"{config.search_algorithm} refined" if config.refine else config.search_algorithm
    algorithm = f"signround from {algorithm}" if config.algo == "signround" else algorithm
    algorithm = f"{algorithm} distilled" if config.distill else algorithm
    if plan.imported is not None:
        searched = len(plan.sites.specs) - len(plan.imported.sites)
        algorithm = f"{plan.imported.title} and {algorithm}" if searched else plan.imported.title
    return f"{algorithm} {formats}{mixed}{table}{target}"


def _describe_embedding(plans: tuple[EmbeddingPlan, ...]) -> str:
    if not plans:
        return ""
    shared = " shared with lm_head" if plans[0].shared_with is not None else ""
    return f", embedding {plans[0].label}{shared}"


def group_solver(
    config: QuantizeConfig,
    plan: ModelPlan,
    device: torch.device,
    read_weight: Callable[[MatMulSite], Tensor],
    read_stats: Callable[[str], SearchStats] | None,
) -> GroupSolver:
    """Return the solver that ``config`` and ``plan`` describe.

    Args:
        config: names the algorithm and its options.
        plan: the format of each site.
        device: where the search runs.
        read_weight: gives a site's [N, K] float32 weight on ``device``.
        read_stats: gives statistics by activation; None where the algorithm reads none.
    """
    return GroupSolver(
        algorithm_name=config.search_algorithm,
        algorithm=ALGORITHMS[config.search_algorithm],
        options=search_options(config, plan.choice),
        specs=plan.sites.specs,
        device=device,
        read_weight=read_weight,
        read_stats=read_stats,
        fold=not config.awqlite_disable_fuse_nodes,
        one_scale=config.awqlite_run_per_subgraph,
        looked_up=frozenset(each.shared_with for each in plan.embeddings if each.shared_with is not None),
    )


def search_options(config: QuantizeConfig, choice: FormatChoice) -> SearchOptions:
    """Return the options of the search algorithms."""
    return SearchOptions(
        range_rule=choice.scale_range,
        alpha_step=config.awqlite_alpha_step,
        clip_step=config.awqclip_alpha_step,
        clip_min=config.awqclip_alpha_min,
        column_chunk=config.awqclip_bsz_col,
        damping=config.gptq_damping,
        act_order=config.gptq_act_order,
        descent_passes=config.descent_passes,
    )


def signround_options(config: QuantizeConfig) -> SignRoundOptions:
    """Return the options of block-level tuning."""
    return SignRoundOptions(
        iterations=config.signround_iters,
        learning_rate=config.signround_lr,
        batch_size=config.signround_batch_size,
        seed=config.signround_seed,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chooser:
    """What formats are chosen from: the target, the request, and the model."""

    target: Target | None
    requested: RequestedFormats
    facts: ModelFacts

    def choose(self) -> FormatChoice:
        return choose_formats(self.target, self.requested, self.facts)

    def open(self) -> OpenFormats:
        return open_formats(self.target, self.requested, self.facts)


def _target(config: QuantizeConfig, directory: ModelDirectory, facts: ModelFacts) -> BaseTarget:
    """Return the target that was named, or the base's."""
    if config.follows_base:
        return target_of_base(directory, facts)
    return BaseTarget(target=config.parsed_target, why="")


def _given_plan(
    config: QuantizeConfig, groups: tuple[ActivationGroup, ...], chooser: _Chooser, layers: Sequence[ExpertLayer]
) -> tuple[FormatChoice, QuantPlan, dict[str, QuantSpec | None]]:
    """Return what ``--plan`` asks for, of experts last: the file decides about formats, the target about the rest."""
    assert config.plan is not None
    sites, nodes = all_sites(groups), {node_name(layer.sites[0]): layer.sites[0] for layer in layers}
    planned = read_plan(config.plan, sites, nodes)
    asked = config.use_zero_point
    formats = {site.name: spec_of(planned[site.name], site, zero_point=asked) for site in sites}
    specs = {name: spec for name, spec in formats.items() if spec is not None}
    if not specs:
        raise OptionError(f"--plan {config.plan} keeps every MatMul of the model: nothing would be quantized.")
    skipped = {name: f"--plan {config.plan.name}: keep" for name in formats if name not in specs}
    choice = _choice_of_specs(chooser, tuple(specs.values()))
    specs = {name: replace(spec, scale_dtype=choice.scale_dtype(spec.scale_dtype)) for name, spec in specs.items()}
    given: dict[str, QuantSpec | None] = {}
    for name in nodes.keys() & planned.keys():
        spec = spec_of(planned[name], nodes[name], zero_point=asked)
        given[name] = None if spec is None else replace(spec, scale_dtype=choice.scale_dtype(spec.scale_dtype))
    return choice, plan_of(groups, specs, skipped), given


def _imported_plan(
    config: QuantizeConfig,
    checkpoint: Path,
    model: ir.Model,
    groups: tuple[ActivationGroup, ...],
    chooser: _Chooser,
    layers: Sequence[ExpertLayer],
) -> tuple[FormatChoice, QuantPlan, ImportedWeights, dict[str, QuantSpec | None]]:
    """Return what ``--checkpoint`` gives, of experts last: its sites as they are there.

    Others stay as they are but for what options name.
    """
    choice, sites = chooser.choose(), all_sites(groups)
    mixtures = [layer for layer in layers if runs_experts(layer, choice)]
    imported = find_imported(
        open_checkpoint(checkpoint),
        [*groups, *(group for layer in mixtures for group in layer.groups)],
        GraphWeights(
            matrix=lambda site: read_weight(model, site, _CPU), vector=lambda name: read_vector(model, name, _CPU)
        ),
        WantedFormats(scale_dtype=choice.scale_dtype, eight_bit=choice.eight_bit),
    )
    asked = asked_by_name([site for site in sites if site.name not in imported.sites], config, choice)
    specs = {site.name: imported.sites[site.name].spec for site in sites if site.name in imported.sites} | asked
    skipped = {site.name: _LEFT_IN_FLOAT for site in sites if site.name not in specs}
    formats: dict[str, QuantSpec] = {}
    if choice.experts is not None:
        imported, formats = import_experts(imported, mixtures, choice.experts)
    given: dict[str, QuantSpec | None] = {
        node_name(layer.sites[0]): None for layer in layers if not asked_by_name(layer.sites, config, choice)
    }
    found = _choice_of_specs(chooser, (*specs.values(), *formats.values()))
    plan = plan_of(groups, specs, skipped)
    return found, replace(plan, groups=tuple(split_groups(plan.groups, imported))), imported, {**given, **formats}


def _choice_of_specs(chooser: _Chooser, specs: tuple[QuantSpec, ...]) -> FormatChoice:
    """Return the choice for the commonest INT4 block, with what the target says against each of the formats."""
    sizes: list[int | None] = [each.block_size for each, _ in _commonest(specs, 4) if isinstance(each, PerBlock)]
    eight_bit: list[Granularity | None] = [each for each, _ in _commonest(specs, 8)]
    common = replace(chooser.requested, zero_point=not all(spec.symmetric for spec in specs))
    requested = [
        replace(common, block_size=size, eight_bit=granularity, named_eight_bit=granularity is not None)
        for size in sizes or [None]
        for granularity in eight_bit or [None]
    ]
    choices = [replace(chooser, requested=each).choose() for each in requested]
    warnings = dict.fromkeys(warning for choice in choices for warning in choice.warnings)
    return replace(choices[0], warnings=tuple(warnings))


def _commonest(specs: tuple[QuantSpec, ...], bits: int) -> list[tuple[Granularity, int]]:
    return Counter(spec.granularity for spec in specs if spec.bits == bits).most_common()


def _open_choice(
    config: QuantizeConfig,
    groups: tuple[ActivationGroup, ...],
    chooser: _Chooser,
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


def _open_plan(
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


def _requested(config: QuantizeConfig, sites: Sequence[MatMulSite]) -> RequestedFormats:
    """Return the options that were given, and not left to the target."""
    decided_elsewhere = config.plan is not None or (
        config.lm_head is None and (config.has_budget or config.checkpoint is not None)
    )
    others = None if config.checkpoint is None else _STAYS
    return RequestedFormats(
        form=_requested_form(config),
        block_size=config.block_size,
        eight_bit=_requested_eight_bit(config),
        mixed=config.enable_mixed_quant and not config.layers_8bit,
        named_eight_bit=bool(config.layers_8bit) or config.lm_head == "8",
        zero_point=config.use_zero_point,
        scale_range=config.scale_range,
        scale_type=config.scale_type,
        rotary=config.rotary_tables,
        lm_head="none" if config.lm_head is None and excludes_lm_head(sites, config) else config.lm_head,
        lm_head_open=decided_elsewhere,
        embedding=config.requested_embedding or others,
        embedding_axis=config.embedding_axis,
        gather_form=config.gather_form,
        gather_block_size=config.gather_block_size,
        accuracy_level=config.accuracy_level,
        experts=config.experts,
    )


def _requested_eight_bit(config: QuantizeConfig) -> Granularity | None:
    match config.int8_block_size:
        case None:
            return None
        case "channel":
            return PerChannel()
        case int(size):
            return PerBlock(block_size=size)


def _requested_form(config: QuantizeConfig) -> WeightForm | None:
    if config.use_column_major:
        return WeightForm.DQ_COLUMN_MAJOR
    if config.algo == "rtn":
        return WeightForm.QDQ
    return None if config.weight_operator is None else WeightForm(config.weight_operator)


def _embedding_plans(
    config: QuantizeConfig, choice: FormatChoice, tables: tuple[EmbeddingTable, ...]
) -> tuple[EmbeddingPlan, ...]:
    if config.requested_embedding in ("4", "8"):
        require_tables(tables)
    if choice.embedding_bits is None:
        return ()
    wanted = TableFormat(
        bits=choice.embedding_bits,
        axis=choice.embedding_axis,
        block_size=choice.gather_block_size,
        form=choice.gather_form,
        scale_range="signed" if choice.scale_range == "signed" else "full",
    )
    plans = plan_embeddings(tables, wanted)
    return tuple(replace(plan, scale_dtype=choice.scale_dtype(plan.table.dtype)) for plan in plans)


def _tuning(config: QuantizeConfig) -> bytes:
    """Return what the weights depend on besides the search, where something follows it; else nothing."""
    refine = b"refine" if config.refine else b""
    if config.distill:
        text = (config.distill, config.dataset, config.seq_len, config.seed, config.apply_chat_template)
        refine += repr((*text, config.use_random_calib, config.signround_batch_size)).encode()
    if config.algo != "signround":
        return refine
    options = TypeAdapter(SignRoundOptions).dump_json(signround_options(config))
    return refine + options + config.signround_start.encode()


def _chooses_by_site(config: QuantizeConfig) -> str:
    if config.checkpoint is not None:
        return config.checkpoint.absolute().name
    if config.plan is not None:
        return "--plan"
    return config.budget_description if config.has_budget else ""


def _describe_formats(plan: ModelPlan) -> str:
    counts = Counter(spec.label for spec in plan.sites.specs.values())
    return f"{plan.by_site} ({', '.join(f'{count} x {label}' for label, count in sorted(counts.items()))})"
