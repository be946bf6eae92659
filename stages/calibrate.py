"""Stage one: ``python -m stages.calibrate``. Runs the base model once per batch and caches the statistics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from stages.atomic import existing_parent
from stages.base_graph import load_graph
from stages.cli import choose_device, progress_bar, run_command, show
from stages.config import CalibrateConfig
from stages.errors import CacheMismatch, GraphError
from stages.fingerprint import fingerprint_model
from stages.graph.run import ActivationTap, open_tap
from stages.graph.sites import find_groups
from stages.model_directory import ModelDirectory, locate_model
from stages.observe.cache import CacheKey, CacheWriter, find_cache, new_cache
from stages.observe.dataset import TokenWindows, WindowRequest, load_windows
from stages.observe.statistics import StatisticsAccumulator
from stages.provider_profile import ShapeProfile, WindowShape, decoder_sizes
from stages.records import ActivationGroup, ActivationStats, TokenStats
from stages.session import NV_TENSORRT_RTX, ProviderChoice, choose_providers
from stages.widen import WIDENED_BECAUSE


def calibrate(config: CalibrateConfig, console: Console) -> None:
    """Build the calibration cache that ``config`` describes, unless it is there already."""
    config.validate()
    started = time.perf_counter()
    device = choose_device(config.device)
    directory = locate_model(config.onnx_path)
    _require_context(config.seq_len, directory)
    model = load_graph(directory)
    groups = find_groups(model)
    choice = choose_providers(config.calibration_eps)
    windows = load_windows(_window_request(config, directory))
    wanted = _cache_key(directory, windows, choice)
    if _existing_difference(config, wanted) == "":
        _say_current(config, console)
        return
    options = _provider_options(config, directory, model, choice)
    with open_tap(model, directory, groups, choice, options, existing_parent(config.cache_path)) as tap:
        # Only now it is known which providers work.
        key = replace(wanted, providers=tap.providers.names)
        if _is_current(config, key):
            _say_current(config, console)
            return
        _fill_cache(config, key, tap, groups, windows, device, console)
        show(_summary(config, windows, groups, tap, time.perf_counter() - started))


def _say_current(config: CalibrateConfig, console: Console) -> None:
    console.print(f"{config.cache_path} already holds exactly this calibration; nothing to do.", highlight=False)


def _fill_cache(
    config: CalibrateConfig,
    key: CacheKey,
    tap: ActivationTap,
    groups: tuple[ActivationGroup, ...],
    windows: TokenWindows,
    device: torch.device,
    console: Console,
) -> None:
    with new_cache(config.cache_path, key, overwrite=config.overwrite) as writer:
        writer.write_tokens(windows.calibration, windows.held_out)
        with progress_bar(console) as progress:
            held_out = _observe(tap, groups, windows.held_out, config.batch_size, device, progress, "held-out windows")
            calibration = _observe(
                tap, groups, windows.calibration, config.batch_size, device, progress, "calibration windows"
            )
        _save(writer, groups, calibration, held_out)


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
        use_random=config.use_random_calib,
        trust_remote_code=config.trust_remote_code,
    )


def _provider_options(
    config: CalibrateConfig, directory: ModelDirectory, model: ir.Model, choice: ProviderChoice
) -> dict[str, dict[str, str]]:
    """Options by provider: NvTensorRtRtx builds its engine for the shapes that will be fed."""
    if NV_TENSORRT_RTX not in choice.names:
        return {}
    profile = ShapeProfile(
        window=WindowShape(batch_size=config.batch_size, seq_len=config.seq_len),
        sizes=decoder_sizes(directory, config.model_name, trust_remote_code=config.trust_remote_code),
        windowed_caches=directory.windowed_caches,
    )
    return {NV_TENSORRT_RTX: profile.provider_options(model.graph.inputs)}


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


def _observe(
    tap: ActivationTap,
    groups: tuple[ActivationGroup, ...],
    windows: np.ndarray,
    batch_size: int,
    device: torch.device,
    progress: Progress,
    description: str,
) -> dict[str, TokenStats]:
    """One forward pass per batch; every tapped activation is folded into its statistics at once."""
    accumulators = {
        group.activation: StatisticsAccumulator(group.activation, group.in_features, windows.size, device)
        for group in groups
    }
    task = progress.add_task(description, total=len(windows))
    for batch in _batches(windows, batch_size):
        for activation, values in tap.run(batch):
            accumulators[activation].add(values)
        progress.advance(task, len(batch))
    return {activation: accumulator.finish() for activation, accumulator in accumulators.items()}


def _batches(windows: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(windows), batch_size):
        yield windows[start : start + batch_size]


def _save(
    writer: CacheWriter,
    groups: tuple[ActivationGroup, ...],
    calibration: dict[str, TokenStats],
    held_out: dict[str, TokenStats],
) -> None:
    for group in groups:
        stats = ActivationStats(calibration=calibration[group.activation], held_out=held_out[group.activation])
        writer.write(group.activation, stats)


def _summary(
    config: CalibrateConfig,
    windows: TokenWindows,
    groups: tuple[ActivationGroup, ...],
    tap: ActivationTap,
    seconds: float,
) -> Table:
    table = Table(title="calibration cache", show_header=False)
    size = sum(file.stat().st_size for file in config.cache_path.iterdir())
    seq_len = windows.calibration.shape[1]
    table.add_row("cache", f"{config.cache_path} ({size / 1e6:.0f} MB)")
    table.add_row("text", windows.source)
    table.add_row("tokenizer", windows.tokenizer)
    table.add_row("windows", f"{len(windows.calibration)} to search with + {len(windows.held_out)} held out, {seq_len}")
    table.add_row("tapped", f"{len(groups)} activations of {sum(len(group.sites) for group in groups)} MatMuls")
    table.add_row("ran on", ", ".join(tap.providers.names))
    if tap.widened:
        table.add_row("", WIDENED_BECAUSE)
    for name, why in tap.providers.missing:
        table.add_row("not used", f"{name}: {why}")
    table.add_row("seconds", f"{seconds:.1f}")
    return table


def calibrate_and_point_on(config: CalibrateConfig, console: Console) -> None:
    """The command: ``calibrate``, then the next one to type."""
    calibrate(config, console)
    cache = "" if config.cache_dir is None else f" --cache_dir {config.cache_dir}"
    console.print(
        f"next: python -m stages.quantize --onnx_path {config.onnx_path}{cache} --output_path ...",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    run_command(CalibrateConfig, calibrate_and_point_on, "python -m stages.calibrate")
