"""Make the Markdown of each block of tables in README and docs/."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from scripts.benchmarks.tables import benchmark_tables
from scripts.write_tables.results import (
    BenchmarkResult,
    ComparisonResult,
    FamiliesResult,
    Provenance,
    Result,
    TimesResult,
)
from scripts.write_tables.support_matrix import markdown
from stages.evaluation.bench.results import MeasuredModel, TextResults
from stages.evaluation.records import ModelSpeed
from stages.records.quantities import counted, duration

NOTHING = "No figures yet: `python -m scripts.write_tables` writes them here."
_SPEED_HEADINGS = ("prompt tokens/s", "decoding tokens/s")
_README_ROWS = {
    "genai-quant": "awq_gptq()",
    "genai-quant, `--target_size {}`": "awq_gptq-target_size-(.+)",
    "onnxruntime-genai, `-p int4`": "builder-int4()",
    "onnxruntime-genai, `{}`": "builder-(k_quant_mixed)",
    "NVIDIA ModelOpt, `{}`": r"modelopt-(\w+)-b\d+",
}
"""Names of runs, by row: what each tool makes by default, and with the option that the name holds; of several the most
accurate."""
_TEXTS = {"offline": "documentation", "code": "source code"}
"""Kinds of text that have a name of their own here; others are called as their file."""
_UNKNOWN = "-"


def readme_results(results: Sequence[Result]) -> str:
    """Return the README's comparison of each model."""
    found = [one for one in results if isinstance(one, ComparisonResult)]
    return "\n\n".join(_readme_result(result) for result in found) or NOTHING


def readme_times(results: Sequence[Result]) -> str:
    """Return how long the README's commands take."""
    found = [one for one in results if isinstance(one, TimesResult)]
    tables = [
        _table(("command", "time"), [(_command(name), duration(seconds)) for name, seconds in one.seconds.items()])
        for one in found
    ]
    return (
        "\n\n".join(f"{table}\n\n{_head(one.provenance)}" for one, table in zip(found, tables, strict=True)) or NOTHING
    )


def accuracy(results: Sequence[Result]) -> str:
    """Return every comparison in full."""
    found = [one for one in results if isinstance(one, ComparisonResult)]
    return "\n\n".join(part for result in found for part in _comparison(result)) or NOTHING


def cost(results: Sequence[Result]) -> str:
    """Return every benchmark."""
    found = [one for one in results if isinstance(one, BenchmarkResult)]
    return "\n\n".join(part for result in found for part in _benchmark(result)) or NOTHING


def families(results: Sequence[Result]) -> str:
    """Return the model families that the tests take the whole way."""
    found = [one for one in results if isinstance(one, FamiliesResult)]
    return "\n\n".join(f"{_head(one.provenance)}\n\n{markdown(list(one.families))}" for one in found) or NOTHING


def _readme_result(result: ComparisonResult) -> str:
    (text, *others), (base_speed, by_name) = result.comparison.texts, _speeds(result)
    size, divergence, perplexity = _base_cells(text)
    zeros = [divergence] * len(result.comparison.texts)
    rows = [("base model", size, *zeros, perplexity, *_speed_cells(base_speed))]
    for label, names in _README_ROWS.items():
        measured = [(model, match[1]) for model in text.models if (match := re.fullmatch(names, model.name))]
        scored = [(model, method) for model, method in measured if model.accuracy and model.failure is None]
        if scored:
            model, method = min(scored, key=lambda one: _divergence(one[0]))
            size, divergence, perplexity = _accuracy_cells(model)
            elsewhere = [_accuracy_cells(same)[1] for one in others for same in one.models if same.name == model.name]
            name = label.format(method)
            rows.append((name, size, divergence, *elsewhere, perplexity, *_speed_cells(by_name.get(model.name))))
    kinds = [one.text or "" for one in result.comparison.texts]
    divergences = [f"KL, {_TEXTS.get(name, Path(name).stem)}" for name in kinds]
    headings = (result.title, "MB", *divergences, "perplexity", *_SPEED_HEADINGS)
    return f"{_table(headings, rows)}\n\n{_head(result.provenance)}"


def _comparison(result: ComparisonResult) -> Iterator[str]:
    headings = (
        "model",
        "MB",
        "KL",
        "perplexity",
        "same top-1",
        *_SPEED_HEADINGS,
        "bits a weight",
        "note",
    )
    yield f"### {result.title}"
    yield _head(result.provenance)
    if (speed := result.comparison.speed) is not None:
        yield (
            f"Tokens a second: {counted(speed.threads, 'thread')}, {speed.new_tokens} new tokens behind "
            f"{speed.prompt_tokens}, median of {counted(speed.rounds, 'round')}."
        )
    base_speed, by_name = _speeds(result)
    for text in result.comparison.texts:
        base = ("base model", *_base_cells(text), _UNKNOWN, *_speed_cells(base_speed))
        rows = [(*base, _UNKNOWN, "")]
        rows += [_comparison_row(model, by_name.get(model.name)) for model in text.models]
        yield f"Text: {text.text}."
        yield _table(headings, rows)


def _comparison_row(model: MeasuredModel, speed: ModelSpeed | None) -> tuple[str, ...]:
    search, accuracy = model.search, model.accuracy
    return (
        f"`{model.name}`",
        *_accuracy_cells(model),
        _number(None if accuracy is None else accuracy.top1_agreement, ".2%"),
        *_speed_cells(speed),
        _number(None if search is None else search.bits_per_weight, ".2f"),
        model.failure or model.note,
    )


def _base_cells(text: TextResults) -> tuple[str, ...]:
    base = text.base
    if base is None:
        return (_UNKNOWN,) * 3
    return f"{base.bytes / 1e6:.1f}", "0", f"{base.accuracy.perplexity:.3f}"


def _accuracy_cells(model: MeasuredModel) -> tuple[str, ...]:
    accuracy = model.accuracy
    return (
        _number(None if model.bytes is None else model.bytes / 1e6, ".1f"),
        _number(None if accuracy is None else accuracy.mean_divergence, ".4f"),
        _number(None if accuracy is None else accuracy.perplexity, ".3f"),
    )


def _divergence(model: MeasuredModel) -> float:
    assert model.accuracy is not None
    return model.accuracy.mean_divergence


def _speeds(result: ComparisonResult) -> tuple[ModelSpeed | None, dict[str, ModelSpeed]]:
    """Return the base's speed and those of the other models by name; nothing where no speed was measured."""
    if result.comparison.speed is None:
        return None, {}
    base, *others = result.comparison.speed.models
    return base, {model.model: model for model in others}


def _speed_cells(speed: ModelSpeed | None) -> tuple[str, str]:
    return (
        _number(None if speed is None else speed.prompt.median, ".0f"),
        _number(None if speed is None else speed.decode.median, ".1f"),
    )


def _benchmark(result: BenchmarkResult) -> Iterator[str]:
    yield f"### {result.title}"
    yield _head(result.provenance)
    for table in benchmark_tables(result.benchmark):
        title = table.title
        yield f"{title[:1].upper()}{title[1:]}:"
        yield table.as_markdown().rstrip()


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _head(measured: Provenance) -> str:
    versions = ", ".join(measured.versions)
    return f"Measured on {measured.date} at commit {measured.commit} with {versions}; {measured.machine}."


def _command(name: str) -> str:
    """Return ``bash x.sh (in a fresh clone)`` with the command as code and the remark as text."""
    command, bracket, remark = name.partition(" (")
    return f"`{command}`{bracket}{remark}"


def _number(value: float | None, form: str) -> str:
    return _UNKNOWN if value is None else format(value, form)
