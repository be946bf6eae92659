"""Render a report as one HTML page that needs no other file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from stages.report.comparison_plots import position_figure, sweep_figure
from stages.report.document import Quantization, Report
from stages.report.model_plots import bits_figure, size_figure
from stages.report.site_plots import site_figure
from stages.report.tables import (
    accuracy_tables,
    answer_tables,
    speed_tables,
    task_tables,
    verified_tables,
    worst_tables,
)
from stages.report.view import Figure, Section, TableGroup, Tile, megabytes, percent

_FOLDER = Path(__file__).parent / "page"
_PAGE = "page.html.j2"


def render(report: Report) -> str:
    """Return the page; equal reports give equal pages."""
    templates = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template(_PAGE).render(
        report=report, tiles=_tiles(report), sections=[one for one in _sections(report) if one.parts]
    )


def _sections(report: Report) -> list[Section]:
    quantization = report.quantization
    return [
        Section(name="accuracy", heading="Accuracy", parts=_accuracy(report)),
        Section(name="use", heading="In use", parts=_in_use(report)),
        Section(name="layers", heading="Layer by layer", parts=() if quantization is None else _layers(quantization)),
        Section(name="sweep", heading="Sweep", parts=_sweep(report)),
    ]


def _accuracy(report: Report) -> tuple[Figure | TableGroup, ...]:
    parts: list[Figure | TableGroup | None] = []
    for index, evaluation in enumerate(report.evaluations):
        parts += [
            accuracy_tables(evaluation, f"accuracy-{index}"),
            position_figure(evaluation, f"positions-{index}"),
            worst_tables(evaluation, f"worst-{index}"),
        ]
    return _present(parts)


def _in_use(report: Report) -> tuple[Figure | TableGroup, ...]:
    evaluations = report.evaluations
    speeds = [evaluation.speed for evaluation in evaluations if evaluation.speed is not None]
    return _present(
        [
            answer_tables([one for evaluation in evaluations for one in evaluation.generations]),
            speed_tables(speeds[-1] if speeds else None),
            task_tables([one for evaluation in evaluations for one in evaluation.tasks]),
        ]
    )


def _layers(quantization: Quantization) -> tuple[Figure | TableGroup, ...]:
    sites = quantization.sites
    return _present(
        [
            size_figure(quantization.sizes),
            bits_figure(sites, quantization.kept),
            site_figure(sites),
            verified_tables(quantization),
        ]
    )


def _sweep(report: Report) -> tuple[Figure | TableGroup, ...]:
    return _present([sweep_figure(sweep, f"front-{index}") for index, sweep in enumerate(report.sweep)])


def _present(parts: Sequence[Figure | TableGroup | None]) -> tuple[Figure | TableGroup, ...]:
    return tuple(part for part in parts if part is not None)


def _tiles(report: Report) -> list[Tile]:
    """Return the numbers at the top of the page."""
    tiles = []
    quantization = report.quantization
    if quantization is not None:
        before = sum(part.before for part in quantization.sizes)
        after = sum(part.after for part in quantization.sizes)
        if after:
            note = f"from {megabytes(before)} MB, {before / after:.2f}x smaller"
            tiles.append(Tile(value=f"{megabytes(after)} MB", label="size", note=note))
        bits = f"{quantization.bits_per_weight:.3f}"
        tiles.append(Tile(value=bits, label="bits a weight", note=f"{len(quantization.sites)} quantized sites"))
        if quantization.verified is not None and quantization.verified.fused is not None:
            verified = quantization.verified
            tiles.append(Tile(value=f"{verified.fused} of {verified.sites}", label="sites run fused"))
    for evaluation in report.evaluations:
        # More models are compared in the table.
        if len(evaluation.rows) == 2:
            base, model = evaluation.rows
            accuracy = model.accuracy
            tiles.append(
                Tile(
                    value=f"{accuracy.mean_divergence:.4f}",
                    label=f"KL on {evaluation.comparison.text}",
                    note=f"perplexity {base.accuracy.perplexity:.2f} → {accuracy.perplexity:.2f}, same top-1 "
                    f"{percent(accuracy.top1_agreement)}",
                )
            )
    return tiles
