"""Show what an export wrote, what runs fused, and what to look at, as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from export.fold import FoldOutcome, How
from export.forms.embedding import TableOutcome
from export.run import ExportSummary
from export.verify.fusion import runtime_version
from stages.commands.tables import FactTable
from stages.records.quantities import counted
from stages.records.results import VerifyReport
from stages.runtime.cpu.norms import NORMS_REASON
from stages.runtime.cpu.upcast import UPCAST_REASON
from stages.system.paths import from_here

_PLACES: dict[How, str] = {
    "norm": "in norms",
    "linear": "in up projections",
    "value": "in value projections",
    "mul": "as Mul nodes",
}
_SHOWN = 3


def export_table(summary: ExportSummary) -> FactTable:
    """Return a two-column table of the summary; reasons are counted, so it stays short for any model."""
    facts = [
        ("size", _sizes(summary)),
        *_folder(summary),
        *_embeddings(summary.tables),
        *_folds(summary.folds),
        *_kept(summary),
        *_checks(summary.report),
    ]
    facts += [("note", note) for note in summary.notes]
    return FactTable(title=f"written to {from_here(summary.onnx_file)}", facts=tuple(facts))


def _sizes(summary: ExportSummary) -> str:
    before, after = summary.bytes_before / 1e6, summary.bytes_after / 1e6
    change = f"{before / after:.2f}x smaller" if after < before else f"{after / before:.2f}x larger"
    return f"{before:,.1f} MB -> {after:,.1f} MB ({change})"


def _folder(summary: ExportSummary) -> Iterator[tuple[str, str]]:
    if summary.folder_bytes is not None:
        beside = (summary.folder_bytes - summary.bytes_after) / 1e6
        whole = f"{summary.folder_bytes / 1e6:,.1f} MB in all files"
        yield "folder", f"{whole}, {beside:,.1f} MB of it beside the model (tokenizer, other components)"


def _embeddings(tables: tuple[TableOutcome, ...]) -> Iterator[tuple[str, str]]:
    for table in tables:
        before, after = table.bytes_before / 1e6, table.bytes_after / 1e6
        form, shared = table.plan.label, table.plan.shared_with
        if shared is not None:
            size = f"{form}, one table of {after:,.1f} MB for it and {shared} in place of {before:,.1f} MB"
        elif table.still_read_by:
            size = (
                f"{form}, {after:,.1f} MB beside the original's {before:,.1f} MB, which stays because "
                f"{', '.join(table.still_read_by)} reads it too"
            )
        else:
            size = f"{form}, {before:,.1f} MB -> {after:,.1f} MB"
        yield "embedding", size
        if table.plan.form == "dq":
            yield "", "ONNX Runtime dequantizes this whole table for every token (--gather_form dq)"


def _folds(folds: tuple[FoldOutcome, ...]) -> Iterator[tuple[str, str]]:
    counts = Counter(outcome.how for outcome in folds)
    placed = [f"{counts[how]} {place}" for how, place in _PLACES.items() if counts[how]]
    if placed:
        yield "input scales", ", ".join(placed)
    reasons = Counter(outcome.reason for outcome in folds if outcome.how == "mul")
    for reason, count in reasons.most_common(_SHOWN):
        yield "Mul, because", f"{count} x {reason}"
    if len(reasons) > _SHOWN:
        yield "Mul, because", f"... and {len(reasons) - _SHOWN} more reasons"


def _kept(summary: ExportSummary) -> Iterator[tuple[str, str]]:
    yield from _named("kept as it was", summary.kept)
    for part in summary.unreached:
        yield "kept as it was", part.description


def _checks(report: VerifyReport | None) -> Iterator[tuple[str, str]]:
    if report is None:
        yield "verified", "no (--verify off)"
        return
    if report.fused is not None:
        major, minor = runtime_version()
        here = f"on this machine's {report.provider} with ONNX Runtime {major}.{minor}"
        yield "fused", f"{report.fused} of {counted(report.sites, 'site')} run as MatMulNBits {here}"
    if report.widened:
        yield "ran", UPCAST_REASON
    if report.norms_written_out:
        yield "ran", NORMS_REASON
    # verification.json names every site.
    yield from _named("not fused", [(unfused.site, unfused.reason) for unfused in report.unfused])
    if report.worst_exact is not None and report.worst_default is not None:
        exact, default = report.worst_exact, report.worst_default
        yield "outputs", f"as the stored numbers give them, within {exact.exact:.1e} at accuracy level 1 ({exact.site})"
        yield "", f"and within {default.default:.1e} at the runtime's default level ({default.site})"
        yield "", "a check of the file and the runtime; what quantization costs is measured by an evaluation"
    yield from _tables_and_experts(report)
    if (data := report.data) is not None:
        used = f"{data.referenced_bytes:,} in tensors, {data.padding_bytes:,} padding"
        yield "data file", f"{data.file_bytes:,} bytes: {used}"
    for skipped in report.skipped:
        yield "not checked", skipped


def _tables_and_experts(report: VerifyReport) -> Iterator[tuple[str, str]]:
    for table in report.tables:
        yield "lookups", f"as the stored numbers give them, within {table.error:.1e} ({table.table})"
    if report.rotary:
        furthest = max(report.rotary, key=lambda table: table.error)
        tables = f"{counted(len(report.rotary), 'table')} computed when the model is loaded, as stored in the base"
        yield "rotary", f"{tables} within {furthest.error:.1e} ({furthest.table})"
    if report.experts:
        worst = max(report.experts, key=lambda each: each.error)
        experts, nodes = sum(each.experts for each in report.experts), counted(len(report.experts), "QMoE node")
        where = f"expert {worst.worst} of {worst.node}"
        yield (
            "experts",
            f"{experts} in {nodes}, each as its stored numbers give it, within {worst.error:.1e} ({where})",
        )


def _named(row: str, sites: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield each reason of (site, reason) with the first sites that it holds for."""
    by_reason: dict[str, list[str]] = {}
    for site, reason in sites:
        by_reason.setdefault(reason, []).append(site)
    for reason, names in by_reason.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        yield row, f"{len(names)} x {reason}: {', '.join(names[:_SHOWN])}{more}"
