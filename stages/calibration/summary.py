"""Say what a calibration cache holds and how it was made: a table for people, a record for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

from stages.calibration.cache import CacheKey, Weighting
from stages.commands.output import Section
from stages.commands.tables import FactTable
from stages.records.quantities import counted, duration
from stages.runtime.cpu.norms import NORMS_REASON
from stages.runtime.cpu.upcast import UPCAST_REASON

_WEIGHTS: Mapping[Weighting, str] = MappingProxyType(
    {"end loss": "weighted by the model's own loss", "none": "all count alike"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassSummary:
    """How the model ran."""

    tokenizer: str
    matmuls: int
    """Sites whose activations were tapped."""
    as_rows: int
    """Activations that are kept as their tokens' own rows; of the others the Gram matrix is kept."""
    partitions: int
    """Parts in which the graph ran, one after the other."""
    widened: bool
    """Whether a bfloat16 model ran as float32."""
    norms_written_out: bool = False
    """Whether the norms inside attention ran as nodes before it."""
    unused: tuple[tuple[str, str], ...]
    """(execution provider, why it was not used)."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSummary:
    """What a calibration cache holds, and how it was made where this run made it."""

    cache: Path
    bytes: int
    key: CacheKey
    activations: int
    channels: int
    """Input channels of the widest MatMul."""
    made: PassSummary | None
    """None where the cache was there already."""


def calibration_section(summary: CalibrationSummary) -> Section:
    """Return what a command prints of a calibration."""
    key = {name: value for name, value in asdict(summary.key).items() if not name.endswith("_fingerprint")}
    record = {"cache": summary.cache, "bytes": summary.bytes, **key, "activations": summary.activations}
    record["channels"] = summary.channels
    return Section(name="calibration", table=_table(summary), record={**record, "made": summary.made})


def _table(summary: CalibrationSummary) -> FactTable:
    made, key = summary.made, summary.key
    each = "" if key.seq_len is None else f", {counted(key.seq_len, 'token')} each"
    windows = f"{key.calibration_windows} to search with + {key.held_out_windows} held out{each}"
    facts = [
        ("cache", f"{summary.cache} ({summary.bytes / 1e6:.0f} MB)"),
        ("text" if key.seq_len is not None else "from", key.source),
        *([] if made is None else [("tokenizer" if key.seq_len is not None else "processor", made.tokenizer)]),
        ("windows" if key.seq_len is not None else "samples", windows),
        *_tokens_per_channel(summary),
        ("tokens", _WEIGHTS[key.token_weights]),
        *_how_it_ran(summary),
    ]
    return FactTable(title="calibration cache", facts=tuple(facts))


def _tokens_per_channel(summary: CalibrationSummary) -> list[tuple[str, str]]:
    key = summary.key
    if key.seq_len is None or not summary.channels:
        return []
    tokens = key.calibration_windows * key.seq_len / summary.channels
    return [("", f"{tokens:.1f} tokens for each of the {summary.channels} input channels of the widest MatMul")]


def _how_it_ran(summary: CalibrationSummary) -> list[tuple[str, str]]:
    made, providers = summary.made, ("ran on", ", ".join(summary.key.providers))
    if made is None:
        return [("tapped", counted(summary.activations, "activation")), providers]
    matrices = counted(summary.activations - made.as_rows, "Gram matrix", "Gram matrices")
    rows = [
        ("tapped", f"{counted(summary.activations, 'activation')} of {counted(made.matmuls, 'MatMul')}"),
        ("kept as", f"{matrices} (packed triangles), {made.as_rows} as the tokens' own rows"),
    ]
    if made.partitions > 1:
        text = f"the model ran in {made.partitions} parts, one after the other; --max_memory sets their size"
        rows.append(("memory", text))
    rows.append(providers)
    rows += [("", UPCAST_REASON)] if made.widened else []
    rows += [("", NORMS_REASON)] if made.norms_written_out else []
    rows += [("not used", f"{name}: {why}") for name, why in made.unused]
    return [*rows, ("took", duration(made.seconds))]
