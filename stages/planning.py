"""From options to a plan: what every weight of the model becomes, decided before anything is computed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import onnx_ir as ir
from pydantic import TypeAdapter

from stages.config import QuantizeConfig
from stages.graph.embeddings import find_embeddings
from stages.graph.rejected import find_rejected
from stages.graph.sites import find_groups
from stages.graph.unreached import find_unreached
from stages.records import (
    EmbeddingPlan,
    EmbeddingTable,
    ExportRecipe,
    Granularity,
    PerBlock,
    PerChannel,
    QuantSpec,
    UnreachedWeights,
    WeightForm,
)
from stages.solve.embedding import plan_embeddings
from stages.solve.problem import SearchOptions
from stages.solve.recipe import FormatRules, QuantPlan, make_plan
from stages.solve.signround import SignRoundOptions
from stages.target.choose import choose_formats
from stages.target.formats import FormatChoice, FormatWishes, traits_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """The formats, what each site and embedding becomes, and the weights that nothing here reaches."""

    choice: FormatChoice
    sites: QuantPlan
    embeddings: tuple[EmbeddingPlan, ...]
    unreached: tuple[UnreachedWeights, ...]


def plan_model(config: QuantizeConfig, model: ir.Model) -> ModelPlan:
    """Decide about every weight of ``model``.

    Raises:
        GraphError: the model holds nothing to quantize.
        RecipeError: options that fit neither each other nor the model.
    """
    groups, tables = find_groups(model), find_embeddings(model)
    choice = choose_formats(config.parsed_target, _wishes(config), traits_of(groups, tables))
    sites = make_plan(groups, _format_rules(config, choice))
    embeddings = _embedding_plans(config, choice, tables)
    return ModelPlan(
        choice=choice,
        sites=replace(sites, kept=(*sites.kept, *find_rejected(model))),
        embeddings=embeddings,
        unreached=find_unreached(model, {plan.table.weight for plan in embeddings}),
    )


def _wishes(config: QuantizeConfig) -> FormatWishes:
    """The options that were given, and not left to the target."""
    return FormatWishes(
        form=_weight_form(config),
        block_size=config.block_size,
        eight_bit=_eight_bit_wish(config),
        mixed=config.enable_mixed_quant and not config.layers_8bit,
        named_eight_bit=bool(config.layers_8bit) or config.lm_head == "8",
        zero_point=config.use_zero_point,
        gather_axis=config.gather_quantize_axis,
        gather_form=config.gather_form,
        gather_block_size=config.gather_block_size,
        accuracy_level=config.accuracy_level,
    )


def _eight_bit_wish(config: QuantizeConfig) -> Granularity | None:
    match config.int8_block_size:
        case None:
            return None
        case "channel":
            return PerChannel()
        case int(size):
            return PerBlock(block_size=size)


def _weight_form(config: QuantizeConfig) -> WeightForm | None:
    """The form that was asked for, if one was."""
    if config.use_column_major:
        return WeightForm.DQ_COLUMN_MAJOR
    if config.algo == "rtn":
        return WeightForm.QDQ
    return None if config.weight_operator is None else WeightForm(config.weight_operator)


def _format_rules(config: QuantizeConfig, choice: FormatChoice) -> FormatRules:
    return FormatRules(
        four_bit=choice.four_bit,
        eight_bit=choice.eight_bit,
        symmetric=choice.symmetric,
        exclude=config.exclude,
        layers_8bit=config.layers_8bit,
        mixed=config.enable_mixed_quant,
        lm_head=config.lm_head,
        keep_mixed_because=choice.keep_mixed_because,
    )


def _embedding_plans(
    config: QuantizeConfig, choice: FormatChoice, tables: tuple[EmbeddingTable, ...]
) -> tuple[EmbeddingPlan, ...]:
    axis = config.gather_quantize_axis
    if axis is None:
        return ()
    return plan_embeddings(tables, axis=axis, block_size=choice.gather_block_size, form=choice.gather_form)


def search_options(config: QuantizeConfig) -> SearchOptions:
    """What the algorithms are told."""
    return SearchOptions(
        range_rule=config.scale_range,
        alpha_step=config.awqlite_alpha_step,
        clip_step=config.awqclip_alpha_step,
        clip_min=config.awqclip_alpha_min,
        column_chunk=config.awqclip_bsz_col,
        damping=config.gptq_damping,
        act_order=config.gptq_act_order,
        descent_passes=config.descent_passes,
    )


def signround_options(config: QuantizeConfig) -> SignRoundOptions:
    """What block-level tuning is told."""
    return SignRoundOptions(
        iterations=config.signround_iters,
        learning_rate=config.signround_lr,
        batch_size=config.signround_batch_size,
        seed=config.signround_seed,
    )


def _tuning(config: QuantizeConfig) -> bytes:
    """What the codes depend on besides the search, where blocks are tuned; else nothing."""
    if config.algo != "signround":
        return b""
    return TypeAdapter(SignRoundOptions).dump_json(signround_options(config)) + config.signround_start.encode()


def make_recipe(config: QuantizeConfig, plan: ModelPlan, fingerprint: str, cache_digest: str) -> ExportRecipe:
    """What is being made of the model with ``fingerprint``; its ``search`` digest covers all that the codes depend on.

    ``cache_digest`` identifies the calibration; empty where none is used.
    """
    digest = hashlib.sha256()
    for part in (
        TypeAdapter(SearchOptions).dump_json(search_options(config)),
        TypeAdapter(dict[str, QuantSpec]).dump_json(dict(plan.sites.specs)),
        repr((config.algo, config.awqlite_run_per_subgraph, config.awqlite_disable_fuse_nodes)).encode(),
        TypeAdapter(tuple[EmbeddingPlan, ...]).dump_json(plan.embeddings),
        cache_digest.encode(),
        _tuning(config),
    ):
        digest.update(part)
    return ExportRecipe(
        model_fingerprint=fingerprint,
        weight_form=plan.choice.form,
        fold_input_scales=not config.awqlite_disable_fuse_nodes,
        groups=plan.sites.groups,
        kept=plan.sites.kept,
        search=digest.hexdigest(),
        summary=_summary(config, plan),
        embeddings=plan.embeddings,
        session_options=plan.choice.session_options,
        unreached=plan.unreached,
    )


def _summary(config: QuantizeConfig, plan: ModelPlan) -> str:
    choice = plan.choice
    zero_point = "without" if choice.symmetric else "with"
    mixed = f", INT8 at {plan.sites.eight_bit_sites} sites" if plan.sites.eight_bit_sites else ""
    table = f", embedding INT4 block {choice.gather_block_size}" if plan.embeddings else ""
    target = "" if config.parsed_target is None else f" for {config.parsed_target.label}"
    size = choice.four_bit.block_size
    algorithm = f"signround from {config.signround_start}" if config.algo == "signround" else config.algo
    return f"{algorithm} INT4 block {size} {zero_point} zero point{mixed}{table}{target}"
