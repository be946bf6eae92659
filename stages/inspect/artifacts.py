"""Report on this project's own folders: calibration caches, quantized weights, sweeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from stages.calibration.cache import CalibrationCache, StatisticsOutline
from stages.errors import CacheMismatch, UserError
from stages.evaluation.bench.results import TextResults, measured_models
from stages.evaluation.bench.runs import read_base_rows, read_records
from stages.model.directory import locate_model
from stages.model.load import fingerprint_model
from stages.quantization.plan.budget.forecast import read_forecasts
from stages.quantization.weights.store import QuantizedStore
from stages.quantization.weights.summary import bits_per_weight
from stages.records.formats import WeightForm
from stages.records.results import SiteReport

_CALIBRATION, _WEIGHTS = ".calibration", ".weights"
_NOT_SHOWN = (".safetensors", "manifest.json", "recipe.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReport:
    """A calibration cache."""

    kind: Literal["calibration"] = field(default="calibration", init=False)
    folder: Path
    bytes: int
    source: str
    calibration_windows: int
    held_out_windows: int
    seq_len: int | None
    providers: tuple[str, ...]
    activations: int
    widths: tuple[tuple[int, int], ...]
    """(channels of an activation, activations with that many)."""
    as_rows: int
    """Activations of which the tokens' rows are kept instead of a Gram matrix."""
    forecasts: int
    """Sites whose errors were forecast for a budget."""
    files: tuple[str, ...]
    """Other files in the folder."""
    damaged: tuple[str, ...]
    made_from: str
    """The base model where it lies beside the cache, else what is known of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsReport:
    """A folder of quantized weights."""

    kind: Literal["weights"] = field(default="weights", init=False)
    folder: Path
    bytes: int
    recipe: str
    weight_form: WeightForm
    folds_input_scales: bool
    groups: int
    finished: int
    """Groups that were searched; running the same command again searches the rest."""
    embeddings: int
    bits_per_weight: float | None
    """Of the finished groups; None where none is."""
    sites: tuple[SiteReport, ...]
    kept: tuple[tuple[str, str], ...]
    files: tuple[str, ...]
    """Other files in the folder: report.jsonl, plan.toml, verification.json."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepReport:
    """A folder of measured models."""

    kind: Literal["sweep"] = field(default="sweep", init=False)
    folder: Path
    texts: tuple[TextResults, ...]
    """Texts have their keys as names: the folder doesn't hold their own."""
    failed: int
    deleted: tuple[str, ...]
    """Models that were deleted while their records stay."""


def report_cache(cache: CalibrationCache) -> CacheReport:
    """Report on a cache; its statistics aren't read."""
    key, outlines, damaged = cache.manifest.key, list[StatisticsOutline](), list[str]()
    for activation in cache.manifest.files:
        try:
            outlines.append(cache.outline(activation))
        except CacheMismatch as error:
            damaged.append(str(error))
    return CacheReport(
        folder=cache.folder,
        bytes=_size(cache.folder),
        source=key.source,
        calibration_windows=key.calibration_windows,
        held_out_windows=key.held_out_windows,
        seq_len=key.seq_len,
        providers=key.providers,
        activations=len(cache.manifest.files),
        widths=tuple(sorted(Counter(outline.in_features for outline in outlines).items())),
        as_rows=sum(outline.as_rows for outline in outlines),
        forecasts=len(read_forecasts(cache.folder)),
        files=tuple(_other_files(cache.folder)),
        damaged=tuple(damaged),
        made_from=_made_from(cache),
    )


def _made_from(cache: CalibrationCache) -> str:
    """Return the base model's folder, if the cache has its default name beside it, or what is known instead."""
    name = cache.folder.absolute().name
    base = cache.folder.absolute().with_name(name.removesuffix(_CALIBRATION))
    if not name.endswith(_CALIBRATION) or not base.exists():
        return f"a model with the fingerprint {cache.manifest.key.model_fingerprint[:12]}"
    try:
        same = fingerprint_model(locate_model(base)) == cache.manifest.key.model_fingerprint
    except (UserError, OSError):
        return f"{base}, which can't be read now"
    return f"{base}" if same else f"another model than {base} holds now"


def report_weights(store: QuantizedStore) -> WeightsReport:
    """Report on quantized weights; their codes aren't read."""
    finished = sum(store.is_finished(index) for index in range(len(store.recipe.groups)))
    return WeightsReport(
        folder=store.folder,
        bytes=_size(store.folder),
        recipe=store.recipe.summary,
        weight_form=store.recipe.weight_form,
        folds_input_scales=store.recipe.fold_input_scales,
        groups=len(store.recipe.groups),
        finished=finished,
        embeddings=sum(store.has_table(index) for index in range(len(store.recipe.embeddings))),
        bits_per_weight=bits_per_weight(store) if finished else None,
        sites=tuple(store.reports()),
        kept=store.recipe.kept,
        files=tuple(_other_files(store.folder)),
    )


def is_sweep(folder: Path) -> bool:
    """Return whether ``folder`` holds records of measured models."""
    return bool(read_records(folder))


def report_sweep(folder: Path) -> SweepReport:
    """Report on the records of a sweep or a comparison with other tools."""
    records, bases = read_records(folder), read_base_rows(folder)
    keys = dict.fromkeys(key for record in records.values() for key in record.accuracy)
    commands = {name: " ".join(record.command) for name, record in records.items()}
    return SweepReport(
        folder=folder,
        texts=tuple(
            TextResults(
                text=key,
                base=None if key is None else bases.get(key),
                models=measured_models(commands, records, key, {}),
            )
            for key in keys or (None,)
        ),
        failed=sum(record.failure is not None for record in records.values()),
        deleted=tuple(name for name in records if not (folder / name).is_dir()),
    )


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _other_files(folder: Path) -> Iterator[str]:
    yield from (entry.name for entry in sorted(folder.iterdir()) if not entry.name.endswith(_NOT_SHOWN))
