"""Stage two: ``python -m stages.quantize``. Cache -> plan -> solve -> save -> export."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx_ir as ir
import torch
from rich.console import Console

from export.export_model import Destination, export_model
from export.tables import export_table
from stages.atomic import require_creatable
from stages.base_graph import load_graph
from stages.block.tunable import open_blocks
from stages.cli import choose_device, run_command
from stages.config import CalibrateConfig, QuantizeConfig
from stages.errors import CacheMismatch, SolveError, UserError
from stages.fingerprint import fingerprint_model
from stages.graph.unreached import unreached_warning
from stages.graph.weights import read_rows, read_weight
from stages.machine import describe_machine
from stages.model_directory import ModelDirectory, locate_model
from stages.observe.cache import CalibrationCache, open_cache
from stages.one_line import in_one_line
from stages.page.document import Document, read_document, write_report
from stages.page.from_weights import quantization_of
from stages.page.render import render
from stages.plan_file import PLAN, write_plan
from stages.planning import ModelPlan, make_recipe, plan_model, search_options, signround_options
from stages.prepared import Prepared, Search
from stages.preview import preview
from stages.preview_table import preview_table
from stages.processes import Processes, join_processes
from stages.progress import progress_bar
from stages.quantized_store import EARLIER, REPORT_FOLDER, QuantizedStore, create_or_resume_store
from stages.records import SiteReport
from stages.report import loss_so_far, quantization_table, search_summary
from stages.screen import Screen, silent_screen
from stages.shell_line import shell_line
from stages.site_names import short_name
from stages.size_breakdown import size_parts
from stages.solve.embedding import quantize_table
from stages.solve.registry import ALGORITHMS, FINISHES
from stages.solve.runner import GroupSolver, search_cost
from stages.solve.side_by_side import solve_groups
from stages.spending import SpentBudget, spend_budget
from stages.target.explain import choice_table
from stages.tune.tuner import BlockScaleStep, BlockStep, BlockTuner, RefineStep, SignRoundStep

_LOGGER = logging.getLogger(__name__)


def quantize(config: QuantizeConfig, screen: Screen) -> None:
    """Quantize and export the model that ``config`` describes; processes launched together share the groups."""
    config.validate()
    if config.dry_run:
        show_preview(config, None, screen)
        return
    started = time.perf_counter()
    processes = join_processes()
    screen = screen if processes.is_first else silent_screen()
    with processes.first_goes_first():
        directory = locate_model(config.onnx_path)
        destination = _destination(config, directory)
        prepared = _prepare(config, directory, screen)
    report = read_document(prepared.store.folder / REPORT_FOLDER)
    store = prepared.store
    with _nothing_left_of_bad_input(store, owner=processes.is_first):
        _search(config, prepared, processes, screen.console)
        if not processes.is_first:
            return
        _round_unfinished(prepared.model, store, choose_device(config.device))
    seconds = time.perf_counter() - started
    screen.show("search", quantization_table(store, seconds), search_summary(store, seconds))
    exported = export_model(directory, store, destination, config.export_options, screen.console, prepared.model)
    _write_report(replace(report, title=destination.folder.name), prepared, exported.onnx_file)
    screen.show("export", export_table(exported), exported)


def _write_report(earlier: Document, prepared: Prepared, output: Path) -> None:
    """Write the report inside the weights' folder, and warn where that fails; what evaluations added to it stays."""
    store, base = prepared.store, prepared.directory
    folder = store.folder / REPORT_FOLDER
    try:
        quantization = quantization_of(store, size_parts(base, locate_model(output), prepared.model))
        write_report(replace(earlier, machine=describe_machine(), quantization=quantization), render, folder)
    except Exception as error:  # whatever a page may raise, the model is finished
        again = ["python", "-m", "stages.report_page", folder, "--weights_path", store.folder]
        models = ["--base", base.onnx_file, "--model", output]
        _LOGGER.warning(
            "the model is finished, but its report is not (%s); write it again: %s",
            in_one_line(error),
            shell_line([str(word) for word in (*again, *models)]),
        )


