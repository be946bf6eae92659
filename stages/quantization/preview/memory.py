"""Forecast how much memory each stage holds at most, from the sizes in the graph.

Estimates: what a stage keeps on purpose is counted, what libraries take for themselves is not, beyond what this process
holds already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import psutil
import torch

from stages.calibration.capture import cut_to_memory
from stages.quantization.preview.table import StageMemory
from stages.quantization.search.parallel import batches, small_groups, workers_on
from stages.quantization.search.parallel import search_memory as group_memory
from stages.quantization.weights.validate import CHECKED_AT_ONCE
from stages.records.formats import EmbeddingPlan, QuantSpec, torch_float
from stages.records.sites import ActivationGroup
from stages.runtime.cpu.upcast import resident_bytes

_CHECKED = 4
"""Bytes for each weight of a site whose product is checked: codes, pages of the output, ONNX Runtime's copies."""
_PARTITION = 1 << 28
_REPACKED = 3
"""The exported model runs in partitions of so many bytes, so many times larger once ONNX Runtime has repacked them."""


def held_already() -> int:
    """Return the bytes of this process, which has loaded the libraries and parsed the graph as every stage does."""
    return int(psutil.Process().memory_info().rss)


def calibration_memory(
    model: ir.Model, costs: Mapping[str, int], limit: int, held: int, providers: tuple[str, ...]
) -> StageMemory:
    """Return what stage one holds: weights, statistics, and activations of a batch.

    Args:
        model: the base model.
        costs: bytes of each activation, by ``partition_bytes``.
        limit: bytes that a partition of the graph may take.
        held: bytes of this process already.
        providers: those that shall run the model.
    """
    weights: list[int] = []
    totals: list[int] = []
    for partition in cut_to_memory(model, costs, limit, providers):
        read = {value for node in partition.model.graph for value in node.inputs if value is not None}
        made = {output.name for node in partition.model.graph for output in node.outputs}
        weights.append(
            sum(resident_bytes(value.const_value, providers) for value in read if value.const_value is not None)
        )
        totals.append(weights[-1] + sum(cost for name, cost in costs.items() if name in made))
    largest = max(range(len(totals)), key=totals.__getitem__)
    parts = "" if len(totals) == 1 else f", in {len(totals)} parts (--max_memory)"
    statistics = totals[largest] - weights[largest]
    return StageMemory(
        stage="calibrate",
        bytes=held + totals[largest],
        holds=f"{weights[largest] / 1e6:,.0f} MB of weights, {statistics / 1e6:,.0f} MB of statistics and "
        f"activations{parts}",
    )


def search_memory(
    groups: Sequence[ActivationGroup], specs: Mapping[str, QuantSpec], device: torch.device, held: int
) -> StageMemory:
    """Return what the groups that are solved at a time hold.

    Small ones are solved in parallel, several of one shape at once, a large one while its successor is read.

    Args:
        groups: those to search.
        specs: number formats by site.
        device: where.
        held: bytes of this process already.
    """
    workers = workers_on(device)
    small = small_groups(groups, device)
    costs = {batch[0]: len(batch) * group_memory(groups[batch[0]], device) for batch in batches(groups, specs, device)}
    together = sorted((cost for place, cost in costs.items() if place in set(small)), reverse=True)[:workers]
    large = max((cost for place, cost in costs.items() if place not in set(small)), default=0)
    largest = groups[max(costs, key=costs.__getitem__)].sites[0].name
    several = f", {workers} small ones at a time" if small else ""
    return StageMemory(
        stage="search",
        bytes=held + max(large, sum(together)),
        holds=f"the largest group is that of {largest}{several}",
    )


def export_memory(groups: Sequence[ActivationGroup], specs: Mapping[str, QuantSpec], held: int) -> StageMemory:
    """Return what writing and checking hold: one tensor at a time, then a partition of the output, then each site.

    Args:
        groups: those that were quantized.
        specs: number formats by site.
        held: bytes of this process already.
    """
    sites = [site for group in groups for site in group.sites]
    stored = [specs[site.name].format_bytes(site.out_features, site.in_features) for site in sites]
    run = _REPACKED * max(min(sum(stored), _PARTITION), max(stored))
    checked = _CHECKED * sum(sorted(site.in_features * site.out_features for site in sites)[-CHECKED_AT_ONCE:])
    return StageMemory(
        stage="export",
        bytes=held + max(run, checked),
        holds="the output runs in parts to be checked (less with --verify off)",
    )


def weights_on_disk(
    groups: Sequence[ActivationGroup], specs: Mapping[str, QuantSpec], embeddings: Sequence[EmbeddingPlan]
) -> int:
    """Return the bytes of the quantized weights' folder: a byte for each code and zero point, and the scales.

    Args:
        groups: those that are searched.
        specs: the formats of their sites.
        embeddings: the tables that are quantized.
    """
    sites = sum(
        _stored(site.out_features, site.in_features, specs[site.name]) for group in groups for site in group.sites
    )
    return sites + sum(plan.table.vocabulary * plan.table.hidden for plan in embeddings if plan.shared_with is None)


def _stored(out_features: int, in_features: int, spec: QuantSpec) -> int:
    blocks = spec.num_blocks(in_features)
    each = torch_float(spec.scale_dtype).itemsize + (0 if spec.symmetric else 1)
    return out_features * (in_features + blocks * each)
