"""What is settled before the model runs, and before a search begins."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from stages.model_directory import ModelDirectory
from stages.observation import Observation
from stages.observe.cache import CacheKey, CalibrationCache
from stages.planning import ModelPlan
from stages.quantized_store import QuantizedStore
from stages.records import ActivationGroup
from stages.session import ProviderChoice
from stages.solve.runner import GroupSolver


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A base model, a decided plan for it, the statistics to search with, and where the result goes."""

    directory: ModelDirectory
    model: ir.Model
    plan: ModelPlan
    cache: CalibrationCache | None
    """None where the algorithm needs no statistics."""
    store: QuantizedStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """A search that nothing has been done of yet."""

    solver: GroupSolver
    groups: tuple[ActivationGroup, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedCalibration:
    """What is to be calibrated, and the key of its cache if all providers work."""

    model: ir.Model
    observation: Observation
    choice: ProviderChoice
    key: CacheKey
