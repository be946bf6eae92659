"""Run the base model on the calibration text and write the cache of its statistics: what stage one does."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import onnx_ir as ir
import onnxruntime as ort
import torch

from stages.calibration.cache import CacheKey, CacheWriter, Weighting, find_cache, new_cache, require_place
from stages.calibration.capture import Capture, cache_bytes, memory_limit, rows_of
from stages.calibration.end_loss.back_pass import EndLossPass
from stages.calibration.end_loss.sums import weight_names
from stages.calibration.key_value_scales import KeyValueMaxima, find_key_value_caches, scales_text, write_scales
from stages.calibration.on_disk.stream_files import StreamFiles
from stages.calibration.on_disk.unfinished import Reached, State, Unfinished
from stages.calibration.samples.load import load_samples, sample_files, takes_samples
from stages.calibration.samples.samples import Samples
from stages.calibration.summary import CalibrationSummary, PassSummary
from stages.calibration.text.mix import dataset_names, dataset_parts
from stages.calibration.text.windows import TokenWindows, choose_dataset, load_windows, may_be_source, window_counts
from stages.calibration.trt_profile import ShapeProfile, decoder_sizes
from stages.commands.calibrate_options import PART_OF_FREE_MEMORY, CalibrateConfig
from stages.errors import CacheMismatch, GraphError, OptionError, UserError
from stages.model.directory import ModelDirectory, locate_model
from stages.model.load import fingerprint_model, load_graph, parse_graph
from stages.model.partition import Partition
from stages.model.sites import find_expert_layers, find_groups, widest_input
from stages.model.unquantized import require_float_base
from stages.records.experts import ExpertLayer
from stages.records.quantities import counted
from stages.records.sites import FloatName
from stages.runtime.blocks.chain import Chain, open_chain
from stages.runtime.feeds import require_text_inputs
from stages.runtime.graph_inputs import InputShapes, WindowShape, inputs_of_graph
from stages.runtime.providers import CUDA, NV_TENSORRT_RTX, ProviderChoice, choose_providers
from stages.runtime.requirements import require_runtime
from stages.runtime.tap import ActivationTap, require_kernels
from stages.system.atomic import existing_parent, scratch_folder
from stages.system.distributed import Processes, join_processes
from stages.system.hardware import choose_device
from stages.system.lock import exclusive
from stages.system.shared_folder import wait_for
from stages.system.threads import granted_threads

_LOGGER = logging.getLogger(__name__)
_CPU = "cpu"
"""As genai_config.json names it."""
PART_FOR_ROWS = 4
"""So large a part of the memory may the rows of several layers take while tokens are weighed."""
_QMOE_TYPES: Mapping[str, frozenset[FloatName]] = MappingProxyType(
    {
        _CPU: frozenset({"float32", "float16"}),
        "cuda": frozenset({"float16", "bfloat16"}),
        "webgpu": frozenset({"float32", "float16"}),
        "nvtensorrtrtx": frozenset({"float16", "bfloat16"}),
    }
)
"""Types of the graphs whose experts become QMoE, by provider, in small letters."""


def calibrate(config: CalibrateConfig) -> CalibrationSummary:
    """Build the calibration cache that ``config`` describes, unless it is there already.

    Processes launched together share the windows, and each returns what the cache holds.

    Raises:
        UserError: an option, the model or the text can't be used, or the cache folder holds something else or is being
            written by another run.
    """
    config.validate()
    started = time.perf_counter()
    granted_threads()  # what sessions can't use is an error before the text is read
    processes = join_processes()
    with ExitStack() as until_the_end:
        if processes.is_first:
            require_place(config.cache_path)
            until_the_end.enter_context(exclusive(config.cache_path, option="--cache_dir"))
        dataset = processes.decided_by_first(lambda: _dataset(config))
        folder = scratch_folder(config.cache_path, owner=processes.is_first)
        capture = _prepare(config, dataset, processes, until_the_end.enter_context(folder))
        chain = _chain(config, capture)
        key = _cache_key(capture, "none" if chain is None else "end loss")
        if processes.decided_by_first(lambda: _existing_difference(config, key)) == "":
            return _current(config, capture)
        return _run(config, capture, chain, key, started)


def _run(
    config: CalibrateConfig, capture: Capture, chain: Chain | None, key: CacheKey, started: float
) -> CalibrationSummary:
    """Run the model, write the cache, and return what it holds.

    Args:
        config: says where.
        capture: says what.
        chain: weighs the tokens; None where all count alike.
        key: the cache's if all providers work.
        started: when, by ``time.perf_counter``.
    """
    processes = capture.processes
    unfinished = Unfinished(config.cache_path, processes)
    streams = None if chain is None else _streams(capture, chain, unfinished.folder)
    capture = replace(capture, streams=streams)
    memory = processes.broadcast(memory_limit(config.max_memory, capture.device, processes.count_here))
    found = unfinished.found()
    partitions, options = capture.cut(memory, processes.count), _digest(config, key)
    begun = State(options=options, providers=(), cut=_cut_digest(partitions), memory=memory, processes=processes.count)
    if found is not None and found.options == options and found.cut != begun.cut:
        again = capture.cut(found.memory, found.processes)
        if found.memory <= memory / PART_OF_FREE_MEMORY and _cut_digest(again) == found.cut:
            partitions, begun = again, replace(found, providers=(), reached=Reached())
    with capture.open_first(partitions[0]) as tap:
        # Only now it is known which providers work.
        key = replace(key, providers=tap.providers.names)
        if processes.decided_by_first(lambda: _is_current(config, key)):
            return _current(config, capture)
        needed = processes.decided_by_first(lambda: _require_room(config, capture, unfinished))
        with (
            unfinished.going_on(replace(begun, providers=key.providers), found, needed) as goes_on,
            _new_cache(config, key, capture) as writer,
        ):
            if goes_on:
                _LOGGER.info("%s", _what_is_done(capture, len(partitions), chain, unfinished.reached))
            capture.fill(writer, partitions, tap, unfinished)
            if chain is not None and streams is not None:
                _end_loss(capture, chain, _weighted_layers(capture, key), memory, unfinished).fill(writer)
    # The first process has given the cache its place.
    made = _pass_summary(capture, len(partitions), tap, time.perf_counter() - started)
    return processes.decided_by_first(lambda: _summary(config, capture, made))


def _require_room(config: CalibrateConfig, capture: Capture, unfinished: Unfinished) -> int:
    """Return the bytes that the cache takes, and what lies beside it meanwhile.

    Raises:
        UserError: the disk has less room.
    """
    weighs = capture.streams is not None
    needed = cache_bytes(capture.groups, capture.text, capture.rows, weighs=weighs)
    if capture.streams is not None:
        needed += capture.streams.bytes(capture.groups[0].in_features)
    folder = existing_parent(config.cache_path)
    free = shutil.disk_usage(folder).free + unfinished.bytes()
    if needed > free:
        fix = ", lower --calib_size, or pass --token_weights none" if weighs else " or lower --calib_size"
        raise UserError(
            f"The calibration cache can't be written to {folder}: it takes about {needed / 1e9:,.1f} GB while it is "
            f"made, and {free / 1e9:,.1f} GB are free; free space there, choose another place with --cache_dir{fix}."
        )
    return needed


def _digest(config: CalibrateConfig, key: CacheKey) -> str:
    """Return a digest of all that decides about the numbers of a calibration but what ``State`` names itself."""
    options = (key.digest(), key.key_values, config.batch_size, config.device, config.max_memory)
    return hashlib.sha256(repr((*options, ort.__version__, torch.__version__)).encode()).hexdigest()


def _cut_digest(partitions: Sequence[Partition]) -> str:
    outputs = [[value.name for value in partition.model.graph.outputs] for partition in partitions]
    return hashlib.sha256(repr(outputs).encode()).hexdigest()


def _what_is_done(capture: Capture, partitions: int, chain: Chain | None, reached: Reached) -> str:
    """Return in words how far a calibration came that was stopped."""
    stopped = "going on with a calibration that was stopped after"
    if reached.partitions < partitions:
        batches = sum(reached.batches.values())
        of_text = isinstance(capture.windows, TokenWindows)
        done = counted(batches * capture.batch_size, "window") if of_text else counted(batches, "sample")
        part = f" of part {reached.partitions + 1} of {partitions}" if partitions > 1 else ""
        return f"{stopped} about {done}{part}"
    links = 0 if chain is None else len(chain.links)
    return f"{stopped} all windows; tokens are weighed in {reached.links} of {links} layers"


def _dataset(config: CalibrateConfig) -> str:
    """Return the data sets to calibrate on; log why they aren't the default ones."""
    if config.use_random_calib or config.samples_of(locate_model(config.onnx_path, config.component).component):
        return ""
    chosen = choose_dataset(config)
    if chosen.note:
        _LOGGER.info("%s", chosen.note)
    return chosen.dataset


