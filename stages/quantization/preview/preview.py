"""Preview what ``stages.quantize`` would do (``--dry_run``) from the graph; a budget uses the cache if there is one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import onnx_ir as ir

from stages.calibration.cache import CalibrationCache, find_cache, open_cache
from stages.calibration.capture import TextShape
from stages.calibration.run import another_calibration, fit_to_graph, foreseen_difference
from stages.calibration.samples.load import takes_samples
from stages.calibration.samples.samples import DEFAULT_SAMPLES, held_out_samples
from stages.calibration.text.documents import DEFAULT_DATASET, ChosenText
from stages.calibration.text.mix import RANDOM, SELF_GENERATED, windows_by_dataset
from stages.calibration.text.windows import choose_dataset, window_counts
from stages.commands.calibrate_options import CalibrateConfig
from stages.commands.quantize_options import QuantizeConfig, ScaleSearch
from stages.errors import UserError
from stages.model.directory import ModelDirectory, locate_model
from stages.model.load import fingerprint_model, parse_graph, require_weights
from stages.model.sites import find_groups, widest_input
from stages.quantization.plan.budget.allocate import allocate_budget, needs_weights, unmeasured_groups
from stages.quantization.plan.budget.candidates import SizeBudget
from stages.quantization.plan.budget.left_open import OpenPlan
from stages.quantization.plan.experts import stored_bytes
from stages.quantization.plan.output_size import file_bytes, output_size, weight_bytes
from stages.quantization.plan.plan import ModelPlan, plan_search
from stages.quantization.plan.plan_file import KEEP
from stages.quantization.plan.recipe import describe_recipe
from stages.quantization.plan.rules import all_sites
from stages.quantization.preview.memory import held_already, weights_on_disk
from stages.quantization.preview.seconds import search_seconds
from stages.quantization.preview.stages import Stages
from stages.quantization.preview.table import DiskUse, InputScalePlace, Preview, PreviewedSite, SearchEstimate
from stages.quantization.targets.formats import FormatChoice
from stages.records.formats import PerBlock, QuantSpec
from stages.records.quantities import counted, duration
from stages.records.sites import ActivationGroup, LinearAbsorber, MatMulSite, NormAbsorber, ValueAbsorber
from stages.runtime.feeds import require_text_inputs
from stages.runtime.graph_inputs import WindowShape
from stages.system.distributed import join_processes
from stages.system.hardware import choose_device


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """The model and its cache, with what was found out on the way to them."""

    directory: ModelDirectory
    model: ir.Model
    has_weights: bool
    cache: CalibrationCache | None
    """None where the algorithm needs none, or there is none that is used."""
    window: WindowShape
    """What the graph takes at a time."""
    dataset: str
    """What stage one would read or write as text; empty where it wouldn't."""
    runs_samples: bool
    """Whether stage one runs samples in place of windows."""
    obstacles: tuple[str, ...]
    notes: tuple[str, ...]


def preview(config: QuantizeConfig, calibration: CalibrateConfig, obstacles: tuple[str, ...]) -> Preview:
    """Return what a run of ``config`` would do.

    Args:
        config: a valid configuration.
        calibration: how stage one would run where it still has to.
        obstacles: what would stop the run, as far as the caller knows.

    Raises:
        GraphError: the graph can't be read, or holds nothing to quantize.
        OptionError: options that fit neither each other nor the model.
    """
    known = _look(config, calibration, obstacles)
    plan, open_because = _decide(config, known)
    groups, held = find_groups(known.model), held_already()
    calibration = fit_to_graph(calibration, known.window)
    text = _text_shape(known, calibration, widest_input(groups)) if config.needs_cache else None
    device = choose_device(config.device)
    seconds = search_seconds(config, plan, text, device)
    stages = Stages(
        config=config,
        directory=known.directory,
        model=known.model,
        plan=plan,
        calibrates=text is not None and known.cache is None,
        calibration=calibration,
        text=text,
        own_windows=_own_windows(known.dataset, text),
        held=held,
    )
    rate = stages.rate(device)
    size = output_size(known.directory, known.model, plan.choice, plan.embeddings, plan.rotary)
    sites = [*all_sites(groups), *all_sites(plan.experts.groups)]
    bytes_after = size.total_bytes(sites, plan.sites.specs)
    disk = _disk(stages, bytes_after)
    names = {site.name for site in sites}
    return Preview(
        base=known.directory.onnx_file,
        output=config.output_path,
        recipe=_recipe(config, plan),
        sites=tuple(_sites(config, plan, sites, seconds)),
        unquantizable=tuple(entry for entry in plan.sites.skipped if entry[0] not in names),
        embeddings=plan.embeddings,
        unreached=plan.unquantized,
        bits_per_weight=size.bits_per_weight(plan.sites),
        bytes_before=size.base_bytes,
        bytes_after=bytes_after,
        unspent=_unspent(plan),
        memory=tuple(stages.memory(join_processes())),
        disk=disk,
        sharing=tuple(stages.shared(disk, size.base_bytes, seconds, device, rate)),
        search=SearchEstimate(seconds=sum(seconds.values()), device=str(device), groups=len(plan.sites.groups)),
        obstacles=known.obstacles,
        notes=(*known.notes, *open_because, *plan.choice.warnings, *_notes(known, stages, rate)),
        target="any" if plan.target is None else plan.target.label,
        target_because=plan.target_because,
        formats=plan.choice.explanations,
    )


