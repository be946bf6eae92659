"""Algorithms by name: the one line to add for a new one."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from stages.solve.awq import awq_lite
from stages.solve.awq_full import awq_full
from stages.solve.awq_gptq import awq_gptq
from stages.solve.clip import awq_clip
from stages.solve.gptq import gptq
from stages.solve.problem import Algorithm
from stages.solve.rtn import rtn

ALGORITHMS: Mapping[str, Algorithm] = MappingProxyType(
    {
        "rtn": rtn,
        "rtn_dq": rtn,
        "awq_lite": awq_lite,
        "awq_clip": awq_clip,
        "awq_full": awq_full,
        "gptq": gptq,
        "awq_gptq": awq_gptq,
    }
)