def _prepare(config: CalibrateConfig, dataset: str, processes: Processes, scratch: Path) -> Capture:
    choice = choose_providers(config.calibration_eps)
    with processes.main_process_first():
        device = choose_device(config.device)
        directory = locate_model(config.onnx_path, config.component)
        model = load_graph(directory)
        require_float_base(model, directory)
        require_runtime(model, str(directory.onnx_file))
        require_kernels(model, directory, choice)
    groups = find_groups(model)
    windows: TokenWindows | Samples
    if takes_samples(config, model, directory):
        if config.kv_scales != "none":
            raise OptionError("--kv_scales is measured on text, and samples calibrate this graph; leave it out.")
        layers: tuple[ExpertLayer, ...] = ()
        maxima = None
        with processes.main_process_first():
            windows = load_samples(config, model, directory, dataset)
    else:
        with processes.main_process_first():
            window = require_text_inputs(model, directory)
            config = fit_to_graph(config, window)
            _require_context(config.seq_len, directory)
        layers = kept_layers(config, model, directory)
        maxima = _maxima(config, model)
        # Text that the model writes lies in a file, which other machines may see late.
        windows = processes.decided_by_first(
            lambda: load_windows(config, directory, dataset, choice.names, widest_input(groups))
        )
        windows = windows.in_whole_batches(window.batch or 1)
    return Capture(
        model=model,
        directory=directory,
        groups=groups,
        rows=rows_of(layers),
        windows=windows,
        batch_size=config.batch_size,
        device=device,
        choice=choice,
        provider_options=_provider_options(config, directory, model, choice, processes),
        scratch=scratch,
        processes=processes,
        maxima=maxima,
    )