def _about_calibration(
    config: QuantizeConfig, calibration: CalibrateConfig, text: ChosenText, *, replaces: bool
) -> Iterator[str]:
    what = f"text: {text.dataset}" if text.dataset else f"samples: {calibration.samples}"
    if replaces:
        yield f"there is another calibration in {config.cache_path}, which the same run replaces ({what})"
    else:
        yield f"there is no calibration in {config.cache_path} yet: it is part of the same run ({what})"
    if text.note:
        yield text.note


def _look(config: QuantizeConfig, calibration: CalibrateConfig, obstacles: tuple[str, ...]) -> _Known:
    """Open what is there; what is missing is an obstacle."""
    directory = locate_model(config.onnx_path, config.component)
    model = parse_graph(directory)
    found, notes, cache, window = list(obstacles), list[str](), None, WindowShape(None, None)
    known_samples = takes_samples(calibration, model, directory)
    text = ChosenText(dataset="")
    try:
        require_weights(model, directory)
        has_weights = True
    except UserError as error:
        has_weights = False
        found.append(str(error))
    if config.needs_cache:
        try:
            cache = there = _cache(config, directory, has_weights=has_weights)
            if not known_samples and (there is None or calibration.names_text):
                window = require_text_inputs(model, directory)
                text = ChosenText(dataset=RANDOM) if calibration.use_random_calib else choose_dataset(calibration)
            if there is not None and calibration.names_text:
                reason = foreseen_difference(calibration, there.manifest.key, model, directory, text.dataset)
                if reason and not calibration.overwrite:
                    raise another_calibration(config.cache_path, reason)
                cache = None if reason else there
            if cache is None:
                notes += _about_calibration(config, calibration, text, replaces=there is not None)
        except UserError as error:
            found.append(str(error))
        if cache is not None and not has_weights:
            notes.append(f"{cache.folder} is taken to be this model's: without the weights that can't be checked")
    return _Known(
        directory=directory,
        model=model,
        has_weights=has_weights,
        cache=cache,
        window=window,
        dataset="" if cache is not None else text.dataset,
        runs_samples=known_samples,
        obstacles=tuple(found),
        notes=tuple(notes),
    )


def _cache(config: QuantizeConfig, directory: ModelDirectory, *, has_weights: bool) -> CalibrationCache | None:
    """Return the cache of the model, or None where there is none; without its weights the cache that lies there.

    Raises:
        CacheMismatch: it is another model's, or can't be read.
    """
    cache = find_cache(config.cache_path)
    if cache is not None and has_weights:
        return open_cache(config.cache_path, fingerprint_model(directory))
    return cache


def _decide(config: QuantizeConfig, known: _Known) -> tuple[ModelPlan, tuple[str, ...]]:
    """Return the plan and notes; where a budget can't be allocated yet, the smallest formats and what is needed."""
    plan = plan_search(config, known.model, known.directory, known.cache)
    if plan.left_open is None:
        return plan, ()
    reason = _left_open_because(config, known, plan.left_open)
    if not reason and known.cache is not None:
        result = allocate_budget(plan, known.model, known.directory, known.cache, choose_device(config.device))
        return result.plan, (result.summary,)
    return plan, (
        f"{plan.left_open.option} is not spent yet: {reason}; {plan.left_open.reachable.summary}. Formats are all that "
        "are open to a site, bytes and seconds those of the smallest.",
    )


def _left_open_because(config: QuantizeConfig, known: _Known, undecided: OpenPlan) -> str:
    """Return why a budget can't be allocated now; empty where it can."""
    if known.cache is None:
        return f"it needs the calibration cache {config.cache_path}"
    groups, candidates = find_groups(known.model), undecided.candidates
    if not known.has_weights and needs_weights(undecided, known.cache):
        return "it needs the weights, whose errors are forecast"
    if undecided.sensitivity == "measured" and (left := unmeasured_groups(groups, candidates, known.cache)):
        return f"--sensitivity measured needs {len(left)} runs of the model"
    return ""


def _recipe(config: QuantizeConfig, plan: ModelPlan) -> str:
    if plan.left_open is None:
        return describe_recipe(config, plan)
    return f"{config.algo} {plan.left_open.option}, not spent yet"


