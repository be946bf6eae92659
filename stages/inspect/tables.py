"""Show the reports of stages.inspect as tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from rich.console import Group, RenderableType

from export.card.record import ModelRecord
from stages.commands.output import as_called
from stages.commands.parsing import Runtime
from stages.commands.tables import Column, DataTable, FactTable
from stages.evaluation.bench.results import results_table
from stages.inspect.artifacts import CacheReport, SweepReport, WeightsReport
from stages.inspect.float_weights import general_kind, is_float
from stages.inspect.model import ModelReport
from stages.inspect.quantized_weights import StoredWeight
from stages.inspect.runtimes import RuntimeAnswer
from stages.quantization.weights.summary import ranges
from stages.records.quantities import counted
from stages.records.sites import layer_of

_FEW = 3
_SMALL = 0.005
"""Share of all bytes below which unquantized tensors are one row together."""

_QUANTIZED = (
    Column(heading="weights"),
    Column(heading="layers", leaves=3),
    Column(heading="codes"),
    Column(heading="scale per", leaves=6),
    Column(heading="zero point", leaves=5),
    Column(heading="scales", leaves=2),
    Column(heading="bits a weight", is_number=True),
    Column(heading="MB", is_number=True),
    Column(heading="operators", leaves=4),
    Column(heading="activations", leaves=1),
)
_NOT_QUANTIZED = (
    Column(heading="read by"),
    Column(heading="kind"),
    Column(heading="type"),
    Column(heading="tensors", is_number=True),
    Column(heading="MB", is_number=True),
    Column(heading="of all", is_number=True),
)


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


def model_table(report: ModelReport, program: str = "", *, every_runtime: bool = True) -> RenderableType:
    """Return quantized weights by kind and format, the other tensors, and facts about the whole model.

    Args:
        report: the model's.
        program: what people typed: our commands are spelled in the same way.
        every_runtime: say what each runtime has against the formats, also where the model was made for one of them.
    """
    parts: list[RenderableType] = [_quantized(report)] if report.quantized else []
    facts = _model_facts(report, None if every_runtime else report.made_for)
    return Group(*parts, _unquantized(report), _facts(str(report.onnx_file), facts, program))


def _quantized(report: ModelReport) -> DataTable:
    rows: dict[_Format, list[StoredWeight]] = {}
    for weight in report.quantized:
        rows.setdefault(_format_of(weight), []).append(weight)
    repeated = _repeated(rows)
    return DataTable(
        title="quantized weights",
        columns=_QUANTIZED,
        rows=tuple(_quantized_row(row, members, repeated=row in repeated) for row, members in rows.items()),
    )


def _repeated(rows: dict[_Format, list[StoredWeight]]) -> set[_Format]:
    """Return the rows all of whose weights stand in rows before them: an lm_head that the embedding shares."""
    shown, found = set[tuple[str, ...]](), set[_Format]()
    for row, members in rows.items():
        stored = {each.initializers for each in members}
        found |= {row} if stored <= shown else set()
        shown |= stored
    return found


def _quantized_row(row: _Format, members: list[StoredWeight], *, repeated: bool) -> tuple[str, ...]:
    layers = sorted({layer for each in members if (layer := layer_of(each.node)) is not None})
    bits = 8 * sum(each.bytes for each in members) / max(sum(each.weights for each in members), 1)
    level = "" if row.level is None else f", accuracy level {row.level}"
    return (
        f"{len(members)} x {row.kind}",
        ranges(layers),
        row.codes,
        row.grouping,
        "yes" if row.zero_point else "no",
        row.scales.lower(),
        f"{bits:.3f}",
        "shared" if repeated else _megabytes(sum({each.initializers: each.bytes for each in members}.values())),
        row.form,
        f"{row.activations}{level}",
    )


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


def _unquantized(report: ModelReport) -> DataTable:
    total = sum(each.bytes for each in report.left) + report.quantized_bytes
    large = [each for each in report.left if each.bytes >= _SMALL * total]
    small = [each for each in report.left if each.bytes < _SMALL * total]
    rows = [
        (each.reader or "-", each.kind, each.type.lower(), str(each.count), *_size_and_part(each.bytes, total))
        for each in large
    ]
    if small:
        size = sum(each.bytes for each in small)
        count = str(sum(each.count for each in small))
        rows.append(("...", "norms, biases and other small tensors", "", count, *_size_and_part(size, total)))
    return DataTable(title="tensors that are not quantized", columns=_NOT_QUANTIZED, rows=tuple(rows))


def _size_and_part(size: int, total: int) -> tuple[str, str]:
    return _megabytes(size), f"{size / max(total, 1):.1%}"


def _model_facts(report: ModelReport, only: Runtime | None) -> Iterator[tuple[str, str]]:
    yield "made by", report.producer or "unknown"
    if report.record is not None:
        yield from _record(report.record)
    opsets = ", ".join(f"{name} {version}" for name, version in report.opsets.items())
    yield "graph", f"{counted(report.nodes, 'node')}, opset {opsets}, IR {report.ir_version}"
    yield from _sizes(report)
    if report.open is not None:
        open_sites = report.open
        yield (
            "not quantized",
            f"{counted(open_sites.matmuls, 'MatMul')} on {counted(open_sites.activations, 'activation')}, "
            f"{f'{open_sites.experts} matrices of experts, ' if open_sites.experts else ''}"
            f"{_megabytes(open_sites.weights)} million weights, could be: stages.quantize --dry_run says how",
        )
    yield from _fusion(report)
    if report.input_scales:
        first = report.input_scales[0]
        yield "input scales", f"{counted(len(report.input_scales), 'Mul node')} before MatMuls, such as {first.node}"
    yield from _runtimes(report.runtimes, only)
    yield from _files(report)
    yield from _configuration(report)


def _runtimes(answers: Sequence[RuntimeAnswer], only: Runtime | None) -> Iterator[tuple[str, str]]:
    """Yield what runtimes have against the formats; of all but ``only``, unless that is None, just whether."""
    others = [answer for answer in answers if only not in (None, answer.runtime.partition("@")[0])]
    for answer in answers:
        if answer not in others:
            for sentence in answer.objections or ("no known problem",):
                yield answer.runtime, sentence
    if troubled := [answer.runtime for answer in others if answer.objections]:
        yield "other runtimes", f"not made for them; --verbose says what slows {', '.join(troubled)}"


def _record(record: ModelRecord) -> Iterator[tuple[str, str]]:
    """Yield what genai_quant.json knows and the graph doesn't."""
    command = record.export_command if record.origin is None else record.origin.command
    yield "made from", f"{record.base.name}: {command or record.algorithm}"
    if record.evaluation is not None:
        scores = [
            f"{text.text}: KL {text.divergence:.4f}, same top-1 {text.same_top1:.1%}"
            for text in record.evaluation.texts
        ]
        yield "accuracy", "; ".join(scores)


