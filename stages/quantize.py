"""Stage two: ``python -m stages.quantize``. Cache -> plan -> solve -> save -> export."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from functools import partial

import onnx_ir as ir
import torch
from rich.console import Console
from rich.markup import escape

from export.export_model import Destination, export_model
from export.tables import export_table
from stages.atomic import require_creatable
from stages.base_graph import load_graph
from stages.block.tunable import open_blocks
from stages.cli import choose_device, progress_bar, run_command, show
from stages.config import QuantizeConfig
from stages.fingerprint import fingerprint_model
from stages.graph.unreached import unreached_warning
from stages.graph.weights import read_rows, read_weight
from stages.model_directory import ModelDirectory, locate_model
from stages.observe.cache import CalibrationCache, open_cache
from stages.plan_file import PLAN, write_plan
from stages.planning import ModelPlan, make_recipe, plan_model, search_options, signround_options
from stages.quantized_store import QuantizedStore, create_or_resume_store
from stages.report import quantization_table
from stages.solve.embedding import quantize_table
from stages.solve.recipe import QuantPlan
from stages.solve.registry import ALGORITHMS, FINISHES
from stages.solve.runner import GroupSolver
from stages.spending import SpentBudget, spend_budget
from stages.target.explain import choice_table
from stages.tune.tuner import BlockScaleStep, BlockStep, BlockTuner, RefineStep, SignRoundStep

_EARLIER = "earlier"
"""Folder of what block by block steps begin with, inside that of the result."""


def quantize(config: QuantizeConfig, console: Console) -> None:
    """Quantize and export the model that ``config`` describes."""
    config.validate()
    started = time.perf_counter()
    directory = locate_model(config.onnx_path)
    destination = Destination.from_path(config.output_path, directory, overwrite=config.overwrite)
    model = load_graph(directory)
    fingerprint = fingerprint_model(directory)
    cache = open_cache(config.cache_path, fingerprint) if config.needs_cache else None
    plan = plan_model(config, model, directory)
    _show_plan(config, plan, console)
    spent = _spent(config, model, directory, plan, cache, console)
    plan = plan if spent is None else spent.plan
    recipe = make_recipe(config, plan, fingerprint, "" if cache is None else cache.manifest.key.digest())
    store = create_or_resume_store(config.weights_folder, recipe, overwrite=config.overwrite)
    if spent is not None:
        write_plan(store.folder / PLAN, spent.file_text)
    if config.tunes_blocks:
        assert cache is not None
        _tune_unfinished(config, model, directory, plan, cache, store, console)
        # Not sooner: a stopped run never searches again.
        shutil.rmtree(store.folder / _EARLIER, ignore_errors=True)
    else:
        _solve_unfinished(_solver(config, model, plan.sites, cache), store, console)
    _round_unfinished(model, store, choose_device(config.device))
    show(quantization_table(store, time.perf_counter() - started))
    summary = export_model(directory, store, destination, config.export_options, console)
    show(export_table(summary))


def check_before_calibration(config: QuantizeConfig) -> None:
    """Raise what ``quantize`` would raise before it reads the cache: hours of calibration may come between."""
    config.validate()
    directory = locate_model(config.onnx_path)
    Destination.from_path(config.output_path, directory, overwrite=config.overwrite)
    require_creatable(config.weights_folder, option="--weights_path")
    choose_device(config.device)
    model = load_graph(directory)
    plan = plan_model(config, model, directory)
    if config.tunes_blocks:
        open_blocks(model, plan.sites.groups)


def _show_plan(config: QuantizeConfig, plan: ModelPlan, console: Console) -> None:
    """What the target decided, and what a person should know before the search starts."""
    if config.parsed_target is not None:
        show(choice_table(config.parsed_target, plan.choice))
    sites = plan.sites
    left = unreached_warning(plan.unreached, quantized=len(sites.specs), routers=sites.kept_routers)
    for warning in filter(None, (*plan.choice.warnings, left)):
        console.print(f"[bold yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)


def _spent(
    config: QuantizeConfig,
    model: ir.Model,
    directory: ModelDirectory,
    plan: ModelPlan,
    cache: CalibrationCache | None,
    console: Console,
) -> SpentBudget | None:
    """What ``plan`` left open, decided; None where it left nothing open."""
    if plan.left_open is None:
        return None
    assert cache is not None, "a budget needs the cache"
    spent = spend_budget(config, model, directory, cache, plan, choose_device(config.device), console)
    console.print(spent.summary, highlight=False, markup=False, soft_wrap=True)
    return spent


def _solver(config: QuantizeConfig, model: ir.Model, plan: QuantPlan, cache: CalibrationCache | None) -> GroupSolver:
    device = choose_device(config.device)
    return GroupSolver(
        algorithm_name=config.algo,
        algorithm=ALGORITHMS[config.algo],
        options=search_options(config),
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


def _tune_unfinished(
    config: QuantizeConfig,
    model: ir.Model,
    directory: ModelDirectory,
    plan: ModelPlan,
    cache: CalibrationCache,
    store: QuantizedStore,
    console: Console,
) -> None:
    """Search what tuning starts from, and tune the blocks that have no files yet, step after step."""
    if store.is_complete():
        return
    blocks = open_blocks(model, store.recipe.groups)
    search = replace(config, algo=config.search_algorithm, refine=False, awq_objective="layer")
    solver = _solver(search, model, plan.sites, cache)
    begun = _earlier_store(store, "search", search, plan, cache)
    _solve_unfinished(solver, begun, console)
    *earlier, last = _block_steps(config, solver)
    for step, result in (*earlier, last):
        reached = store if step is last[0] else _earlier_store(store, step.name, result, plan, cache)
        BlockTuner(
            model=blocks,
            directory=directory,
            cache=cache,
            start=begun,
            store=reached,
            step=step,
            batch_size=config.signround_batch_size,
            device=choose_device(config.device),
        ).tune(console)
        begun = reached


def _block_steps(config: QuantizeConfig, solver: GroupSolver) -> list[tuple[BlockStep, QuantizeConfig]]:
    """What is done block by block after the search, in this order, each with what it makes of the search."""
    scaled = replace(config, algo=config.search_algorithm, refine=False)
    refined = replace(config, algo=config.search_algorithm)
    steps: list[tuple[BlockStep, QuantizeConfig]] = []
    if config.awq_objective == "block":
        steps.append((BlockScaleStep(solver, FINISHES[config.search_algorithm]), scaled))
    if config.refine:
        steps.append((RefineStep(search_options(config)), refined))
    if config.algo == "signround":
        steps.append((SignRoundStep(signround_options(config)), config))
    return steps


def _earlier_store(
    store: QuantizedStore, name: str, config: QuantizeConfig, plan: ModelPlan, cache: CalibrationCache
) -> QuantizedStore:
    """The folder of a step before the last."""
    recipe = make_recipe(config, plan, store.recipe.model_fingerprint, cache.manifest.key.digest())
    return create_or_resume_store(store.folder / _EARLIER / name, recipe, overwrite=config.overwrite)


def _round_unfinished(model: ir.Model, store: QuantizedStore, device: torch.device) -> None:
    """Round the embeddings that have no file yet."""
    for index, plan in enumerate(store.recipe.embeddings):
        file = store.table_file(index)
        if not file.is_finished():
            file.write(quantize_table(plan, partial(read_rows, model, plan.table, device=device)))


if __name__ == "__main__":
    run_command(QuantizeConfig, quantize, "python -m stages.quantize")
