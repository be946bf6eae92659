"""Set up a sweep or comparison: open its folder, and read texts that calibration never saw."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from numpy.lib.stride_tricks import sliding_window_view

from stages.calibration.cache import find_cache
from stages.commands.evaluate_options import BenchConfig, EvaluateConfig
from stages.errors import CacheMismatch, UserError
from stages.evaluation.bench.runs import EvaluationText, RunFolder
from stages.evaluation.compare import prepare_base
from stages.model.directory import locate_model
from stages.model.load import fingerprint_model
from stages.system.atomic import require_creatable

_RUN = 16
"""Tokens in a row. Ordinary prose repeats hardly any of this length; set phrases are shorter."""
_TOLERATED = 0.05
"""Share of common runs up to which two texts count as different: boilerplate and quotations repeat."""


def open_run_folder(config: BenchConfig) -> RunFolder:
    """Return the folder of measured models; its records count for this base model and this calibration.

    Raises:
        UserError: the base model is missing, the cache was made from another one, or the folder can't be made.
    """
    require_creatable(config.output, option="--output")
    if config.output.is_file():
        raise UserError(f"--output {config.output} is a file; choose a folder.")
    fingerprint = fingerprint_model(locate_model(config.base))
    cache = find_cache(config.cache_path)
    if cache is not None and cache.manifest.key.model_fingerprint != fingerprint:
        raise CacheMismatch(f"--cache_dir {config.cache_path} was made from another model; pass this one's.")
    calibration = "" if cache is None else cache.manifest.key.digest()
    inputs = hashlib.sha256(f"{fingerprint} {calibration}".encode()).hexdigest()
    return RunFolder(folder=config.output.absolute(), inputs=inputs, retry_failed=config.retry_failed)


def read_evaluation_texts(config: BenchConfig) -> tuple[EvaluationText, ...]:
    """Return the texts of ``config``, tokenized.

    Raises:
        UserError: a text can't be read, is too short, or was calibrated on.
    """
    texts = []
    for text in config.text:
        request = EvaluateConfig(
            base=config.base,
            model_name=config.model_name,
            model=(),
            text=text,
            windows=config.windows,
            seq_len=config.seq_len,
            worst=0,
        )
        base = prepare_base(request)
        refuse_calibrated(text, base.windows, config.cache_path)
        texts.append(EvaluationText(text=text, base=base))
    return tuple(texts)


def refuse_calibrated(text: str, tokens: Int64[np.ndarray, "windows L"], cache: Path) -> None:
    """Raise UserError where more than a twentieth of a text was calibrated on.

    Args:
        text: its name.
        tokens: its windows.
        cache: folder of the calibration; where there is none, nothing was calibrated on.
    """
    found = find_cache(cache)
    if found is None:
        return
    share = common_share(tokens, np.concatenate(found.read_tokens()))
    if share > _TOLERATED:
        raise UserError(
            f"--text {text}: {share:.0%} of its runs of {_RUN} tokens were calibrated on ({cache}); pass text that "
            "calibration never saw."
        )


def common_share(tokens: Int64[np.ndarray, "windows L"], others: Int64[np.ndarray, "others M"]) -> float:
    """Return the share of the runs of 16 tokens in ``tokens`` that are in ``others`` too, 0 to 1."""
    known = {run.tobytes() for window in others for run in _runs(window)}
    found = [run.tobytes() in known for window in tokens for run in _runs(window)]
    return sum(found) / max(1, len(found))


def _runs(window: Int64[np.ndarray, " L"]) -> np.ndarray:
    return sliding_window_view(window, _RUN) if len(window) >= _RUN else np.empty((0, _RUN), window.dtype)
