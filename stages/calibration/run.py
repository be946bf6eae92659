"""Run the base model once per batch and write the calibration cache: what stage one does."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from stages.calibration.cache import CacheKey, CacheWriter, find_cache, new_cache, require_place
from stages.calibration.capture import Capture, memory_limit
from stages.calibration.summary import CalibrationSummary, PassSummary
from stages.calibration.text.self_generated import OwnTextSource
from stages.calibration.text.windows import TokenWindows, WindowRequest, load_windows
from stages.calibration.trt_profile import ShapeProfile, WindowShape, decoder_sizes
from stages.commands.calibrate_options import CalibrateConfig
from stages.errors import CacheMismatch, GraphError
from stages.model.directory import ModelDirectory, locate_model
from stages.model.load import fingerprint_model, load_graph
from stages.model.sites import find_groups
from stages.runtime.providers import CUDA, NV_TENSORRT_RTX, ProviderChoice, choose_providers
from stages.runtime.tap import ActivationTap
from stages.system.atomic import scratch_beside
from stages.system.distributed import Processes, join_processes
from stages.system.hardware import choose_device

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedCalibration:
    """What is to be calibrated, and the key of its cache if all providers work."""

    model: ir.Model
    capture: Capture
    choice: ProviderChoice
    key: CacheKey


def calibrate(config: CalibrateConfig) -> CalibrationSummary:
    """Build the calibration cache that ``config`` describes, unless it is there already.

    Processes launched together share the windows, and each returns what the cache holds.

    Raises:
        UserError: an option, the model or the text can't be used, or the cache folder holds something else.
    """
    config.validate()
    started = time.perf_counter()
    processes = join_processes()
    with ExitStack() as until_the_end:
        with processes.main_process_first():
            require_place(config.cache_path)
            folder = scratch_beside(config.cache_path, owner=processes.is_first)
            prepared = _prepare(config, processes, until_the_end.enter_context(folder))
            if _existing_difference(config, prepared.key) == "":
                return _current(config)
        return _observe(config, prepared, processes, started)


def _observe(
    config: CalibrateConfig, prepared: PreparedCalibration, processes: Processes, started: float
) -> CalibrationSummary:
    """Run the model, write the cache, and return what it holds."""
    capture = prepared.capture
    memory = processes.broadcast(memory_limit(config.max_memory, capture.device, processes))
    partitions = capture.cut(prepared.model, memory, prepared.choice.names)
    with capture.open_first(partitions[0], prepared.choice) as tap:
        # Only now it is known which providers work.
        key = replace(prepared.key, providers=tap.providers.names)
        if _is_current(config, key):
            return _current(config)
        with _new_cache(config, key, capture, processes) as writer:
            capture.fill(writer, partitions, tap)
    processes.barrier()  # the first process gives the cache its place
    return _summary(config, _pass_summary(capture, len(partitions), tap, time.perf_counter() - started))


def _prepare(config: CalibrateConfig, processes: Processes, scratch: Path) -> PreparedCalibration:
    device = choose_device(config.device)
    directory = locate_model(config.onnx_path)
    _require_context(config.seq_len, directory)
    model = load_graph(directory)
    choice = choose_providers(config.calibration_eps)
    own_text = OwnTextSource(directory=directory, providers=choice.names, folder=config.cache_path.absolute().parent)
    capture = Capture(
        directory=directory,
        groups=find_groups(model),
        windows=load_windows(_window_request(config, directory), own_text=own_text),
        batch_size=config.batch_size,
        device=device,
        provider_options=_provider_options(config, directory, model, choice, processes),
        scratch=scratch,
        processes=processes,
    )
    key = _cache_key(directory, capture.windows, choice)
    return PreparedCalibration(model=model, capture=capture, choice=choice, key=key)


@contextmanager
def _new_cache(config: CalibrateConfig, key: CacheKey, capture: Capture, processes: Processes) -> Iterator[CacheWriter]:
    """The first process makes the folder and gives it its place; all fill it."""
    activations = [group.activation for group in capture.groups]
    if processes.is_first:
        with new_cache(config.cache_path, key, activations, overwrite=config.overwrite) as writer:
            writer.write_tokens(capture.windows.calibration, capture.windows.held_out)
            processes.broadcast(writer.folder)
            yield writer
    else:
        yield CacheWriter.of(processes.broadcast(Path()), activations)


def _current(config: CalibrateConfig) -> CalibrationSummary:
    _LOGGER.info("%s already holds exactly this calibration; nothing to do.", config.cache_path)
    return _summary(config, made=None)


def _require_context(seq_len: int, directory: ModelDirectory) -> None:
    context = directory.context_length
    if context is not None and seq_len > context:
        raise GraphError(
            f"--seq_len {seq_len} is longer than the context of {directory.folder}, {context} tokens by its "
            f"genai_config.json; pass --seq_len {context} or less."
        )


def _window_request(config: CalibrateConfig, directory: ModelDirectory) -> WindowRequest:
    return WindowRequest(
        dataset=config.dataset,
        tokenizer_path=config.model_name or str(directory.folder),
        stand_in_path=str(directory.folder),
        vocab_size=directory.vocab_size,
        calib_size=config.calib_size,
        seq_len=config.seq_len,
        seed=config.seed,
        apply_chat_template=config.apply_chat_template,
        use_random=config.use_random_calib,
        trust_remote_code=config.trust_remote_code,
    )


def _provider_options(
    config: CalibrateConfig,
    directory: ModelDirectory,
    model: ir.Model,
    choice: ProviderChoice,
    processes: Processes,
) -> dict[str, dict[str, str]]:
    """Options by provider: which GPU is this process's; NvTensorRtRtx builds its engine for the shapes that come."""
    options = {name: {"device_id": str(processes.index_here)} for name in (CUDA,) if processes.count > 1}
    if NV_TENSORRT_RTX not in choice.names:
        return options
    profile = ShapeProfile(
        window=WindowShape(batch_size=config.batch_size, seq_len=config.seq_len),
        sizes=decoder_sizes(directory, config.model_name, trust_remote_code=config.trust_remote_code),
        windowed_caches=directory.windowed_caches,
    )
    return options | {NV_TENSORRT_RTX: profile.provider_options(model.graph.inputs)}