def _text_shape(known: _Known, calibration: CalibrateConfig, channels: int) -> TextShape:
    if known.cache is None and known.runs_samples:
        samples = calibration.calib_size or DEFAULT_SAMPLES
        held_out = held_out_samples(samples)
        return TextShape(calibration_windows=samples - held_out, held_out_windows=held_out, seq_len=None, batch_size=1)
    if known.cache is None:
        dataset = known.dataset or DEFAULT_DATASET
        windows, held_out = window_counts(calibration, dataset, channels)
        return TextShape(
            calibration_windows=windows,
            held_out_windows=held_out,
            seq_len=calibration.seq_len,
            batch_size=calibration.batch_size,
        )
    key = known.cache.manifest.key
    return TextShape(
        calibration_windows=key.calibration_windows,
        held_out_windows=key.held_out_windows,
        seq_len=key.seq_len,
        batch_size=calibration.batch_size,
    )


def _own_windows(dataset: str, text: TextShape | None) -> int:
    """Return how many windows of ``text`` the model writes itself."""
    if text is None or not dataset:
        return 0
    return windows_by_dataset(dataset, text.calibration_windows + text.held_out_windows).get(SELF_GENERATED, 0)


def _disk(stages: Stages, output: int) -> DiskUse:
    plan = stages.plan
    return DiskUse(
        calibration=stages.statistics,
        weights=weights_on_disk(plan.sites.groups, plan.sites.specs, plan.embeddings),
        output=output,
        meanwhile=0 if stages.passes is None else stages.passes.streams,
    )


def _notes(known: _Known, stages: Stages, rate: float | None) -> Iterator[str]:
    config = stages.config
    if config.needs_cache and known.cache is None:
        yield "the search's time is without calibration, which can take longer: the table of processes has an estimate"
    passes = stages.passes
    if stages.own_windows and passes is not None and rate is not None:
        yield (
            f"the model writes {counted(stages.own_windows, 'window')} of text itself, in one process: about "
            f"{duration(passes.writing / rate)} of that; what it has written before is read"
        )
    if config.evaluate:
        yield "--evaluate, where the model runs over text, isn't estimated"
    if config.improves_search:
        yield "what follows the search (--refine, signround, --distill) comes on top"
    if stages.kept_rows:
        yield f"the calibration keeps {stages.kept_rows / 1e6:,.0f} MB of what experts read on the disk (--expert_rows)"


def _sites(
    config: QuantizeConfig, plan: ModelPlan, sites: Sequence[MatMulSite], seconds: Mapping[str, float]
) -> Iterator[PreviewedSite]:
    groups = {site.name: group for group in plan.sites.groups for site in group.sites}
    skipped = dict(plan.sites.skipped)
    undecided_sites = () if plan.left_open is None else plan.left_open.candidates
    candidates = {site.name: each for each in undecided_sites for site in each.sites}
    for site in sites:
        spec, undecided = plan.sites.specs.get(site.name), candidates.get(site.name)
        scale = _input_scale(config, groups.get(site.name))
        yield PreviewedSite(
            name=site.name,
            in_features=site.in_features,
            out_features=site.out_features,
            format=KEEP if spec is None else spec.label,
            formats=() if undecided is None or len(undecided.formats) == 1 else tuple(undecided.formats),
            bits=None if spec is None else spec.bits,
            block_size=spec.granularity.block_size
            if spec is not None and isinstance(spec.granularity, PerBlock)
            else None,
            zero_point=spec is not None and not spec.symmetric,
            why=skipped.get(site.name, "" if undecided is None else undecided.fixed_because),
            bytes_before=weight_bytes(site),
            bytes_after=_bytes_after(site, spec, plan.choice),
            input_scale=scale.place,
            input_scale_into=scale.into,
            input_scale_why=scale.why,
            seconds=seconds.get(site.name, 0.0),
        )


def _unspent(plan: ModelPlan) -> int | None:
    budget = None if plan.left_open is None else plan.left_open.budget
    return budget.num_bytes if isinstance(budget, SizeBudget) else None


def _bytes_after(site: MatMulSite, spec: QuantSpec | None, choice: FormatChoice) -> int:
    if spec is None:
        return weight_bytes(site)
    if site.expert is not None:
        return stored_bytes(site.out_features, site.in_features, spec)
    return file_bytes(site, spec, choice.form, byte_scales=choice.scale_type == "bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class _InputScale:
    place: InputScalePlace
    into: str = ""
    why: str = ""


def _input_scale(config: QuantizeConfig, group: ActivationGroup | None) -> _InputScale:
    """Return where a group's scale goes by the graph's structure; its values may still forbid a fold."""
    if group is None or group.sites[0].expert is not None or config.search_algorithm not in get_args(ScaleSearch):
        return _InputScale(place="none")
    if config.awqlite_disable_fuse_nodes:
        return _InputScale(place="mul", why="--awqlite_disable_fuse_nodes")
    match group.absorber:
        case NormAbsorber(output=output):
            return _InputScale(place="norm", into=output)
        case LinearAbsorber(site=site):
            return _InputScale(place="linear", into=site)
        case ValueAbsorber(site=site):
            return _InputScale(place="value", into=site)
        case None:
            return _InputScale(place="mul", why=group.unfoldable_because)
