"""Show a benchmark as tables that a person reads."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.table import Table

from scripts.benchmarks.figures import Benchmark, CommandFigure


def benchmark_tables(found: Benchmark) -> Iterator[Table]:
    """Yield one table for each kind of figure that was measured."""
    yield _commands(found)
    yield _rates(found)
    if found.search:
        yield _search(found)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(headings[0], overflow="fold")
    for heading in headings[1:]:
        table.add_column(heading, justify="right")
    return table


def _commands(found: Benchmark) -> Table:
    machine = found.machine
    where = machine.gpu or f"{machine.processor}, {machine.cores} cores"
    title = f"whole commands on {where}, {machine.threads} threads"
    table = _table(title, "command", "seconds", "peak MB", "against the competitor")
    peers = [command for command in found.commands if command.name.startswith("competitor")]
    for command in found.commands:
        if command.failure is not None:
            table.add_row(f"{command.name}: {command.failure}", "-", "-", "-")
            continue
        seconds = "-" if command.seconds is None else f"{command.seconds:.1f}"
        table.add_row(command.name, seconds, _megabytes(command.peak_bytes), _against(found, command, peers))
    return table


def _against(found: Benchmark, command: CommandFigure, peers: list[CommandFigure]) -> str:
    """Say how many times longer the competitor takes than calibration and this search together."""
    ours = found.seconds_of("calibrate", command.name) if command.name.startswith("quantize") else None
    theirs = peers[0].seconds if peers else None
    return "-" if ours is None or theirs is None else f"{theirs / ours:.1f} x faster, calibration included"


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.0f}"


def _rates(found: Benchmark) -> Table:
    table = _table("rates", "what", "figure")
    if (capture := found.capture) is not None:
        table.add_row(f"plain inference, {capture.provider}", f"{capture.plain:.0f} tokens/s")
        table.add_row("tapped graph", f"{capture.tapped:.0f} tokens/s")
        table.add_row("tapped graph and statistics", f"{capture.observed:.0f} tokens/s")
        table.add_row("calibration's passes against plain inference", f"{capture.ratio:.2f} x its time")
    if (writing := found.writing) is not None:
        table.add_row("export without verification", f"{writing.bytes / writing.export_seconds / 1e6:.0f} MB/s")
        table.add_row("copy of the same file", f"{writing.bytes / writing.copy_seconds / 1e6:.0f} MB/s")
    return table


def _search(found: Benchmark) -> Table:
    table = _table("search, one group of each shape", "group", "algorithm", "K", "N", "seconds", "device MB")
    for figure in found.search:
        table.add_row(
            figure.group,
            figure.algorithm,
            str(figure.in_features),
            str(figure.out_features),
            f"{figure.seconds:.2f}",
            _megabytes(figure.device_peak_bytes),
        )
    return table
