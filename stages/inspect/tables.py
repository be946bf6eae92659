"""Show the reports of stages.inspect as tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stages.evaluation.bench.results import results_table
from stages.inspect.artifacts import CacheReport, SweepReport, WeightsReport
from stages.inspect.float_weights import general_kind, is_float
from stages.inspect.model import ModelReport
from stages.inspect.quantized_weights import StoredWeight
from stages.quantization.weights.summary import ranges
from stages.records.sites import layer_of

_FEW = 3
_SMALL = 0.005
"""Share of all bytes below which unquantized tensors are one row together."""


class _Format(NamedTuple):
    """What the weights of one row have in common."""

    kind: str
    form: str
    codes: str
    grouping: str
    zero_point: bool
    scales: str
    activations: str
    level: int | None


def model_table(report: ModelReport) -> RenderableType:
    """Return quantized weights by kind and format, the other tensors, and facts about the whole model."""
    parts: list[RenderableType] = [_quantized(report)] if report.quantized else []
    return Group(*parts, _unquantized(report), _facts(str(report.onnx_file), _model_facts(report)))


def _quantized(report: ModelReport) -> Table:
    table = _open_table(
        "quantized weights", ("weights", "layers", "operators", "codes", "scale per", "zero point", "scales")
    )
    for name in ("bits a weight", "MB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("activations", overflow="fold")
    rows: dict[_Format, list[StoredWeight]] = {}
    for weight in report.quantized:
        rows.setdefault(_format_of(weight), []).append(weight)
    shown: set[tuple[str, ...]] = set()
    for row, members in rows.items():
        shared = shown.issuperset(each.initializers for each in members)
        shown.update(each.initializers for each in members)
        layers = sorted({layer for each in members if (layer := layer_of(each.node)) is not None})
        bits = 8 * sum(each.bytes for each in members) / max(sum(each.weights for each in members), 1)
        level = "" if row.level is None else f", accuracy level {row.level}"
        cells = (
            f"{len(members)} x {row.kind}",
            ranges(layers),
            row.form,
            row.codes,
            row.grouping,
            "yes" if row.zero_point else "no",
            row.scales.lower(),
            f"{bits:.3f}",
            "shared" if shared else _megabytes(sum({each.initializers: each.bytes for each in members}.values())),
            f"{row.activations}{level}",
        )
        table.add_row(*map(Text, cells))
    return table


def _format_of(weight: StoredWeight) -> _Format:
    per_what = {"block": f"{weight.block_size} inputs", "channel": "channel", "tensor": "weight"}
    return _Format(
        kind=general_kind(weight.node),
        form=weight.form,
        codes=weight.codes,
        grouping=per_what[weight.grouping],
        zero_point=weight.zero_point,
        scales=weight.scales,
        activations=weight.activations,
        level=weight.accuracy_level,
    )


def _unquantized(report: ModelReport) -> Table:
    total = sum(each.bytes for each in report.left) + report.quantized_bytes
    table = _open_table("tensors that are not quantized", ("read by", "kind", "type"))
    for name in ("tensors", "MB", "of all"):
        table.add_column(name, justify="right", no_wrap=True)
    large = [each for each in report.left if each.bytes >= _SMALL * total]
    small = [each for each in report.left if each.bytes < _SMALL * total]
    for each in large:
        cells = (each.reader or "-", each.kind, each.type.lower(), str(each.count), *_size_and_part(each.bytes, total))
        table.add_row(*map(Text, cells))
    if small:
        size = sum(each.bytes for each in small)
        count = str(sum(each.count for each in small))
        table.add_row("...", "norms, biases and other small tensors", "", count, *_size_and_part(size, total))
    return table


def _size_and_part(size: int, total: int) -> tuple[str, str]:
    return _megabytes(size), f"{size / max(total, 1):.1%}"


def _model_facts(report: ModelReport) -> Iterator[tuple[str, str]]:
    yield "made by", report.producer or "unknown"
    opsets = ", ".join(f"{name} {version}" for name, version in report.opsets.items())
    yield "graph", f"{report.nodes} nodes, opset {opsets}, IR {report.ir_version}"
    yield from _sizes(report)
    if report.open is not None:
        open_sites = report.open
        yield (
            "not quantized",
            f"{_counted(open_sites.matmuls, 'MatMul')} on {_counted(open_sites.activations, 'activation')}, "
            f"{_megabytes(open_sites.weights)} million weights, could be: stages.quantize --dry_run says how",
        )
    yield from _fusion(report)
    if report.input_scales:
        first = report.input_scales[0]
        yield "input scales", f"{_counted(len(report.input_scales), 'Mul node')} before MatMuls, such as {first.node}"
    for answer in report.runtimes:
        for sentence in answer.objections or ("no known problem",):
            yield answer.runtime, sentence
    yield from _files(report)
    yield from _configuration(report)


def _sizes(report: ModelReport) -> Iterator[tuple[str, str]]:
    floats = sum(each.bytes for each in report.left if is_float(each))
    weights = sum({each.initializers: each.weights for each in report.quantized}.values())
    if not weights:
        yield "quantized", "nothing: this is a base model"
        return
    bits = 8 * report.quantized_bytes / weights
    yield (
        "quantized",
        f"{_megabytes(weights)} million weights in {_megabytes(report.quantized_bytes)} MB: {bits:.3f} bits a weight; "
        f"{_megabytes(floats)} MB are floating point",
    )


def _fusion(report: ModelReport) -> Iterator[tuple[str, str]]:
    for group in report.fused_on:
        fused = [_span(each.first, each.last) for each in group.spans if each.fused]
        refusals = [f"{_span(each.first, each.last)}: {each.why_not}" for each in group.spans if not each.fused]
        never = len(group.spans) == 1 and not fused
        answer = f"fused by ONNX Runtime {', '.join(fused)} (CPU)" if fused else "never fused"
        reasons = f"; not by {'; '.join(refusals)}" if refusals and not never else ""
        reason = f": {group.spans[0].why_not}" if never else ""
        yield (
            "DequantizeLinear",
            f"{_counted(len(group.sites), 'site')} {answer}{reason}{reasons} ({_named(group.sites)})",
        )


def _span(first: str, last: str) -> str:
    return first if first == last else f"{first} to {last}"


def _files(report: ModelReport) -> Iterator[tuple[str, str]]:
    yield "graph file", f"{report.files.onnx_bytes:,} bytes"
    for file in report.files.data:
        if file.file_bytes is None:
            yield "data file", f"{file.path.name} is MISSING; {file.referenced_bytes:,} bytes of it are needed"
            continue
        orphans = f", {file.orphan_bytes:,} belong to no tensor" if file.orphan_bytes else ", none unused"
        used = f"{file.referenced_bytes:,} in tensors, {file.padding_bytes:,} padding{orphans}"
        broken = f"; TRUNCATED: {file.beyond} ends after it" if file.beyond else ""
        yield "data file", f"{file.path.name}, {file.file_bytes:,} bytes: {used}{broken}"
    for name, size in report.files.unread:
        yield "unused file", f"{name}, {size:,} bytes: the graph doesn't refer to it"


def _configuration(report: ModelReport) -> Iterator[tuple[str, str]]:
    found = report.configuration
    if not found.present:
        yield "genai_config", "missing: onnxruntime-genai can't load this folder"
    else:
        layers = "" if found.layers is None else f", {found.layers} layers"
        context = "" if found.context_length is None else f", context {found.context_length}"
        yield "genai_config", f"{found.model_type or 'no type'}{layers}{context}"
        for key, value in found.session_options:
            yield "", f"{key} = {value}"
        if found.providers:
            yield "", f"providers: {', '.join(found.providers)}"
        for conflict in found.conflicts:
            yield "CONFLICT", conflict
    yield "tokenizer", found.tokenizer or "missing"


def cache_table(report: CacheReport) -> RenderableType:
    """Return facts about a calibration cache."""
    return _facts(str(report.folder), _cache_facts(report))


def _cache_facts(report: CacheReport) -> Iterator[tuple[str, str]]:
    yield "is", "a calibration cache: the statistics that stages.quantize searches with"
    yield "size", f"{report.bytes / 1e6:,.1f} MB"
    yield "made from", report.made_from
    yield "text", report.source
    windows = f"{report.calibration_windows} to search with, {report.held_out_windows} held out"
    yield "windows", f"{windows}, {report.seq_len} tokens each"
    yield "ran on", ", ".join(report.providers)
    widths = ", ".join(f"{count} x {width}" for width, count in report.widths)
    rows = f"; {report.as_rows} kept as rows of tokens" if report.as_rows else ""
    yield "activations", f"{report.activations}, by channels: {widths}{rows}"
    if report.forecasts:
        yield "budgets", f"the errors of {report.forecasts} sites are forecast, so another budget starts at once"
    if report.files:
        yield "other files", ", ".join(report.files)
    for sentence in report.damaged:
        yield "DAMAGED", sentence


def weights_table(report: WeightsReport, details: RenderableType | None) -> RenderableType:
    """Return facts about quantized weights, and ``details``, the table of the search, where a group is finished."""
    facts = _facts(str(report.folder), _weights_facts(report))
    return facts if details is None else Group(facts, details)


def _weights_facts(report: WeightsReport) -> Iterator[tuple[str, str]]:
    yield "is", "quantized weights: python -m export writes them into the base model"
    yield "recipe", report.recipe
    yield "size", f"{report.bytes / 1e6:,.1f} MB (codes unpacked)"
    missing = report.groups - report.finished
    state = f"{missing} to go: run the same command of stages.quantize again" if missing else "complete"
    yield "groups", f"{report.finished} of {report.groups} finished; {state}"
    if report.bits_per_weight is not None:
        yield "bits", f"{report.bits_per_weight:.3f} a weight"
    scales = "folded where the graph allows it" if report.folds_input_scales else "kept as Mul nodes"
    yield "written as", f"{report.weight_form.value}; input scales {scales}"
    if report.embeddings:
        yield "embeddings", str(report.embeddings)
    for name, why in report.kept[:_FEW]:
        yield "not quantized", f"{name}: {why}"
    if len(report.kept) > _FEW:
        yield "not quantized", f"and {len(report.kept) - _FEW} more"
    if report.files:
        yield "other files", ", ".join(report.files)


def sweep_table(report: SweepReport) -> RenderableType:
    """Return a table for each text, and facts about the folder of measured models."""
    named = (replace(each, text=None if each.text is None else f"text {each.text}") for each in report.texts)
    tables = [results_table(each) for each in named]
    return Group(*tables, _facts(str(report.folder), _sweep_facts(report)))


def _sweep_facts(report: SweepReport) -> Iterator[tuple[str, str]]:
    models = report.texts[0].models
    yield "is", "a sweep or comparison: nothing beats a model with * in both bytes and loss"
    yield "models", f"{len(models)}, of which {report.failed} failed"
    if report.deleted:
        yield "deleted", f"{len(report.deleted)}, but their records are here: {_named(report.deleted)}"


def _open_table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _facts(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(title=Text(title), title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        # Text, because a node name with brackets is not markup.
        table.add_row(name, Text(text))
    return table


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _megabytes(size: int) -> str:
    """Millions, with enough digits for small models."""
    return f"{size / 1e6:,.1f}" if size >= 1_000_000 else f"{size / 1e6:.3f}"


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return f"{', '.join(names[:_FEW])}{more}"