def _cache_key(directory: ModelDirectory, windows: TokenWindows, providers: ProviderChoice) -> CacheKey:
    return CacheKey(
        model_fingerprint=fingerprint_model(directory),
        token_fingerprint=windows.fingerprint,
        source=windows.source,
        calibration_windows=len(windows.calibration),
        held_out_windows=len(windows.held_out),
        seq_len=windows.calibration.shape[1],
        providers=providers.names,
    )


def _existing_difference(config: CalibrateConfig, key: CacheKey) -> str | None:
    """In what the cache that is there differs from ``key``, '' where in nothing; None where there is none.

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
    """Whether the cache is there already; one that differs is refused unless it may be overwritten."""
    reason = _existing_difference(config, key)
    if reason and not config.overwrite:
        raise CacheMismatch(
            f"--cache_dir {config.cache_path} holds another calibration: {reason}; "
            "choose another folder or pass --overwrite."
        )
    return reason == ""


def _pass_summary(capture: Capture, partitions: int, tap: ActivationTap, seconds: float) -> PassSummary:
    groups = capture.groups
    return PassSummary(
        tokenizer=capture.windows.tokenizer,
        matmuls=sum(len(group.sites) for group in groups),
        as_rows=sum(capture.text.size(group, "calibration").keeps_rows for group in groups),
        partitions=partitions,
        widened=tap.widened,
        unused=tap.providers.missing,
        seconds=seconds,
    )


def _summary(config: CalibrateConfig, made: PassSummary | None) -> CalibrationSummary:
    """What the cache that is there holds."""
    cache = find_cache(config.cache_path)
    assert cache is not None, "it was written or found a moment ago"
    key = cache.manifest.key
    return CalibrationSummary(
        cache=config.cache_path,
        bytes=sum(file.stat().st_size for file in config.cache_path.iterdir()),
        source=key.source,
        calibration_windows=key.calibration_windows,
        held_out_windows=key.held_out_windows,
        seq_len=key.seq_len,
        activations=len(cache.manifest.files),
        providers=key.providers,
        made=made,
    )
