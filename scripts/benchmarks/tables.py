"""A benchmark as tables that a person reads."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.table import Table

from scripts.benchmarks.figures import Benchmark, CommandFigure


def benchmark_tables(found: Benchmark) -> Iterator[Table]:
    """One table for each kind of figure that was measured."""
    yield _commands(found)
    yield _rates(found)
    if found.search:
        yield _search(found)
    if found.growth:
        yield _growth(found)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(headings[0], overflow="fold")
    for heading in headings[1:]:
        table.add_column(heading, justify="right")
    return table


def _commands(found: Benchmark) -> Table:
    machine = found.machine
    where = machine.gpu or f"{machine.processor}, {machine.cores} cores"
    table = _table(
        f"whole commands on {where}, {machine.threads} threads", "command", "seconds", "peak MB", "against it"
    )
    peers = [command for command in found.commands if command.name.startswith("competitor")]
    for command in found.commands:
        if command.failure is not None:
            table.add_row(f"{command.name}: {command.failure}", "-", "-", "-")
            continue
        table.add_row(command.name, _seconds(command), _megabytes(command), _against(found, command, peers))
    return table


def _against(found: Benchmark, command: CommandFigure, peers: list[CommandFigure]) -> str:
    """How many times longer the competitor takes than calibration and this search together."""
    ours = found.seconds_of("calibrate", command.name) if command.name.startswith("quantize") else None
    theirs = peers[0].seconds if peers else None
    return "-" if ours is None or theirs is None else f"{theirs / ours:.1f} x faster, calibration included"


def _seconds(command: CommandFigure) -> str:
    return "-" if command.seconds is None else f"{command.seconds:.1f}"


def _megabytes(command: CommandFigure) -> str:
    return "-" if command.peak_bytes is None else f"{command.peak_bytes / 1e6:.0f}"


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
    table = _table(
        "search, one group of each shape", "group", "algorithm", "K", "N", "GFLOP", "seconds", "GFLOP/s", "of matmul",
        "device MB",
    )  # fmt: skip
    for figure in found.search:
        peak = "-" if figure.device_peak_bytes is None else f"{figure.device_peak_bytes / 1e6:.0f}"
        table.add_row(
            figure.group,
            figure.algorithm,
            str(figure.in_features),
            str(figure.out_features),
            f"{figure.flops / 1e9:.1f}",
            f"{figure.seconds:.2f}",
            f"{figure.flops_per_second / 1e9:.0f}",
            f"{figure.share_of_matmul:.0%}",
            peak,
        )
    return table


def _growth(found: Benchmark) -> Table:
    table = _table("growth on synthetic models", "along", "size", "calibrate s", "search s", "exponents")
    for figure in found.growth:
        calibrate, search = figure.exponents
        for index, point in enumerate(figure.points):
            table.add_row(
                figure.axis if index == 0 else "",
                str(point.size),
                f"{point.calibrate_seconds:.2f}",
                f"{point.search_seconds:.2f}",
                f"{calibrate:.2f} / {search:.2f}" if index == 0 else "",
            )
    return table