def _maxima(config: CalibrateConfig, model: ir.Model) -> KeyValueMaxima | None:
    return None if config.kv_scales == "none" else KeyValueMaxima(caches=find_key_value_caches(model))


def require_inputs(config: CalibrateConfig) -> None:
    """Check, before anything runs, that text or files that are there fill the inputs of the graph.

    Raises:
        UserError: an input can't be filled, or there are no such files.
    """
    directory = locate_model(config.onnx_path, config.component)
    model = parse_graph(directory)
    if takes_samples(config, model, directory):
        path = config.samples_of(directory.component)
        if path is not None:
            sample_files(path)
    else:
        require_text_inputs(model, directory)


def kept_layers(config: CalibrateConfig, model: ir.Model, directory: ModelDirectory) -> tuple[ExpertLayer, ...]:
    """Return the layers of experts whose rows are kept."""
    provider = (directory.provider or _CPU).lower()
    if config.expert_rows == "none":
        return ()
    layers, types = find_expert_layers(model), _QMOE_TYPES.get(provider, frozenset())
    return tuple(layer for layer in layers if config.expert_rows == "all" or layer.dtype in types)


def fit_to_graph(config: CalibrateConfig, window: WindowShape) -> CalibrateConfig:
    """Return ``config`` with the length and number of windows that a graph takes at a time, where it fixes them."""
    fitting = replace(config, seq_len=window.length or config.seq_len, batch_size=window.batch or config.batch_size)
    for option in ("seq_len", "batch_size"):
        before, after = getattr(config, option), getattr(fitting, option)
        if before != after:
            _LOGGER.info("the graph takes windows of fixed shape: --%s %d in place of %d", option, after, before)
    return fitting


def _require_context(seq_len: int, directory: ModelDirectory) -> None:
    context = directory.context_length
    if context is not None and seq_len > context:
        raise GraphError(
            f"--seq_len {seq_len} is longer than the context of {directory.folder}, {context} tokens by its "
            f"genai_config.json; pass --seq_len {context} or less."
        )


