"""Threads side by side, for work that gains little from a second thread of its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch


def one_thread_each(workers: int) -> ThreadPoolExecutor:
    """A pool of ``workers`` threads, in each of which torch computes with that thread alone."""
    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
