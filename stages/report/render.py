"""The page of a report: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from stages.report.comparison_plots import front_figure, position_figure
from stages.report.document import Document, Quantization
from stages.report.model_plots import bits_figure, size_figure
from stages.report.site_plots import site_figure
from stages.report.tables import (
    accuracy_passage,
    answer_passage,
    speed_passage,
    task_passage,
    verified_passage,
    worst_passage,
)
from stages.report.view import Figure, Passage, Section, Tile, megabytes, percent

_FOLDER = Path(__file__).parent / "page"
_PAGE = "page.html.j2"
STYLE_SHEET = _FOLDER / "page.css"


def render(document: Document) -> str:
    """The page as text; the same for the same document."""
    templates = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template(_PAGE).render(
        document=document, tiles=_tiles(document), sections=[one for one in _sections(document) if one.parts]
    )


def _sections(document: Document) -> list[Section]:
    quantization = document.quantization
    return [
        Section(name="accuracy", heading="Accuracy", parts=_accuracy(document)),
        Section(name="use", heading="In use", parts=_in_use(document)),
        Section(name="layers", heading="Layer by layer", parts=() if quantization is None else _layers(quantization)),
        Section(name="sweep", heading="Sweep", parts=_sweep(document)),
    ]


def _accuracy(document: Document) -> tuple[Figure | Passage, ...]:
    parts: list[Figure | Passage | None] = []
    for index, evaluation in enumerate(document.evaluations):
        parts += [
            accuracy_passage(evaluation, f"accuracy-{index}"),
            position_figure(evaluation, f"positions-{index}"),
            worst_passage(evaluation, f"worst-{index}"),
        ]
    return _there(parts)


def _in_use(document: Document) -> tuple[Figure | Passage, ...]:
    evaluations = document.evaluations
    speeds = [evaluation.speed for evaluation in evaluations if evaluation.speed is not None]
    return _there(
        [
            answer_passage([one for evaluation in evaluations for one in evaluation.generations]),
            speed_passage(speeds[-1] if speeds else None),
            task_passage([one for evaluation in evaluations for one in evaluation.tasks]),
        ]
    )


def _layers(quantization: Quantization) -> tuple[Figure | Passage, ...]:
    sites = quantization.sites
    return _there(
        [
            size_figure(quantization.sizes),
            bits_figure(sites, quantization.kept),
            site_figure(sites),
            verified_passage(quantization),
        ]
    )


def _sweep(document: Document) -> tuple[Figure | Passage, ...]:
    return _there([front_figure(sweep, f"front-{index}") for index, sweep in enumerate(document.sweep)])


def _there(parts: Sequence[Figure | Passage | None]) -> tuple[Figure | Passage, ...]:
    return tuple(part for part in parts if part is not None)


def _tiles(document: Document) -> list[Tile]:
    """The figures to see at once."""
    tiles = []
    quantization = document.quantization
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
    for evaluation in document.evaluations:
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
