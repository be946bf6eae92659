"""Forecast what each stage of a run takes, for one process and for several that share it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch

from stages.calibration.capture import KeptRows, TextShape, cache_bytes, memory_limit, partition_bytes, rows_of
from stages.calibration.run import PART_FOR_ROWS, kept_layers
from stages.commands.calibrate_options import CalibrateConfig
from stages.commands.quantize_options import QuantizeConfig
from stages.model.directory import ModelDirectory
from stages.model.sites import find_groups
from stages.quantization.plan.output_size import weight_bytes
from stages.quantization.plan.plan import ModelPlan, spreads_its_bytes
from stages.quantization.plan.rules import all_sites
from stages.quantization.preview.memory import calibration_memory, export_memory, search_memory
from stages.quantization.preview.sharing import (
    COUNTS,
    PassWork,
    Work,
    multiply_rate,
    pass_work,
    shared_run,
    weighing_memory,
)
from stages.quantization.preview.table import DiskUse, SharedRun, StageMemory
from stages.records.sites import ActivationGroup
from stages.runtime.providers import choose_providers
from stages.system.distributed import Processes, join_processes
from stages.system.hardware import choose_device

_PARTS = ("calibration", "held_out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """All stages of a run, for forecasts of what each takes."""

    config: QuantizeConfig
    directory: ModelDirectory
    model: ir.Model
    plan: ModelPlan
    calibrates: bool
    """Whether stage one still has to make a cache."""
    calibration: CalibrateConfig
    text: TextShape | None
    """None where no statistics are needed."""
    own_windows: int
    """Windows that the model writes itself."""
    held: int
    """Bytes of this process already."""

    @property
    def weighs(self) -> bool:
        """Return whether stage one weighs tokens, as far as that is known before the graph is cut."""
        of_text = self.text is not None and self.text.seq_len is not None
        return self.calibrates and of_text and self.calibration.token_weights != "none"

    @property
    def tapped(self) -> tuple[ActivationGroup, ...]:
        return find_groups(self.model)

    @property
    def statistics(self) -> int:
        """Return the bytes of the cache that stage one still has to write."""
        if self.text is None or not self.calibrates:
            return 0
        return cache_bytes(self.tapped, self.text, self._rows, weighs=self.weighs)

    @property
    def kept_rows(self) -> int:
        """Return the bytes of the rows that experts read, where stage one still has to keep them."""
        if self.text is None or not self.calibrates:
            return 0
        tokens = sum(self.text.tokens(part) or 0 for part in _PARTS)
        return sum(each.bytes(tokens) for each in self._rows.values())

    @property
    def _rows(self) -> Mapping[str, KeptRows]:
        """Return the values of which stage one keeps every token's row: none of samples."""
        if self.text is None or self.text.seq_len is None:
            return {}
        return rows_of(kept_layers(self.calibration, self.model, self.directory))

    @property
    def passes(self) -> PassWork | None:
        if self.text is None or not self.calibrates:
            return None
        groups = (*self.tapped, *self.plan.experts.groups)
        return pass_work(groups, self.text, self.statistics, weighs=self.weighs, own_windows=self.own_windows)

    def memory(self, processes: Processes) -> Iterator[StageMemory]:
        """Yield what each stage holds in the first of ``processes``."""
        yield from self._calibrate_memory(processes.count, processes.count_here)
        plan = self.plan
        yield search_memory(plan.sites.groups, plan.sites.specs, choose_device(self.config.device), self.held)
        yield export_memory(plan.sites.groups, plan.sites.specs, self.held)

    def _calibrate_memory(self, count: int, count_here: int) -> Iterator[StageMemory]:
        text = self.text
        if text is None or not self.calibrates:
            return
        limit = memory_limit(self.calibration.max_memory, choose_device(self.calibration.device), count_here)
        costs = partition_bytes(self.tapped, text, count, self._rows)
        providers = choose_providers(self.calibration.calibration_eps).names
        yield calibration_memory(self.model, costs, limit, self.held, providers)
        if self.weighs:
            yield weighing_memory(self.tapped, text, count, limit // PART_FOR_ROWS, self.held)

    def rate(self, device: torch.device) -> float | None:
        """Measure how many multiplications and additions a second stage one will make; None where it isn't needed."""
        return None if self.passes is None else multiply_rate(device, self.tapped[0].in_features)

    def shared(
        self, disk: DiskUse, base: int, seconds: Mapping[str, float], device: torch.device, rate: float | None
    ) -> Iterator[SharedRun]:
        """Yield what several numbers of processes take, each of which has a machine like this one."""
        plan = self.plan
        sizes = [self.text.size(group, part) for group in plan.sites.groups for part in _PARTS] if self.text else []
        work = Work(
            algorithm=self.config.search_algorithm,
            calibration=self.passes,
            groups=plan.sites.groups,
            seconds=seconds,
            base=base,
            sites=sum(weight_bytes(site) for site in all_sites(plan.sites.groups)),
            statistics=sum(size.disk for size in sizes),
            spends_budget=plan.left_open is not None or (self.weighs and spreads_its_bytes(self.config, plan)),
            weights=disk.weights,
            output=disk.output,
        )
        search = search_memory(plan.sites.groups, plan.sites.specs, device, self.held).bytes
        export = export_memory(plan.sites.groups, plan.sites.specs, self.held).bytes
        for count in sorted({*COUNTS, join_processes().count}):
            calibrate = [memory.bytes for memory in self._calibrate_memory(count, 1)]
            first = max((*calibrate, search, export))
            yield shared_run(work, count, rate, first, max((*calibrate, search)))
