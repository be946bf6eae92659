"""Make the Markdown of each block of tables in README and docs/."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from scripts.architectures.matrix import markdown as matrix
from scripts.benchmarks.tables import benchmark_tables
from scripts.write_tables.results import (
    ArchitecturesResult,
    BenchmarkResult,
    ComparisonResult,
    FamiliesResult,
    Provenance,
    Result,
    TimesResult,
)
from scripts.write_tables.support_matrix import markdown
from stages.evaluation.bench.results import MeasuredModel, TextResults, mean_results, text_divergences, text_name
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
    "llama.cpp, `{}` (GGUF)": r"llama_cpp-(q\w+)",
}
"""Names of runs, by row: what each tool makes by default, and with the option that the name holds; of several the most
accurate."""
_TEXTS = {"offline": "documentation", "code": "source code"}
"""Kinds of text that have a name of their own here; others are called as their file."""
_README_TEXTS = 3
"""Of so many texts the README shows each; of more only their mean, and docs/benchmarks.md all."""
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


def architectures(results: Sequence[Result]) -> str:
    """Return what became of every architecture that the builder knows."""
    found = [one for one in results if isinstance(one, ArchitecturesResult)]
    return "\n\n".join(f"{_heads(one)}\n\n{matrix(one.cells, one.described)}" for one in found) or NOTHING


def _heads(result: ArchitecturesResult) -> str:
    """Return when all was measured, and when some architectures were measured again."""
    lines = [_head(result.provenance)]
    for since in dict.fromkeys(result.later.values()):
        names = ", ".join(f"`{name}`" for name, one in result.later.items() if one == since)
        lines.append(f"{names}: {_head(since).replace('Measured', 'measured', 1)}")
    return "\n\n".join(lines)


def families(results: Sequence[Result]) -> str:
    """Return the model families that the tests take the whole way."""
    found = [one for one in results if isinstance(one, FamiliesResult)]
    return "\n\n".join(f"{_head(one.provenance)}\n\n{markdown(list(one.families))}" for one in found) or NOTHING


def _readme_result(result: ComparisonResult) -> str:
    texts, (base_speed, by_name) = result.comparison.texts, _speeds(result)
    means = mean_results(texts)
    shown = texts if len(texts) <= _README_TEXTS else ()
    divergences = dict(zip((model.name for model in means.models), text_divergences(shown), strict=False))
    rows = [("base model", *_base_cells(means, len(shown))[:-1], *_speed_cells(base_speed))]
    for label, names in _README_ROWS.items():
        measured = [(model, match[1]) for model in means.models if (match := re.fullmatch(names, model.name))]
        scored = [(model, method) for model, method in measured if model.accuracy and model.failure is None]
        if scored:
            model, method = min(scored, key=lambda one: _divergence(one[0]))
            cells = _accuracy_cells(model, divergences.get(model.name, ()))[:-1]
            rows.append((label.format(method), *cells, *_speed_cells(by_name.get(model.name))))
    headings = (result.title, *_accuracy_headings(shown)[:-1], *_SPEED_HEADINGS)
    return f"{_table(headings, rows)}\n\n{_head(result.provenance)}"


def _comparison(result: ComparisonResult) -> Iterator[str]:
    texts, (base_speed, by_name) = result.comparison.texts, _speeds(result)
    means = mean_results(texts)
    yield f"### {result.title}"
    yield _head(result.provenance)
    if (speed := result.comparison.speed) is not None:
        yield (
            f"Tokens a second: {counted(speed.threads, 'thread')}, {speed.new_tokens} new tokens behind "
            f"{speed.prompt_tokens}, median of {counted(speed.rounds, 'round')}."
        )
    headings = ("model", *_accuracy_headings(texts), *_SPEED_HEADINGS, "bits a weight", "note")
    rows = [("base model", *_base_cells(means, len(texts)), *_speed_cells(base_speed), _UNKNOWN, "")]
    for model, divergences in zip(means.models, text_divergences(texts), strict=True):
        bits = None if model.search is None else model.search.bits_per_weight
        speeds = _speed_cells(by_name.get(model.name))
        cells = _accuracy_cells(model, divergences)
        rows.append((f"`{model.name}`", *cells, *speeds, _number(bits, ".2f"), model.failure or model.note))
    yield _table(headings, rows)


def _accuracy_headings(texts: Sequence[TextResults]) -> tuple[str, ...]:
    """Return the headings of size and accuracy: KL on each text where there are several, and its mean."""
    if len(texts) == 1:
        return "MB", f"KL, {_kind(texts[0])}", "perplexity", "same top-1"
    return "MB", *(f"KL, {_kind(each)}" for each in texts), "mean KL", "perplexity", "same top-1"


def _kind(results: TextResults) -> str:
    name = text_name(results)
    return _TEXTS.get(name, name)


def _base_cells(means: TextResults, texts: int) -> tuple[str, ...]:
    """Return the base's cells under the headings of so many texts."""
    base, zeros = means.base, ("0",) * (texts + (texts != 1))
    if base is None:
        return (_UNKNOWN,) * (len(zeros) + 3)
    return f"{base.bytes / 1e6:.1f}", *zeros, f"{base.accuracy.perplexity:.3f}", _UNKNOWN


def _accuracy_cells(mean: MeasuredModel, divergences: Sequence[float | None]) -> tuple[str, ...]:
    """Return a model's cells under the headings of size and accuracy.

    Args:
        mean: its means over all texts.
        divergences: its KL on the texts that have a column.
    """
    accuracy = mean.accuracy
    several = divergences if len(divergences) != 1 else ()
    return (
        _number(None if mean.bytes is None else mean.bytes / 1e6, ".1f"),
        *(_number(each, ".4f") for each in several),
        _number(None if accuracy is None else accuracy.mean_divergence, ".4f"),
        _number(None if accuracy is None else accuracy.perplexity, ".3f"),
        _number(None if accuracy is None else accuracy.top1_agreement, ".2%"),
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
