"""Hold and show what a run would do: the records of --dry_run and its tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Group

from stages.commands.tables import Column, DataTable, FactTable
from stages.quantization.targets.explain import choice_table
from stages.quantization.targets.formats import Explanation
from stages.quantization.weights.summary import format_legend, ranges
from stages.records.formats import EmbeddingPlan
from stages.records.quantities import counted, duration
from stages.records.sites import UnquantizedWeights, kind_of, layer_of, short_name

InputScalePlace = Literal["none", "norm", "linear", "value", "mul"]
_PLACES: dict[InputScalePlace, str] = {
    "none": "-",
    "norm": "into the norm",
    "linear": "into up_proj",
    "value": "into v_proj",
    "mul": "Mul node",
}
_MANY = 4
_COLUMNS = (
    Column(heading="weights"),
    Column(heading="layers", leaves=2),
    Column(heading="inputs x outputs", is_number=True, leaves=4),
    Column(heading="format"),
    Column(heading="MB before", is_number=True),
    Column(heading="MB after", is_number=True),
    Column(heading="search, s", is_number=True, leaves=3),
    Column(heading="input scale", leaves=1),
)

_SHARING_COLUMNS = (
    Column(heading="processes", is_number=True),
    Column(heading="calibrate", is_number=True),
    Column(heading="search", is_number=True),
    Column(heading="GB held, first", is_number=True),
    Column(heading="others", is_number=True),
    Column(heading="GB read", is_number=True),
    Column(heading="GB written", is_number=True),
    Column(heading="GB sent", is_number=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewedSite:
    """One MatMul or Gemm."""

    name: str
    in_features: int
    out_features: int
    format: str
    """The QuantSpec's label, or keep."""
    formats: tuple[str, ...]
    """All that it may still become, where a budget isn't allocated yet; else empty."""
    bits: int | None
    """4 or 8; None where it stays as it is."""
    block_size: int | None
    """Inputs that share a scale."""
    zero_point: bool
    why: str
    """Why it stays as it is, or which option gave it its format; often nothing."""
    bytes_before: int
    bytes_after: int
    """Codes, scales and zero points, or the weight as it is."""
    input_scale: InputScalePlace
    """Where the search's input scale goes: none where the algorithm has none."""
    input_scale_into: str
    """The norm's output or the site that takes it."""
    input_scale_why: str
    """Why a Mul remains."""
    seconds: float
    """Of the search; sites of one activation share it by their size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """The most that one stage holds at once."""

    stage: str
    bytes: int
    holds: str
    """What most of it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskUse:
    """Bytes that the stages leave on the disk, beside the base."""

    calibration: int
    """0 where none is made."""
    weights: int
    """Of the quantized weights' folder: a byte a code."""
    output: int
    meanwhile: int = 0
    """Of what stage one removes again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchEstimate:
    """How long the search takes."""

    seconds: float
    device: str
    groups: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedRun:
    """What a run takes that several processes share, each on a machine like this one."""

    processes: int
    calibrate_seconds: float | None
    """None where none is made, or where its samples' sizes aren't known."""
    search_seconds: float
    """Of the process whose share is largest."""
    memory_first: int
    """The most that the first process holds, which does alone what can't be shared."""
    memory_others: int | None
    """None where there are no others."""
    read: int
    """Bytes that all together read from the folders that they share."""
    written: int
    sent: int
    """Bytes that they send one another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """Everything that is known beforehand."""

    base: Path
    output: Path
    recipe: str
    sites: tuple[PreviewedSite, ...]
    unquantizable: tuple[tuple[str, str], ...]
    """(node, why) for MatMul and Gemm nodes that are no sites."""
    embeddings: tuple[EmbeddingPlan, ...]
    unreached: tuple[UnquantizedWeights, ...]
    bits_per_weight: float
    """Codes, scales and zero points, over the sites that are quantized."""
    bytes_before: int
    bytes_after: int
    """The .onnx file and its external data."""
    memory: tuple[StageMemory, ...]
    disk: DiskUse
    search: SearchEstimate
    unspent: int | None
    """Bytes of a ``--target_size`` that can't be spent yet; ``sites`` have their smallest formats."""
    sharing: tuple[SharedRun, ...]
    """For a few numbers of processes; the first is one."""
    obstacles: tuple[str, ...]
    """What would stop the run as things are."""
    notes: tuple[str, ...]
    target: str
    """As it is typed, or any."""
    target_because: str
    """Why, where the base model decided about it."""
    formats: tuple[Explanation, ...]
    """What the target decided, and why."""


def preview_table(preview: Preview) -> Group:
    """Return what the target decided, the sites by kind, format and input scale, and what concerns the whole model."""
    decided = [choice_table(preview.target, preview.formats)] if preview.formats else []
    return Group(*decided, _sites(preview), _whole(preview), _sharing(preview))


def _sites(preview: Preview) -> DataTable:
    labels = (label for site in preview.sites for label in (site.formats or (site.format,)))
    scales = any(site.input_scale != "none" for site in preview.sites)
    legend = "Input scale: where the search's scale of a weight's input goes; a Mul node costs time." if scales else ""
    return DataTable(
        title=f"{preview.recipe}: what would be done (--dry_run; nothing was)",
        columns=_COLUMNS,
        rows=tuple(map(_row, _grouped(preview.sites))),
        notes=tuple(filter(None, (format_legend(labels), legend))),
    )


