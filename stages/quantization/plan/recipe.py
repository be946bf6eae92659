"""Say what a plan makes of a model: the recipe that the export follows, and the search that fills it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable

import torch
from pydantic import TypeAdapter
from torch import Tensor

from stages.commands.quantize_options import QuantizeConfig
from stages.quantization.blocks.signround import SignRoundOptions
from stages.quantization.plan.plan import ModelPlan
from stages.quantization.search.problem import SearchOptions
from stages.quantization.search.solver import ALGORITHMS, GroupSolver
from stages.quantization.targets.formats import FormatChoice
from stages.records.formats import EmbeddingPlan, QuantSpec
from stages.records.quantities import counted
from stages.records.results import ExportRecipe, SearchStats
from stages.records.sites import MatMulSite


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


def _describe_formats(plan: ModelPlan) -> str:
    counts = Counter(spec.label for spec in plan.sites.specs.values())
    return f"{plan.by_site} ({', '.join(f'{count} x {label}' for label, count in sorted(counts.items()))})"


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
    stored_weight: Callable[[MatMulSite], Tensor] | None = None,
) -> GroupSolver:
    """Return the solver that ``config`` and ``plan`` describe.

    Args:
        config: names the algorithm and its options.
        plan: the format of each site.
        device: where the search runs.
        read_weight: gives a site's [N, K] float32 weight on ``device``.
        read_stats: gives statistics by activation; None where the algorithm reads none.
        stored_weight: gives a site's weight as its file has it; None where it can't.
    """
    return GroupSolver(
        algorithm_name=config.search_algorithm,
        algorithm=ALGORITHMS[config.search_algorithm],
        options=search_options(config, plan.choice),
        specs=plan.sites.specs,
        device=device,
        read_weight=read_weight,
        read_stats=read_stats,
        stored_weight=stored_weight,
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
