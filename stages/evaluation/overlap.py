"""Whether a text was calibrated on: long runs of tokens that both have in common."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Int64
from numpy.lib.stride_tricks import sliding_window_view

from stages.errors import UserError
from stages.observe.cache import find_cache

_RUN = 16
"""Tokens. Ordinary prose repeats hardly any run of this length; set phrases are shorter."""
_TOLERATED = 0.05
"""Share of common runs up to which a text counts as another one: boilerplate and quotations repeat."""


def common_share(tokens: Int64[np.ndarray, "windows L"], others: Int64[np.ndarray, "others M"]) -> float:
    """Share of the runs of 16 tokens in ``tokens`` that ``others`` hold as well, 0 to 1."""
    known = {run.tobytes() for window in others for run in _runs(window)}
    found = [run.tobytes() in known for window in tokens for run in _runs(window)]
    return sum(found) / max(1, len(found))


def _runs(window: Int64[np.ndarray, " L"]) -> np.ndarray:
    return sliding_window_view(window, _RUN) if len(window) >= _RUN else np.empty((0, _RUN), window.dtype)


def refuse_calibrated(text: str, tokens: Int64[np.ndarray, "windows L"], cache: Path) -> None:
    """Raise UserError where ``tokens`` of ``text`` are, for more than a twentieth, those that ``cache`` was made of.

    A cache that doesn't exist has seen nothing.
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