def _destination(config: QuantizeConfig, directory: ModelDirectory) -> Destination:
    """Where the model goes, once both places and the device can be used."""
    choose_device(config.device)
    destination = Destination.from_path(config.output_path, directory, overwrite=config.overwrite)
    require_creatable(config.weights_folder, option="--weights_path")
    destination.require_apart_from(config.weights_folder, "the quantized weights")
    return destination


@contextmanager
def _nothing_left_of_bad_input(store: QuantizedStore, *, owner: bool) -> Iterator[None]:
    """Remove ``store`` where this run began it and it holds nothing, or weights that rest on bad numbers."""
    is_new = store.is_empty
    try:
        yield
    except UserError as error:
        if owner and is_new and (store.is_empty or isinstance(error, SolveError | CacheMismatch)):
            store.discard()
        raise


def _prepare(config: QuantizeConfig, directory: ModelDirectory, screen: Screen) -> Prepared:
    model = load_graph(directory)
    fingerprint = fingerprint_model(directory, model)
    cache = open_cache(config.cache_path, fingerprint) if config.needs_cache else None
    plan = plan_model(config, model, directory)
    _show_plan(config, plan, screen)
    spent = _spent(config, model, directory, plan, cache, screen.console)
    plan = plan if spent is None else spent.plan
    recipe = make_recipe(config, plan, fingerprint, "" if cache is None else cache.manifest.key.digest())
    store = create_or_resume_store(config.weights_folder, recipe, overwrite=config.overwrite)
    if spent is not None:
        write_plan(store.folder / PLAN, spent.file_text)
    return Prepared(directory=directory, model=model, plan=plan, cache=cache, store=store)


def _search(config: QuantizeConfig, prepared: Prepared, processes: Processes, console: Console) -> None:
    """Fill the store; what is in it already stays."""
    if config.tunes_blocks:
        _tune_unfinished(config, prepared, processes, console)
        if processes.is_first:
            # Not sooner: a stopped run never searches again.
            shutil.rmtree(prepared.store.folder / EARLIER, ignore_errors=True)
    else:
        solver = _solver(config, prepared.model, prepared.plan, prepared.cache)
        _solve_unfinished(solver, prepared.store, processes, console)


def open_search(config: QuantizeConfig) -> Search:
    """The search that ``quantize`` would do, with no place to save its results: for measuring it.

    Raises:
        UserError: what ``quantize`` raises before it searches.
    """
    config.validate()
    directory = locate_model(config.onnx_path)
    model = load_graph(directory)
    cache = open_cache(config.cache_path, fingerprint_model(directory, model)) if config.needs_cache else None
    plan = plan_model(config, model, directory)
    return Search(solver=_solver(config, model, plan, cache), groups=plan.sites.groups)


def check_before_calibration(config: QuantizeConfig) -> None:
    """Raise what ``quantize`` would raise before it reads the cache: hours of calibration may come between."""
    config.validate()
    directory = locate_model(config.onnx_path)
    _destination(config, directory)
    model = load_graph(directory)
    plan = plan_model(config, model, directory)
    if config.tunes_blocks:
        open_blocks(model, plan.sites.groups)


def show_preview(config: QuantizeConfig, calibration: CalibrateConfig | None, screen: Screen) -> None:
    """What ``quantize`` would do, and what would stop it; ``calibration`` says how stage one would run before it."""
    found = preview(config, calibration, tuple(_obstacles(config)), screen.console)
    screen.show("plan", preview_table(found), found)


def _obstacles(config: QuantizeConfig) -> Iterator[str]:
    """Why the output couldn't be written as things are."""
    try:
        _destination(config, locate_model(config.onnx_path))
    except UserError as error:
        yield str(error)


def _show_plan(config: QuantizeConfig, plan: ModelPlan, screen: Screen) -> None:
    """What the target decided, and what a person should know before the search starts."""
    if config.parsed_target is not None:
        screen.show("formats", choice_table(config.parsed_target, plan.choice), plan.choice)
    sites = plan.sites
    left = unreached_warning(plan.unreached, quantized=len(sites.specs), routers=sites.kept_routers)
    for warning in filter(None, (*plan.choice.warnings, left)):
        _LOGGER.warning("%s", warning)


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
    _LOGGER.info("%s", spent.summary)
    return spent


