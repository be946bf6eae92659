"""Algorithms by name: the one line to add for a new one."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from stages.solve.accept import settle
from stages.solve.awq import awq_lite
from stages.solve.awq_full import awq_full, clipped
from stages.solve.awq_gptq import awq_gptq
from stages.solve.clip import awq_clip
from stages.solve.evaluate import full_ranges
from stages.solve.gptq import compensate, gptq
from stages.solve.mse import mse
from stages.solve.problem import Algorithm, Finish
from stages.solve.rtn import rtn

FINISHES: Mapping[str, Finish] = MappingProxyType(
    {
        "awq_lite": lambda problem, options, scale: full_ranges(problem, options.range_rule, scale),
        "awq_full": lambda problem, options, scale: settle(problem, clipped(problem, options, scale)),
        "awq_gptq": lambda problem, options, scale: compensate(problem, options, clipped(problem, options, scale)),
    }
)
"""What the algorithms that search input scales do once one is chosen."""

ALGORITHMS: Mapping[str, Algorithm] = MappingProxyType(
    {
        "rtn": rtn,
        "rtn_dq": rtn,
        "awq_lite": awq_lite,
        "awq_clip": awq_clip,
        "awq_full": awq_full,
        "mse": mse,
        "gptq": gptq,
        "awq_gptq": awq_gptq,
    }
)
