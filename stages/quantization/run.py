"""Plan, search and store quantized weights: what stage two does before the export.

``prepare`` decides the plan, opens the statistics and makes the store; ``search_weights`` fills it group by group, and
takes the steps after the search, which tune blocks or train scales; ``round_embeddings`` adds the embeddings.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import onnx_ir as ir
import torch

from stages.calibration.cache import CalibrationCache, open_cache
from stages.calibration.expert_statistics import search_statistics
from stages.calibration.text.windows import TokenWindows, choose_dataset, load_windows
from stages.commands.progress import progress_bar
from stages.commands.quantize_options import QuantizeConfig
from stages.errors import CacheMismatch, SolveError, UserError
from stages.model.directory import ModelDirectory, locate_model
from stages.model.load import fingerprint_model, load_graph
from stages.model.sites import find_expert_layers, widest_input
from stages.model.unquantized import unquantized_warning
from stages.model.weights import read_rows, read_weight, stored_weight
from stages.quantization.blocks.distill import Distiller
from stages.quantization.blocks.tuner import BlockStep, BlockTuner, RefineStep, SignRoundStep
from stages.quantization.checkpoints.imported import ImportedWeights
from stages.quantization.plan.budget.allocate import BudgetResult, allocate_budget
from stages.quantization.plan.plan import ModelPlan, plan_model, plan_search
from stages.quantization.plan.plan_file import PLAN, write_plan
from stages.quantization.plan.recipe import group_solver, make_recipe, search_options, signround_options
from stages.quantization.search.embedding import quantize_table
from stages.quantization.search.parallel import solve_groups
from stages.quantization.search.solver import GroupSolver, search_cost
from stages.quantization.weights.store import EARLIER, RECIPE, QuantizedStore, create_or_resume_store
from stages.quantization.weights.summary import loss_so_far
from stages.records.results import SiteReport
from stages.records.sites import ActivationGroup, short_name
from stages.runtime.blocks.chain import Chain, open_chain
from stages.runtime.blocks.decoder import DecoderBlocks, open_blocks
from stages.runtime.graph_inputs import WindowShape, inputs_of_graph
from stages.runtime.providers import choose_providers
from stages.system.distributed import Processes
from stages.system.hardware import choose_device
from stages.system.shared_folder import wait_for

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A base model, a decided plan for it, the statistics to search with, and where the result goes."""

    directory: ModelDirectory
    model: ir.Model
    plan: ModelPlan
    cache: CalibrationCache | None
    """None where the algorithm needs no statistics."""
    store: QuantizedStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """A search before its first group."""

    solver: GroupSolver
    groups: tuple[ActivationGroup, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decided:
    """What the first process decides for all."""

    plan: ModelPlan
    cache: CalibrationCache | None
    store: QuantizedStore


def prepare(config: QuantizeConfig, directory: ModelDirectory, processes: Processes) -> Prepared:
    """Decide the plan, allocate the budget if there is one, and make or resume the store: all in the first process.

    Raises:
        UserError: options don't fit the model, the cache is missing or another model's, or the weights' folder can't be
            used.
    """
    with processes.main_process_first():
        model = load_graph(directory)
    decided = processes.decided_by_first(lambda: _decide(config, directory, model))
    wait_for([decided.store.folder / RECIPE])
    if decided.cache is not None:
        decided.cache.wait_until_seen()
    return Prepared(directory=directory, model=model, plan=decided.plan, cache=decided.cache, store=decided.store)


def _decide(config: QuantizeConfig, directory: ModelDirectory, model: ir.Model) -> _Decided:
    fingerprint = fingerprint_model(directory, model)
    cache = open_cache(config.cache_path, fingerprint) if config.needs_cache else None
    if cache is not None and cache.manifest.key.seq_len is None:
        config.require_no_text()
    plan = plan_search(config, model, directory, cache)
    _log_plan(plan)
    result: BudgetResult | None = None
    if plan.left_open is not None:
        assert cache is not None, "a budget needs the cache"
        result = allocate_budget(plan, model, directory, cache, choose_device(config.device))
        _LOGGER.info("%s", result.summary)
        plan = result.plan
    if cache is not None and plan.experts.groups:
        _require_rows(plan, model, cache)  # now, and not after all MatMuls were searched
    recipe = make_recipe(config, plan, fingerprint, "" if cache is None else cache.manifest.key.digest())
    store = create_or_resume_store(config.weights_folder, recipe, overwrite=config.overwrite)
    if result is not None:
        write_plan(store.folder / PLAN, result.file_text)
    # Tables that the output computes are values of this process's graph; the recipe says whether there are any.
    return _Decided(plan=replace(plan, rotary=()), cache=cache, store=store)


def _require_rows(plan: ModelPlan, model: ir.Model, cache: CalibrationCache) -> None:
    for layer in find_expert_layers(model):
        if layer.fc1 in plan.experts.tables:
            cache.read_rows(layer.tokens)
            cache.read_rows(layer.scores)


def search_weights(config: QuantizeConfig, prepared: Prepared, processes: Processes) -> None:
    """Fill the store; what is in it already stays.

    Args:
        config: the algorithm and its options.
        prepared: what ``prepare`` returned.
        processes: those that share the groups.
    """
    with _timed(prepared.store, owner=processes.is_first):
        if prepared.plan.imported is not None:
            _import_unfinished(prepared.plan.imported, prepared.store, processes)
        if config.improves_search:
            _improve_unfinished(config, prepared, processes)
            if processes.is_first:
                # Not sooner: a stopped run never searches again.
                shutil.rmtree(prepared.store.folder / EARLIER, ignore_errors=True)
        else:
            solver = _solver(config, prepared.model, prepared.plan, prepared.cache)
            _solve_unfinished(solver, prepared.store, processes)


@contextmanager
def _timed(store: QuantizedStore, *, owner: bool) -> Iterator[None]:
    """Add the block's time to that of the search, also where it is stopped; no time where nothing is left to search."""
    begins = owner and not store.is_complete()
    started = time.perf_counter()
    try:
        yield
    finally:
        if begins and not store.is_empty:
            store.add_seconds(time.perf_counter() - started)


def round_embeddings(model: ir.Model, store: QuantizedStore, device: torch.device) -> None:
    """Round the embeddings that have no file yet; those that share lm_head's weight need none.

    Args:
        model: the base model.
        store: where they go.
        device: where they are rounded.
    """
    for index, plan in enumerate(store.recipe.embeddings):
        file = store.table_file(index)
        if plan.shared_with is None and not file.is_finished():
            store.write_table(index, quantize_table(plan, partial(read_rows, model, plan.table, device=device)))


@contextmanager
def discard_if_bad_input(store: QuantizedStore, *, owner: bool) -> Iterator[None]:
    """Remove ``store`` where this run began it and it holds nothing, or weights that rest on bad numbers."""
    is_new = store.is_empty
    try:
        yield
    except UserError as error:
        if owner and is_new and (store.is_empty or isinstance(error, SolveError | CacheMismatch)):
            store.discard()
        raise


def open_search(config: QuantizeConfig) -> Search:
    """Return the search that ``quantize`` would do, with no place to save its results: for measuring it.

    Raises:
        UserError: what ``quantize`` raises before it searches.
    """
    config.validate()
    directory = locate_model(config.onnx_path, config.component)
    model = load_graph(directory)
    cache = open_cache(config.cache_path, fingerprint_model(directory, model)) if config.needs_cache else None
    plan = plan_model(config, model, directory)
    return Search(solver=_solver(config, model, plan, cache), groups=plan.sites.groups)


def _log_plan(plan: ModelPlan) -> None:
    """Log the target, what it decided, and what a person should know before the search starts."""
    if plan.target_because:
        target = plan.target
        release = f" ({target.release_because})" if target is not None and target.release_because else ""
        label = "any" if target is None else f"{target.label}{release}"
        _LOGGER.info("target %s: %s; choose another with --target", label, plan.target_because)
    if plan.target is not None:
        chosen = ", ".join(f"{line.option} {line.chosen}" for line in plan.choice.explanations)
        _LOGGER.info("formats for %s: %s", plan.target.label, chosen)
    sites = plan.sites
    experts = len(plan.experts.specs)
    left = unquantized_warning(
        plan.unquantized, quantized=len(sites.specs) - experts, routers=sites.skipped_routers, experts=experts
    )
    for warning in filter(None, (*plan.choice.warnings, left)):
        _LOGGER.warning("%s", warning)


def _solver(config: QuantizeConfig, model: ir.Model, plan: ModelPlan, cache: CalibrationCache | None) -> GroupSolver:
    device = choose_device(config.device)
    read_stats = None if cache is None else search_statistics(model, cache, device)
    return group_solver(
        config, plan, device, lambda site: read_weight(model, site, device), read_stats, partial(stored_weight, model)
    )


def _import_unfinished(imported: ImportedWeights, store: QuantizedStore, processes: Processes) -> None:
    """Write the groups that a checkpoint has codes for and that have no file yet."""
    if processes.is_first:
        for index, group in enumerate(store.recipe.groups):
            if not store.is_finished(index) and (solved := imported.solved(group)) is not None:
                store.write(index, solved)
    processes.barrier()


def _solve_unfinished(solver: GroupSolver, store: QuantizedStore, processes: Processes) -> None:
    """Solve the groups that have no file yet, shared out by cost; save each before the next begins."""
    groups = range(len(store.recipe.groups))
    unfinished = processes.decided_by_first(lambda: [index for index in groups if not store.is_finished(index)])
    costs = [search_cost(store.recipe.groups[index], solver.algorithm_name) for index in unfinished]
    mine = processes.my_share(costs)
    done = len(store.recipe.groups) - len(unfinished)
    if done and unfinished:
        _LOGGER.info("search: %d of %d groups are there already.", done, len(store.recipe.groups))
    done = done if processes.count == 1 else 0
    with progress_bar() as progress:
        unit = "groups" if processes.count == 1 else f"groups of this process, the first of {processes.count}"
        places, found = sorted(mine), list[SiteReport]()
        cost = sum(costs[place] for place in places)
        steps = done + len(places)
        task = progress.add_task("search", total=cost, steps=steps, unit=unit, done=done, keeps="groups")
        for index, solved in solve_groups(solver, [store.recipe.groups[unfinished[place]] for place in places]):
            store.write(unfinished[places[index]], solved)
            found += solved.reports
            now = short_name(solved.group.sites[0].name)
            progress.advance(task, costs[places[index]], now=now, note=loss_so_far(found))
    processes.barrier()
    if processes.is_first:
        wait_for(map(store.group_file, unfinished))
        store.write_report()


def _improve_unfinished(config: QuantizeConfig, prepared: Prepared, processes: Processes) -> None:
    """Search what the steps after the search start from, and take those steps where they aren't finished.

    Processes share the search; each block needs the one before, so the first process takes the steps.
    """
    store, cache = prepared.store, prepared.cache
    assert cache is not None
    if processes.decided_by_first(store.is_complete):
        return
    fixed = WindowShape.of(inputs_of_graph(prepared.model, prepared.directory)).batch
    config = replace(config, signround_batch_size=fixed or config.signround_batch_size)
    # What they can't run is an error before the search.
    steps = _steps(config, prepared) if processes.is_first else []
    search = replace(config, algo=config.search_algorithm, refine=False, distill=0)
    solver = _solver(search, prepared.model, prepared.plan, cache)
    begun = processes.decided_by_first(lambda: _earlier_store(store, "search", search, prepared.plan, cache))
    wait_for([begun.folder / RECIPE])
    _solve_unfinished(solver, begun, processes)
    if not processes.is_first:
        return
    *earlier, last = steps
    for step in (*earlier, last):
        reached = store if step is last else _earlier_store(store, step.name, step.result, prepared.plan, cache)
        if not reached.is_complete():
            step.run(begun, reached)
        begun = reached


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """A step after the search: from one store to the next."""

    name: str
    result: QuantizeConfig
    """Describes what the search makes up to this step."""
    run: Callable[[QuantizedStore, QuantizedStore], object]


def _steps(config: QuantizeConfig, prepared: Prepared) -> list[_Step]:
    """Return the steps after the search, in order.

    Raises:
        UserError: the layers can't be run one by one, or the text to distill on can't be read.
    """
    groups, steps = prepared.store.recipe.groups, list[_Step]()
    if config.tunes_blocks:
        blocks = open_blocks(prepared.model, groups)
    if config.refine:
        if any(group.is_of_expert for group in groups):
            _LOGGER.info("--refine corrects the MatMuls; experts of MoE nodes stay as they were searched.")
        step: BlockStep = RefineStep(search_options(config, prepared.plan.choice))
        result = replace(config, algo=config.search_algorithm, distill=0)
        steps.append(_Step(name=step.name, result=result, run=partial(_tune, config, prepared, blocks, step)))
    if config.algo == "signround":
        step, result = SignRoundStep(signround_options(config)), replace(config, distill=0)
        steps.append(_Step(name=step.name, result=result, run=partial(_tune, config, prepared, blocks, step)))
    if config.distill:
        chain = open_chain(prepared.model, groups)
        run = partial(_distill, config, prepared, chain, _distill_windows(config, prepared))
        steps.append(_Step(name="distill", result=config, run=run))
    return steps


def _tune(
    config: QuantizeConfig,
    prepared: Prepared,
    blocks: DecoderBlocks,
    step: BlockStep,
    begun: QuantizedStore,
    reached: QuantizedStore,
) -> None:
    assert prepared.cache is not None
    BlockTuner(
        model=blocks,
        directory=prepared.directory,
        cache=prepared.cache,
        start=begun,
        store=reached,
        step=step,
        batch_size=config.signround_batch_size,
        device=choose_device(config.device),
        read_stats=search_statistics(prepared.model, prepared.cache, choose_device(config.device)),
    ).tune()


def _distill(
    config: QuantizeConfig,
    prepared: Prepared,
    chain: Chain,
    windows: TokenWindows,
    begun: QuantizedStore,
    reached: QuantizedStore,
) -> None:
    assert prepared.cache is not None
    found = Distiller(
        chain=chain,
        directory=prepared.directory,
        start=begun,
        store=reached,
        windows=windows,
        batch_size=config.signround_batch_size,
        seed=config.seed,
        device=choose_device(config.device),
        read_stats=search_statistics(prepared.model, prepared.cache, choose_device(config.device)),
    ).distill()
    _LOGGER.info("distillation: KL from the base on held-out windows %.4f -> %.4f nats", found.start, found.found)


def _distill_windows(config: QuantizeConfig, prepared: Prepared) -> TokenWindows:
    """Return the text to distill on: of the kind that stage one would take, more of it."""
    calibration = replace(config.calibration, calib_size=config.distill)
    chosen = choose_dataset(calibration)
    providers = choose_providers(calibration.calibration_eps).names
    widest = widest_input(prepared.store.recipe.groups)
    return load_windows(calibration, prepared.directory, chosen.dataset, providers, widest)


def _earlier_store(
    store: QuantizedStore, name: str, config: QuantizeConfig, plan: ModelPlan, cache: CalibrationCache
) -> QuantizedStore:
    """Make or resume the store of a step before the last, inside the last one's folder.

    Args:
        store: the last step's.
        name: the folder's.
        config: describes what the search makes up to this step.
        plan: the formats.
        cache: the statistics.
    """
    last = store.recipe
    recipe = make_recipe(config, plan, last.model_fingerprint, cache.manifest.key.digest())
    recipe = replace(recipe, computes_rotary=last.computes_rotary)
    return create_or_resume_store(store.folder / EARLIER / name, recipe, overwrite=config.overwrite)
