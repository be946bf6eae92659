"""Show a benchmark as tables that a person reads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from scripts.benchmarks.figures import Benchmark, CommandFigure, KernelFigure
from stages.commands.quantize_options import ROUNDED
from stages.commands.tables import Column, DataTable
from stages.records.quantities import counted

_UNCALIBRATED = tuple(f"quantize {name}" for name in ROUNDED)


def benchmark_tables(found: Benchmark) -> Iterator[DataTable]:
    """Yield one table for each kind of figure that was measured."""
    yield _commands(found)
    yield _rates(found)
    if found.search:
        yield _search(found)
    if found.kernels:
        yield _kernels(found.kernels)


def _table(title: str, headings: Sequence[str], rows: Sequence[tuple[str, ...]]) -> DataTable:
    columns = tuple(Column(heading=heading, is_number=index > 0) for index, heading in enumerate(headings))
    return DataTable(title=title, columns=columns, rows=tuple(rows))


def _commands(found: Benchmark) -> DataTable:
    machine = found.machine
    where = machine.gpu or f"{machine.processor}, {counted(machine.cores, 'core')}"
    peers = [command for command in found.commands if command.name.startswith("competitor")]
    rows = [
        (f"{command.name}: {command.failure}", "-", "-", "-", "-")
        if command.failure is not None
        else (
            command.name,
            "-" if command.seconds is None else f"{command.seconds:.1f}",
            _megabytes(command.peak_bytes),
            _against_copy(command),
            _against(found, command, peers),
        )
        for command in found.commands
    ]
    headings = ("command", "seconds", "peak MB", "against a copy", "against the competitor")
    return _table(f"whole commands on {where}, {counted(machine.threads, 'thread')}", headings, rows)


def _against_copy(command: CommandFigure) -> str:
    """Say how many times as long as a copy of the same bytes a command takes."""
    if command.seconds is None or command.copy_seconds is None:
        return "-"
    return f"{command.seconds / command.copy_seconds:.1f} x its time"


def _against(found: Benchmark, command: CommandFigure, peers: list[CommandFigure]) -> str:
    """Say how many times longer the competitor takes than this search, and than calibration where it needs one."""
    stages = (command.name,) if command.name in _UNCALIBRATED else ("calibrate", command.name)
    ours = found.seconds_of(*stages) if command.name.startswith("quantize") else None
    theirs = peers[0].seconds if peers else None
    if ours is None or theirs is None:
        return "-"
    return f"{theirs / ours:.1f} x faster" + (", calibration included" if len(stages) > 1 else "")


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.0f}"


def _rates(found: Benchmark) -> DataTable:
    rows: list[tuple[str, str]] = []
    if (capture := found.capture) is not None:
        rows.append((f"plain inference, {capture.provider}", f"{capture.plain:.0f} tokens/s"))
        rows.append(("tapped graph", f"{capture.tapped:.0f} tokens/s"))
        rows.append(("tapped graph and statistics", f"{capture.observed:.0f} tokens/s"))
        rows.append(("calibration's passes against plain inference", f"{capture.ratio:.2f} x its time"))
        if (calibrating := found.seconds_of("calibrate")) is not None and found.calibration_tokens:
            whole = calibrating * capture.plain / found.calibration_tokens
            rows.append(("calibrate, the whole command, against plain inference", f"{whole:.2f} x its time"))
    if (writing := found.writing) is not None:
        rows.append(("export without verification", f"{writing.bytes / writing.export_seconds / 1e6:.0f} MB/s"))
        rows.append(("copy of the same file", f"{writing.bytes / writing.copy_seconds / 1e6:.0f} MB/s"))
    return _table("rates", ("what", "figure"), rows)


def _search(found: Benchmark) -> DataTable:
    rows = [
        (
            figure.group,
            figure.algorithm,
            str(figure.in_features),
            str(figure.out_features),
            f"{figure.seconds:.2f}",
            _megabytes(figure.device_peak_bytes),
        )
        for figure in found.search
    ]
    headings = ("group", "algorithm", "K", "N", "seconds", "device MB")
    return _table("search, one group of each shape", headings, rows)


def _kernels(figures: Sequence[KernelFigure]) -> DataTable:
    """Lay out seconds, parts of a plain product, and how each grows with K where N grows with it."""
    parts = ("factoring", "gptq", "descent")
    rows = []
    for index, figure in enumerate(figures):
        cells = [f"{figure.product:.4f}"]
        for part in parts:
            seconds = getattr(figure, part)
            share = f" ({figure.product / seconds:.2f})"
            cells.append(f"{seconds:.4f}{share}{_growth(figures, index, part)}")
        rows.append((f"{figure.out_features} x {figure.in_features}", *cells))
    headings = ("N x K", "W G, seconds", *(f"{part} (W G by it; growth)" for part in parts))
    return _table("parts of GPTQ against one plain product", headings, rows)


def _growth(figures: Sequence[KernelFigure], index: int, part: str) -> str:
    """Return the exponent of K since the figure before, where both weights are square."""
    if index == 0:
        return ""
    before, now = figures[index - 1], figures[index]
    if before.in_features != before.out_features or now.in_features != now.out_features:
        return ""
    exponent = math.log(getattr(now, part) / getattr(before, part)) / math.log(now.in_features / before.in_features)
    return f"; K^{exponent:.1f}"