def _solver(config: QuantizeConfig, model: ir.Model, plan: ModelPlan, cache: CalibrationCache | None) -> GroupSolver:
    device = choose_device(config.device)
    return GroupSolver(
        algorithm_name=config.algo,
        algorithm=ALGORITHMS[config.algo],
        options=search_options(config, plan.choice),
        specs=plan.sites.specs,
        device=device,
        read_weight=lambda site: read_weight(model, site, device),
        read_stats=None if cache is None else cache.read,
        fold=not config.awqlite_disable_fuse_nodes,
        one_scale=config.awqlite_run_per_subgraph,
    )


def _solve_unfinished(solver: GroupSolver, store: QuantizedStore, processes: Processes, console: Console) -> None:
    """Solve the groups that have no file yet, shared out by cost; each is saved before the next begins."""
    unfinished = [index for index in range(len(store.recipe.groups)) if not store.is_finished(index)]
    processes.wait_for_all()  # so that all share out the same groups
    costs = [search_cost(store.recipe.groups[index]) for index in unfinished]
    mine = processes.my_share(costs)
    with progress_bar(console) as progress:
        unit = "groups" if processes.count == 1 else f"groups of this process, the first of {processes.count}"
        task = progress.add_task("search", total=sum(costs[place] for place in mine), steps=len(mine), unit=unit)
        places, found = sorted(mine), list[SiteReport]()
        for index, solved in solve_groups(solver, [store.recipe.groups[unfinished[place]] for place in places]):
            store.write(unfinished[places[index]], solved)
            found += solved.reports
            now = short_name(solved.group.sites[0].name)
            progress.advance(task, costs[places[index]], now=now, note=loss_so_far(found))
    processes.wait_for_all()
    if processes.is_first:
        store.write_report()


def _tune_unfinished(config: QuantizeConfig, prepared: Prepared, processes: Processes, console: Console) -> None:
    """Search what tuning starts from, and tune the blocks that have no files yet, step after step.

    Processes share the search; each block needs the one before, so the first process tunes them.
    """
    store, cache = prepared.store, prepared.cache
    assert cache is not None
    if store.is_complete():
        return
    blocks = open_blocks(prepared.model, store.recipe.groups)
    search = replace(config, algo=config.search_algorithm, refine=False, awq_objective="layer")
    solver = _solver(search, prepared.model, prepared.plan, cache)
    with processes.first_goes_first():
        begun = _earlier_store(store, "search", search, prepared.plan, cache)
    _solve_unfinished(solver, begun, processes, console)
    if not processes.is_first:
        return
    *earlier, last = _block_steps(config, solver)
    for step, result in (*earlier, last):
        reached = store if step is last[0] else _earlier_store(store, step.name, result, prepared.plan, cache)
        BlockTuner(
            model=blocks,
            directory=prepared.directory,
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
        steps.append((RefineStep(solver.options), refined))
    if config.algo == "signround":
        steps.append((SignRoundStep(signround_options(config)), config))
    return steps


def _earlier_store(
    store: QuantizedStore, name: str, config: QuantizeConfig, plan: ModelPlan, cache: CalibrationCache
) -> QuantizedStore:
    """The folder of a step before the last."""
    recipe = make_recipe(config, plan, store.recipe.model_fingerprint, cache.manifest.key.digest())
    return create_or_resume_store(store.folder / EARLIER / name, recipe, overwrite=config.overwrite)


def _round_unfinished(model: ir.Model, store: QuantizedStore, device: torch.device) -> None:
    """Round the embeddings that have no file yet."""
    for index, plan in enumerate(store.recipe.embeddings):
        file = store.table_file(index)
        if not file.is_finished():
            store.write_table(index, quantize_table(plan, partial(read_rows, model, plan.table, device=device)))


if __name__ == "__main__":
    run_command(QuantizeConfig, quantize, "python -m stages.quantize")
