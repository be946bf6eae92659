"""What work costs beside the products of weights: all constants of the forecasts of seconds, and how time is taken."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

ATTENTION = 4.0
"""Operations a token, channel and token that it may see: scores, and values by them. Masked ones are computed too."""
BACK_OF_ATTENTION = 2.5
"""Times as many on the way back, which computes the scores again."""
PER_CHANNEL = 400.0
"""So many operations take as long as all else that the way back does with a number that a site reads or gives: norms,
activation functions, rotations, squares and sums, which are limited by the memory."""
PER_LABEL = 700.0
"""The same for each token and entry of the vocabulary, where labels are drawn: exponentials and their running sum."""
FEW_ROWS = 1.3
"""Times as long as in those passes takes a multiplication where text is written: a step has a row for each window."""
CACHED_ATTENTION = 13.0
"""The same of attention there, which reads the keys and values of all tokens before for every one."""


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return how long ``work`` takes on ``device``.

    On one thread of the CPU what other programs take meanwhile is left out; with more threads it can't be told apart.
    """
    began, began_own = time.perf_counter(), time.process_time()
    work()
    seconds, own = time.perf_counter() - began, time.process_time() - began_own
    return min(seconds, own) if device.type == "cpu" and torch.get_num_threads() == 1 else seconds
