"""Render a report as one HTML page that needs no other file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from stages.evaluation.records import Evaluation
from stages.records.quantities import counted
from stages.report.comparison_plots import position_figure, sweep_figure
from stages.report.document import Quantization, Report
from stages.report.tables import (
    accuracy_tables,
    answer_tables,
    output_tables,
    speed_tables,
    task_tables,
    verified_tables,
    worst_tables,
)
from stages.report.values import (
    SCALE,
    Grade,
    format_in_words,
    grade_divergence,
    grade_speed,
    megabytes,
    percent,
    text_name,
)
from stages.report.view import Cell, Figure, Graded, Section, Tile, table
from stages.report.weight_plots import bits_figure, site_figure, size_figure

_FOLDER = Path(__file__).parent / "page"
_PAGE = "page.html.j2"
_SHORT = 12
"""Letters of a fingerprint that are shown."""
_UNMEASURED = Figure(
    name="unmeasured",
    heading="Not measured",
    text="genai-quant quantize --evaluate measures accuracy and speed; genai-quant evaluate --report adds them here.",
)


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
        report=report,
        facts=_facts(report),
        tiles=_tiles(report),
        sections=[one for one in _sections(report) if one.parts],
    )


def _facts(report: Report) -> list[tuple[str, str]]:
    """Return how the report's first part was made: what is known, with its name."""
    origin, quantization = report.origin, report.quantization
    made = [origin.made, f"genai-quant {origin.version}" if origin.version else "", report.machine]
    facts = [
        ("base", _base(report)),
        ("formats", "" if quantization is None else _formats(quantization)),
        ("algorithm", "" if quantization is None else quantization.summary),
        ("calibration text", origin.calibration),
        ("made", ", ".join(filter(None, made))),
        ("command", origin.command),
    ]
    return [(name, text) for name, text in facts if text]


def _base(report: Report) -> str:
    """Describe the base: its name, size and fingerprint, as far as any part knows them."""
    rows = [evaluation.rows[0] for evaluation in report.evaluations]
    rows += [sweep.base for sweep in report.sweep if sweep.base is not None]
    parts = () if report.quantization is None else report.quantization.sizes
    size = sum(part.before for part in parts) or (rows[0].bytes if rows else 0)
    compared = [evaluation.comparison.models[0][1] for evaluation in report.evaluations]
    fingerprint = report.origin.base_fingerprint or (compared[0] if compared else "")
    described = (
        report.origin.base or (rows[0].name if rows else ""),
        f"{megabytes(size)} MB" if size else "",
        f"fingerprint {fingerprint[:_SHORT]}" if fingerprint else "",
    )
    return ", ".join(filter(None, described))


def _formats(quantization: Quantization) -> str:
    """Describe the formats in words, the most frequent first."""
    counts = Counter(site.stored or format_in_words(site.report.format) for site in quantization.sites)
    words = [f"{counted(count, 'MatMul')} as {form}" for form, count in counts.most_common()]
    words += [f"embedding {each.name} as {each.stored}" for each in quantization.embeddings]
    return "; ".join(
        [*words, *([f"{counted(len(quantization.kept), 'MatMul')} as in the base"] if quantization.kept else [])]
    )


def _sections(report: Report) -> list[Section]:
    quantization = report.quantization
    return [
        Section(name="accuracy", heading="Accuracy and speed", parts=_accuracy(report)),
        Section(name="sweep", heading="Models compared", parts=_sweep(report)),
        Section(name="weights", heading="Weights", parts=() if quantization is None else _weights(quantization)),
        Section(name="use", heading="Token by token", parts=_details(report.evaluations)),
    ]


def _accuracy(report: Report) -> tuple[Figure, ...]:
    evaluations = report.evaluations
    outputs = [output_tables(one, f"outputs-{index}") for index, one in enumerate(report.outputs)]
    if not evaluations:
        return _present(outputs) if outputs or report.quantization is None else (_UNMEASURED,)
    speeds = [evaluation.speed for evaluation in evaluations if evaluation.speed is not None]
    return _present(
        [
            accuracy_tables(evaluations),
            *outputs,
            speed_tables(speeds[-1] if speeds else None),
            task_tables([one for evaluation in evaluations for one in evaluation.tasks]),
            _scale("scale"),
        ]
    )


