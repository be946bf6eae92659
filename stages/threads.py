"""Threads: how many are ours, and some side by side for work that gains little from a second one."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor

import torch

_COUNT = re.compile(r"\s*0*([1-9][0-9]{0,8})\s*(,.*)?")


def threads() -> int | None:
    """Return the number of threads that OMP_NUM_THREADS grants: of a list, as OpenMP allows, its first number.

    None where the variable is unset, or holds what OpenMP runtimes ignore: nothing, words, a number below 1.
    """
    found = _COUNT.fullmatch(os.environ.get("OMP_NUM_THREADS", ""))
    return None if found is None else int(found[1])


def one_thread_each(workers: int) -> ThreadPoolExecutor:
    """A pool of ``workers`` threads, in each of which torch computes with that thread alone."""
    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