def _provider_options(
    config: CalibrateConfig,
    directory: ModelDirectory,
    model: ir.Model,
    choice: ProviderChoice,
    processes: Processes,
) -> dict[str, dict[str, str]]:
    """Return options by provider: this process's GPU; NvTensorRtRtx builds its engine for the shapes that come."""
    options = {name: {"device_id": str(processes.index_here)} for name in (CUDA,) if processes.count > 1}
    if NV_TENSORRT_RTX not in choice.names:
        return options
    sizes = decoder_sizes(directory, config.model_name, trust_remote_code=config.trust_remote_code)
    profile = ShapeProfile(
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        context_length=sizes.context_length,
        shapes=replace(
            InputShapes.of(directory, advice="leave NvTensorRtRtx out of --calibration_eps"),
            kv_heads=sizes.kv_heads,
            head_size=sizes.head_size,
        ),
    )
    return options | {NV_TENSORRT_RTX: profile.provider_options(inputs_of_graph(model, directory))}


def _chain(config: CalibrateConfig, capture: Capture) -> Chain | None:
    """Return the model as a chain to weigh tokens with; None, with one line that says why, where it can't be one."""
    if config.token_weights == "none" or isinstance(capture.windows, Samples):
        return None
    try:
        return open_chain(capture.model, capture.groups)
    except GraphError as error:
        reason = str(error).partition(";")[0]
        _LOGGER.info("all tokens count alike in the statistics, as with --token_weights none: %s", reason)
        return None


def _streams(capture: Capture, chain: Chain, folder: Path) -> StreamFiles:
    assert isinstance(capture.windows, TokenWindows), "a chain runs over text"
    return StreamFiles(
        folder=folder,
        names=tuple(link.stream_in for link in chain.links),
        windows=len(capture.windows.calibration) + len(capture.windows.held_out),
        length=capture.windows.seq_len,
    )


def _end_loss(
    capture: Capture, chain: Chain, layers: tuple[ExpertLayer, ...], memory: int, unfinished: Unfinished
) -> EndLossPass:
    assert isinstance(capture.windows, TokenWindows), "a chain runs over text"
    assert capture.streams is not None, "they are kept where there is a chain"
    return EndLossPass(
        chain=chain,
        directory=capture.directory,
        groups=capture.groups,
        windows=capture.windows,
        batch_size=capture.batch_size,
        device=capture.device,
        streams=capture.streams,
        kept=capture.kept_places,
        unfinished=unfinished,
        processes=capture.processes,
        memory=memory // PART_FOR_ROWS,
        layers=layers,
    )


def _cache_key(capture: Capture, token_weights: Weighting) -> CacheKey:
    windows = capture.windows
    return CacheKey(
        model_fingerprint=fingerprint_model(capture.directory, capture.model),
        token_fingerprint=windows.fingerprint,
        source=windows.source,
        calibration_windows=len(windows.calibration),
        held_out_windows=len(windows.held_out),
        seq_len=windows.seq_len,
        providers=capture.choice.names,
        token_weights=token_weights,
        expert_rows=bool(capture.rows),
        key_values=capture.maxima is not None,
    )


@contextmanager
def _new_cache(config: CalibrateConfig, key: CacheKey, capture: Capture) -> Iterator[CacheWriter]:
    """Give the block a writer; the first process makes the folder and gives it its place, and all fill it."""
    activations = [group.activation for group in capture.groups]
    rows = [*capture.rows, *(name for layer in _weighted_layers(capture, key) for name in weight_names(layer))]
    if capture.processes.is_first:
        samples = capture.windows.digests if isinstance(capture.windows, Samples) else ()
        with new_cache(
            config.cache_path, key, activations, rows, overwrite=config.overwrite, samples=samples
        ) as writer:
            if isinstance(capture.windows, TokenWindows):
                writer.write_tokens(capture.windows.calibration, capture.windows.held_out)
            capture.processes.broadcast(writer.folder)
            yield writer
    else:
        folder = capture.processes.broadcast(Path())
        wait_for([folder])
        yield CacheWriter.of(folder, activations, rows)