def _scale(name: str) -> Figure:
    """Return the table of what each grade stands for."""
    headings = ("", "KL (nats)", "same top-1", "perplexity above the base's", "decoding, of the base")
    rows: list[tuple[Cell, ...]] = [(Graded("", grade), *limits) for grade, limits in SCALE]
    return Figure(
        name=name,
        heading="When a number is good",
        text="KL divergence: how far the model's probabilities for the next token are from the base's. Same top-1: how "
        "often both find the same token most likely.",
        tables=(table(headings, [*rows, (Graded("", Grade.POOR), *["beyond"] * 4)]),),
    )


def _details(evaluations: Sequence[Evaluation]) -> tuple[Figure, ...]:
    parts = [answer_tables([one for evaluation in evaluations for one in evaluation.generations])]
    for index, evaluation in enumerate(evaluations):
        parts += [position_figure(evaluation, f"positions-{index}"), worst_tables(evaluation, f"worst-{index}")]
    return _present(parts)


def _weights(quantization: Quantization) -> tuple[Figure, ...]:
    sites = quantization.sites
    return _present(
        [
            size_figure(quantization.sizes),
            bits_figure(sites, quantization.kept),
            site_figure(sites),
            verified_tables(quantization),
        ]
    )


def _sweep(report: Report) -> tuple[Figure, ...]:
    figures = [sweep_figure(sweep, f"front-{index}") for index, sweep in enumerate(report.sweep) if sweep.points]
    return (*figures, _scale("sweep-scale")) if any(sweep.text for sweep in report.sweep) else tuple(figures)


def _present(parts: Sequence[Figure | None]) -> tuple[Figure, ...]:
    return tuple(part for part in parts if part is not None)


def _tiles(report: Report) -> list[Tile]:
    """Return the numbers at the top of the page: accuracy, then speed, then size."""
    tiles = [
        _accuracy_tile(evaluation)
        for evaluation in report.evaluations
        # More models are compared in the table.
        if len(evaluation.rows) == 2
    ]
    speeds = [one.speed for one in report.evaluations if one.speed is not None and len(one.speed.models) == 2]
    if speeds:
        base, model = (each.decode.median for each in speeds[-1].models)
        note = f"base {base:.1f}, {model / base:.2f}x"
        value = f"{model:.1f} tokens/s"
        tiles.append(Tile(value=value, label="decoding speed", note=note, grade=grade_speed(model / base)))
    if report.quantization is not None:
        tiles += _weight_tiles(report.quantization)
    return tiles


def _accuracy_tile(evaluation: Evaluation) -> Tile:
    base, model = (row.accuracy for row in evaluation.rows)
    return Tile(
        value=f"{model.mean_divergence:.4f} nats",
        label=f"KL divergence on {text_name(evaluation.comparison.text)}",
        note=f"perplexity {base.perplexity:.2f} → {model.perplexity:.2f}, same top-1 {percent(model.top1_agreement)}",
        grade=grade_divergence(model),
    )


def _weight_tiles(quantization: Quantization) -> Iterator[Tile]:
    before = sum(part.before for part in quantization.sizes)
    after = sum(part.after for part in quantization.sizes)
    if after:
        note = f"base {megabytes(before)} MB, {before / after:.2f}x smaller"
        yield Tile(value=f"{megabytes(after)} MB", label="size", note=note)
    bits = f"{quantization.bits_per_weight:.3f}"
    yield Tile(
        value=bits,
        label="bits a weight",
        note=f"of {counted(len(quantization.sites), 'MatMul')}, with scales, without embeddings",
    )
    verified = quantization.verified
    if verified is not None and verified.fused is not None:
        grade = Grade.GOOD if verified.fused == verified.sites else Grade.POOR
        value, note = f"{verified.fused} of {verified.sites}", "by one fast operator each"
        yield Tile(value=value, label="MatMuls run fused", note=note, grade=grade)
