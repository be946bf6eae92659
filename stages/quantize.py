"""Stage two: ``python -m stages.quantize``. Cache -> plan -> solve -> save -> export."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from functools import partial

import onnx_ir as ir
import torch
from pydantic import TypeAdapter
from rich.console import Console

from export.export_model import Destination, export_model
from export.tables import export_table
from stages.base_graph import load_graph
from stages.cli import choose_device, progress_bar, run_command, show
from stages.config import QuantizeConfig
from stages.fingerprint import fingerprint_model
from stages.graph.embeddings import find_embeddings
from stages.graph.rejected import find_rejected
from stages.graph.sites import find_groups
from stages.graph.weights import read_rows, read_weight
from stages.model_directory import locate_model
from stages.observe.cache import CalibrationCache, open_cache
from stages.quantized_store import QuantizedStore, create_or_resume_store
from stages.records import EmbeddingPlan, ExportRecipe, PerBlock, PerChannel, QuantSpec, WeightForm
from stages.report import quantization_table
from stages.solve.embedding import plan_embeddings, quantize_table
from stages.solve.problem import SearchOptions
from stages.solve.recipe import FormatRules, QuantPlan, make_plan
from stages.solve.registry import ALGORITHMS
from stages.solve.runner import GroupSolver


def quantize(config: QuantizeConfig, console: Console) -> None:
    """Quantize and export the model that ``config`` describes."""
    config.validate()
    started = time.perf_counter()
    directory = locate_model(config.onnx_path)
    destination = Destination.from_path(config.output_path, directory, overwrite=config.overwrite)
    model = load_graph(directory)
    fingerprint = fingerprint_model(directory)
    cache = open_cache(config.cache_path, fingerprint) if config.needs_cache else None
    plan = make_plan(find_groups(model), _format_rules(config))
    plan = replace(plan, kept=(*plan.kept, *find_rejected(model)))
    embeddings = _embedding_plans(config, model)
    recipe = _recipe(config, plan, embeddings, fingerprint, cache)
    store = create_or_resume_store(config.weights_folder, recipe, overwrite=config.overwrite)
    _solve_unfinished(_solver(config, model, plan, cache), store, console)
    _round_unfinished(model, store, choose_device(config.device))
    show(quantization_table(store, time.perf_counter() - started))
    summary = export_model(directory, store, destination, config.export_options, console)
    show(export_table(summary))


def _format_rules(config: QuantizeConfig) -> FormatRules:
    size = config.int8_block_size
    return FormatRules(
        four_bit=PerBlock(block_size=config.block_size),
        eight_bit=PerChannel() if size is None else PerBlock(block_size=size),
        symmetric=not config.use_zero_point,
        exclude=config.exclude,
        layers_8bit=config.layers_8bit,
        mixed=config.enable_mixed_quant,
        lm_head=config.lm_head,
    )


def _embedding_plans(config: QuantizeConfig, model: ir.Model) -> tuple[EmbeddingPlan, ...]:
    axis = config.gather_quantize_axis
    if axis is None:
        return ()
    return plan_embeddings(
        find_embeddings(model), axis=axis, block_size=config.gather_block_size, form=config.gather_form
    )


def _search_options(config: QuantizeConfig) -> SearchOptions:
    return SearchOptions(
        range_rule=config.scale_range,
        alpha_step=config.awqlite_alpha_step,
        clip_step=config.awqclip_alpha_step,
        clip_min=config.awqclip_alpha_min,
        column_chunk=config.awqclip_bsz_col,
    )


def _recipe(
    config: QuantizeConfig,
    plan: QuantPlan,
    embeddings: tuple[EmbeddingPlan, ...],
    fingerprint: str,
    cache: CalibrationCache | None,
) -> ExportRecipe:
    """What is being made; its ``search`` digest covers everything that the codes depend on."""
    digest = hashlib.sha256()
    for part in (
        TypeAdapter(SearchOptions).dump_json(_search_options(config)),
        TypeAdapter(dict[str, QuantSpec]).dump_json(dict(plan.specs)),
        repr((config.algo, config.awqlite_run_per_subgraph, config.awqlite_disable_fuse_nodes)).encode(),
        TypeAdapter(tuple[EmbeddingPlan, ...]).dump_json(embeddings),
        b"" if cache is None else cache.manifest.key.digest().encode(),
    ):
        digest.update(part)
    return ExportRecipe(
        model_fingerprint=fingerprint,
        weight_form=_weight_form(config),
        fold_input_scales=not config.awqlite_disable_fuse_nodes,
        groups=plan.groups,
        kept=plan.kept,
        search=digest.hexdigest(),
        summary=_summary(config, plan, embeddings),
        embeddings=embeddings,
    )


def _weight_form(config: QuantizeConfig) -> WeightForm:
    if config.use_column_major:
        return WeightForm.DQ_COLUMN_MAJOR
    return WeightForm.QDQ if config.algo == "rtn" else WeightForm.DQ


def _summary(config: QuantizeConfig, plan: QuantPlan, embeddings: tuple[EmbeddingPlan, ...]) -> str:
    zero_point = "with" if config.use_zero_point else "without"
    mixed = f", INT8 at {plan.eight_bit_sites} sites" if plan.eight_bit_sites else ""
    table = f", embedding INT4 block {config.gather_block_size}" if embeddings else ""
    return f"{config.algo} INT4 block {config.block_size} {zero_point} zero point{mixed}{table}"


def _solver(config: QuantizeConfig, model: ir.Model, plan: QuantPlan, cache: CalibrationCache | None) -> GroupSolver:
    device = choose_device(config.device)
    return GroupSolver(
        algorithm_name=config.algo,
        algorithm=ALGORITHMS[config.algo],
        options=_search_options(config),
        specs=plan.specs,
        device=device,
        read_weight=lambda site: read_weight(model, site, device),
        read_stats=None if cache is None else cache.read,
        fold=not config.awqlite_disable_fuse_nodes,
        one_scale=config.awqlite_run_per_subgraph,
    )


def _solve_unfinished(solver: GroupSolver, store: QuantizedStore, console: Console) -> None:
    """Solve the groups that have no file yet; each is saved before the next begins."""
    groups = store.recipe.groups
    with progress_bar(console) as progress:
        task = progress.add_task("groups", total=len(groups))
        for index, group in enumerate(groups):
            if not store.is_finished(index):
                store.write(index, solver.solve(group))
            progress.advance(task)
    store.write_report()


def _round_unfinished(model: ir.Model, store: QuantizedStore, device: torch.device) -> None:
    """Round the embeddings that have no file yet."""
    for index, plan in enumerate(store.recipe.embeddings):
        file = store.table_file(index)
        if not file.is_finished():
            file.write(quantize_table(plan, partial(read_rows, model, plan.table, device=device)))


if __name__ == "__main__":
    run_command(QuantizeConfig, quantize, "python -m stages.quantize")