def _weighted_layers(capture: Capture, key: CacheKey) -> tuple[ExpertLayer, ...]:
    """Return the layers of experts whose tokens are weighted by the end loss."""
    return find_expert_layers(capture.model) if capture.rows and key.token_weights == "end loss" else ()


def _existing_difference(config: CalibrateConfig, key: CacheKey) -> str | None:
    """Return how the cache that is there differs from ``key``, "" where it doesn't; None where there is none.

    Raises:
        CacheMismatch: something else lies there, and it may not be overwritten.
    """
    try:
        existing = find_cache(config.cache_path)
    except CacheMismatch:
        if config.overwrite:
            return None
        raise
    return None if existing is None else existing.manifest.key.difference(key)


def _is_current(config: CalibrateConfig, key: CacheKey) -> bool:
    """Return whether the cache is there already; one that differs is refused unless it may be overwritten."""
    reason = _existing_difference(config, key)
    if reason and not config.overwrite:
        raise another_calibration(config.cache_path, reason)
    return reason == ""


def another_calibration(folder: Path, reason: str) -> CacheMismatch:
    """Return the error about a cache of another calibration than is asked for."""
    return CacheMismatch(
        f"--cache_dir {folder} holds another calibration: {reason}; choose another folder or pass --overwrite."
    )


def foreseen_difference(
    config: CalibrateConfig, key: CacheKey, model: ir.Model, directory: ModelDirectory, dataset: str
) -> str:
    """Return how a cache differs from the calibration that ``config`` asks for; "" where only reading its text tells.

    Args:
        config: the options.
        key: the cache's.
        model: the base model.
        directory: where it lies.
        dataset: the data sets, separated by commas; empty where samples are used.

    Raises:
        UserError: a data set doesn't exist, or the graph takes no text.
    """
    other = f"its text is {key.text}, and other text is asked for"
    of_samples, files = takes_samples(config, model, directory), config.samples_of(directory.component)
    if of_samples != (key.seq_len is None):
        return other
    if of_samples:
        return "" if files is None or key.source.endswith(files.name) else other
    window = require_text_inputs(model, directory)
    config = replace(config, seq_len=window.length or config.seq_len)
    if key.seq_len != config.seq_len or not may_be_source(key.source, config, dataset):
        return other
    counts = window_counts(config, dataset, widest_input(find_groups(model)))
    padded = tuple(count + -count % (window.batch or 1) for count in counts)
    is_whole = dataset_parts(dataset) == dataset_names(dataset)  # parts of mix may be too short
    if is_whole and padded != (key.calibration_windows, key.held_out_windows):
        return other
    asked = replace(key, token_weights="none") if config.token_weights == "none" else key
    return key.difference(asked)


def _current(config: CalibrateConfig, capture: Capture) -> CalibrationSummary:
    Unfinished(config.cache_path, capture.processes).discard()
    _LOGGER.info("%s already holds exactly this calibration; nothing to do.", config.cache_path)
    return capture.processes.decided_by_first(lambda: _summary(config, capture, made=None))


def _summary(config: CalibrateConfig, capture: Capture, made: PassSummary | None) -> CalibrationSummary:
    cache = find_cache(config.cache_path)
    assert cache is not None, "it was written or found a moment ago"
    scales: Path | None = None
    if capture.maxima is not None:
        text = scales_text(capture.maxima.caches, cache.read_maxima(), config.kv_scales)
        scales = write_scales(config.cache_path, text)
    return CalibrationSummary(
        cache=config.cache_path,
        bytes=sum(file.stat().st_size for file in config.cache_path.iterdir()),
        key=cache.manifest.key,
        activations=len(cache.manifest.files),
        channels=widest_input(capture.groups),
        kv_scales=scales,
        made=made,
    )


def _pass_summary(capture: Capture, partitions: int, tap: ActivationTap, seconds: float) -> PassSummary:
    groups = capture.groups
    return PassSummary(
        tokenizer=capture.windows.tokenizer,
        matmuls=sum(len(group.sites) for group in groups),
        as_rows=sum(capture.text.size(group, "calibration").keeps_rows for group in groups),
        partitions=partitions,
        widened=tap.upcast,
        norms_written_out=tap.norms_written_out,
        unused=tap.providers.missing,
        seconds=seconds,
    )