def _sizes(report: ModelReport) -> Iterator[tuple[str, str]]:
    floats = sum(each.bytes for each in report.left if is_float(each))
    weights = sum({each.initializers: each.weights for each in report.quantized}.values())
    if not weights:
        yield "quantized", "nothing: this is a base model"
        return
    bits = 8 * report.quantized_bytes / weights
    yield (
        "quantized",
        f"{_megabytes(weights)} million weights in {_megabytes(report.quantized_bytes)} MB: {bits:.3f} bits a "
        f"weight, quantized embeddings included; {_megabytes(floats)} MB are floating point",
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
            f"{counted(len(group.sites), 'site')} {answer}{reason}{reasons} ({_named(group.sites)})",
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
        layers = "" if found.layers is None else f", {counted(found.layers, 'layer')}"
        context = "" if found.context_length is None else f", context {found.context_length}"
        yield "genai_config", f"{found.model_type or 'no type'}{layers}{context}"
        for key, value in found.session_options:
            yield "", f"{key} = {value}"
        if found.providers:
            yield "", f"providers: {', '.join(found.providers)}"
        for conflict in found.conflicts:
            yield "CONFLICT", conflict
    yield "tokenizer", found.tokenizer or "missing"


def cache_table(report: CacheReport, program: str = "") -> RenderableType:
    """Return facts about a calibration cache; our commands are spelled as people typed ``program``."""
    return _facts(str(report.folder), _cache_facts(report), program)


def _cache_facts(report: CacheReport) -> Iterator[tuple[str, str]]:
    yield "is", "a calibration cache: the statistics that stages.quantize searches with"
    yield "size", f"{report.bytes / 1e6:,.1f} MB"
    yield "made from", report.made_from
    yield ("from" if report.seq_len is None else "text"), report.source
    windows = f"{report.calibration_windows} to search with, {report.held_out_windows} held out"
    if report.seq_len is None:
        yield "samples", windows
    else:
        yield "windows", f"{windows}, {counted(report.seq_len, 'token')} each"
    yield "ran on", ", ".join(report.providers)
    widths = ", ".join(f"{count} x {width}" for width, count in report.widths)
    rows = f"; {report.as_rows} kept as rows of tokens" if report.as_rows else ""
    yield "activations", f"{report.activations}, by channels: {widths}{rows}"
    if report.forecasts:
        forecast = counted(report.forecasts, "site")
        yield "budgets", f"the errors of {forecast} are forecast, so another budget starts at once"
    if report.files:
        yield "other files", ", ".join(report.files)
    for sentence in report.damaged:
        yield "DAMAGED", sentence


def weights_table(report: WeightsReport, details: RenderableType | None, program: str = "") -> RenderableType:
    """Return facts about quantized weights, and the table of the search.

    Args:
        report: the weights'.
        details: that table; None where no group is finished.
        program: what people typed: our commands are spelled in the same way.
    """
    facts = _facts(str(report.folder), _weights_facts(report), program)
    return facts if details is None else Group(facts, details)


def _weights_facts(report: WeightsReport) -> Iterator[tuple[str, str]]:
    yield "is", "quantized weights: python -m export writes them into the base model"
    yield "recipe", report.recipe
    yield "size", f"{report.bytes / 1e6:,.1f} MB (codes unpacked)"
    missing = report.groups - report.finished
    state = f"{missing} to go: run the same command of stages.quantize again" if missing else "complete"
    yield "groups", f"{report.finished} of {report.groups} finished; {state}"
    if report.bits_per_weight is not None:
        yield "bits", f"{report.bits_per_weight:.3f} a weight of the quantized MatMuls; embeddings aren't counted"
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


def _facts(title: str, rows: Iterable[tuple[str, str]], program: str = "") -> FactTable:
    return FactTable(title=title, facts=tuple((name, as_called(text, program)) for name, text in rows))


def _megabytes(size: int) -> str:
    """Millions, with enough digits for small models."""
    return f"{size / 1e6:,.1f}" if size >= 1_000_000 else f"{size / 1e6:.3f}"


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return f"{', '.join(names[:_FEW])}{more}"