def _grouped(sites: Sequence[PreviewedSite]) -> list[list[PreviewedSite]]:
    """Return the sites grouped so that those of a group differ only in their layer, kinds in graph order."""
    found: dict[tuple[object, ...], list[PreviewedSite]] = {}
    order: dict[str, int] = {}
    for site in sites:
        kind = kind_of(site.name)
        order.setdefault(kind, len(order))
        size = (site.in_features, site.out_features)
        key = (kind, size, site.format, site.formats, site.why, site.input_scale, site.input_scale_why)
        found.setdefault(key, []).append(site)
    return sorted(found.values(), key=lambda members: order[kind_of(members[0].name)])


def _row(members: list[PreviewedSite]) -> tuple[str, ...]:
    first = members[0]
    layers = sorted({layer for site in members if (layer := layer_of(site.name)) is not None})
    seconds = sum(site.seconds for site in members)
    return (
        f"{len(members)} x {kind_of(first.name)}",
        ranges(layers),
        f"{first.in_features} x {first.out_features}",
        _format(first),
        f"{sum(site.bytes_before for site in members) / 1e6:,.1f}",
        f"{sum(site.bytes_after for site in members) / 1e6:,.1f}",
        f"{seconds:,.1f}" if first.bits is not None else "-",
        f"Mul node: {first.input_scale_why}" if first.input_scale == "mul" else _PLACES[first.input_scale],
    )


def _format(site: PreviewedSite) -> str:
    return f"{' / '.join(site.formats) or site.format}{f' ({site.why})' if site.why else ''}"


def _sharing(preview: Preview) -> DataTable:
    def row(run: SharedRun) -> tuple[str, ...]:
        others = "-" if run.memory_others is None else f"{run.memory_others / 1e9:,.1f}"
        moved = (f"{size / 1e9:,.1f}" for size in (run.read, run.written, run.sent))
        calibrate = "-" if run.calibrate_seconds is None else duration(run.calibrate_seconds)
        memory = f"{run.memory_first / 1e9:,.1f}"
        return f"{run.processes}", calibrate, duration(run.search_seconds), memory, others, *moved

    return DataTable(
        title="shared by processes (accelerate launch), each on a machine like this one",
        columns=_SHARING_COLUMNS,
        rows=tuple(map(row, preview.sharing)),
        notes=(
            "Read and written: in the folders that all share, by all together. Sent: from process to process.",
            "The first process alone chooses formats and writes the output; neither has an estimate of time.",
        ),
    )


def _whole(preview: Preview) -> FactTable:
    return FactTable(title=f"{preview.base} -> {preview.output}", facts=tuple(_lines(preview)))


def _lines(preview: Preview) -> Iterator[tuple[str, str]]:
    if preview.target_because:
        yield "target", f"{preview.target}: {preview.target_because}; choose another with --target"
    before, after = preview.bytes_before / 1e6, preview.bytes_after / 1e6
    if preview.unspent is None:
        yield "size", f"{before:,.1f} MB -> about {after:,.1f} MB"
    else:
        yield (
            "size",
            f"{before:,.1f} MB -> at most {preview.unspent / 1e6:,.1f} MB, once there are statistics to spend it by",
        )
    yield "bits", f"{preview.bits_per_weight:.3f} a weight of the quantized MatMuls; embeddings aren't counted"
    for plan in preview.embeddings:
        shared = "" if plan.shared_with is None else f", shared with {plan.shared_with}"
        yield "embedding", f"{plan.table.weight}: {plan.label}, {plan.format_bytes / 1e6:,.1f} MB{shared}"
    for part in preview.unreached:
        yield "stays", part.description
    yield from _staying(preview.unquantizable)
    estimate = preview.search
    yield (
        "search",
        f"about {duration(estimate.seconds)} for {counted(estimate.groups, 'group')} on {estimate.device}: "
        "an estimate, from a group of each shape that this device has just searched",
    )
    for memory in preview.memory:
        yield f"memory, {memory.stage}", f"about {memory.bytes / 1e6:,.0f} MB at most: {memory.holds}"
    disk = preview.disk
    parts = {"calibration": disk.calibration, "quantized weights": disk.weights, "output": disk.output}
    kept = ", ".join(f"{size / 1e6:,.0f} MB {name}" for name, size in parts.items() if size)
    meanwhile = f"; {disk.meanwhile / 1e6:,.0f} MB more while it calibrates" if disk.meanwhile else ""
    yield "disk", f"about {sum(parts.values()) / 1e6:,.0f} MB: {kept}{meanwhile}"
    for note in preview.notes:
        yield "note", note
    for obstacle in preview.obstacles:
        yield "not yet", obstacle


def _staying(nodes: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for reason, count in Counter(why for _, why in nodes).items():
        names = [short_name(name) for name, why in nodes if why == reason]
        more = f" and {count - _MANY} more" if count > _MANY else ""
        yield "stays", f"{count} x {reason}: {', '.join(names[:_MANY])}{more}"
