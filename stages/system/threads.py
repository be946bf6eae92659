"""How many threads work runs on: as many as a person grants, else one a core.

Without torch, so that a chat begins at once.
"""

from __future__ import annotations

import os
import re

import psutil

from stages.errors import UserError

_THREADS = re.compile(r"\s*0*([1-9][0-9]{0,8})\s*(,.*)?")
"""A value of OMP_NUM_THREADS: a number, or a list of them, one for each level of nested loops."""


def physical_cores() -> int:
    """Return how many threads ONNX Runtime takes by default: one for each physical core."""
    return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1


def granted_threads() -> int | None:
    """Return the number of threads that OMP_NUM_THREADS grants: of a list, as OpenMP allows, its first number.

    At most as many as the machine runs at once; None where the variable is unset or empty.

    Raises:
        UserError: it holds anything else.
    """
    value = os.environ.get("OMP_NUM_THREADS", "").strip()
    found = _THREADS.fullmatch(value)
    if value and found is None:
        raise UserError(f"OMP_NUM_THREADS is '{value}', which is not a number of threads; set it to one, or unset it.")
    return None if found is None else min(int(found[1]), psutil.cpu_count() or 1)


def usable_threads() -> int:
    """Return the threads that a runtime is to take: as many as OMP_NUM_THREADS grants, else one a physical core.

    Raises:
        UserError: the variable holds no number of threads.
    """
    return granted_threads() or physical_cores()
