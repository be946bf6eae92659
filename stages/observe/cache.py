"""The calibration cache: a folder with manifest.json, the tokens, and one safetensors file for each activation.

It is written whole or not at all, and knows the model, tokens and options it was made from: a cache that doesn't match
is refused with the reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.atomic import whole_directory
from stages.errors import CacheMismatch, UserError
from stages.records import ActivationStats, TokenStats

MANIFEST = "manifest.json"
_TOKENS = "tokens.safetensors"
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheKey:
    """What a cache was made from; two caches with equal keys hold the same statistics."""

    model_fingerprint: str
    token_fingerprint: str
    source: str
    calibration_windows: int
    held_out_windows: int
    seq_len: int
    providers: tuple[str, ...]

    def digest(self) -> str:
        return hashlib.sha256(TypeAdapter(CacheKey).dump_json(self)).hexdigest()

    def difference(self, other: CacheKey) -> str:
        """The first field in which ``other`` differs, in words; empty where they are equal."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine != theirs:
                return f"its {field.name.replace('_', ' ')} is {_short(mine)}, this run's is {_short(theirs)}"
        return ""


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """manifest.json: the key, and which file holds which activation."""

    format: int = _FORMAT
    key: CacheKey
    files: dict[str, str]


_MANIFESTS = TypeAdapter(Manifest)


@dataclass(frozen=True, slots=True)
class CalibrationCache:
    """An opened cache; statistics are read one activation at a time."""

    folder: Path
    manifest: Manifest

    def read(self, activation: str) -> ActivationStats:
        """Statistics of one activation.

        Raises:
            CacheMismatch: the cache has no such activation, or its file is damaged.
        """
        name = self.manifest.files.get(activation)
        if name is None:
            raise CacheMismatch(
                f"{self.folder} has no statistics of '{activation}'; run stages.calibrate again with --overwrite."
            )
        try:
            tensors = load_file(self.folder / name)
        except (OSError, SafetensorError) as error:
            raise CacheMismatch(
                f"{self.folder / name} is damaged ({error}); run stages.calibrate again with --overwrite."
            ) from error
        return ActivationStats(
            calibration=_token_stats(tensors, "calibration"), held_out=_token_stats(tensors, "held_out")
        )

    def read_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """The windows that the statistics come from: calibration and held out, each [windows, length] int64.

        Raises:
            CacheMismatch: their file is missing or damaged.
        """
        path = self.folder / _TOKENS
        try:
            windows = load_arrays(path)
        except (OSError, SafetensorError) as error:
            raise CacheMismatch(
                f"{path} is missing or damaged ({error}); run stages.calibrate again with --overwrite."
            ) from error
        return windows["calibration"], windows["held_out"]


def _token_stats(tensors: dict[str, Tensor], part: str) -> TokenStats:
    return TokenStats(
        num_tokens=int(tensors[f"{part}.num_tokens"]),
        abs_mean=tensors[f"{part}.abs_mean"],
        gram=tensors.get(f"{part}.gram"),
        rows=tensors.get(f"{part}.rows"),
    )


def _as_tensors(part: str, stats: TokenStats) -> dict[str, Tensor]:
    named = {
        "num_tokens": stats.abs_mean.new_tensor(stats.num_tokens).long(),
        "abs_mean": stats.abs_mean,
        "gram": stats.gram,
        "rows": stats.rows,
    }
    return {f"{part}.{name}": tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True, slots=True)
class CacheWriter:
    """Fills the scratch folder of a new cache."""

    folder: Path
    files: dict[str, str]

    def write(self, activation: str, stats: ActivationStats) -> None:
        """Save one activation's statistics."""
        name = f"{len(self.files):04d}.safetensors"
        tensors = _as_tensors("calibration", stats.calibration) | _as_tensors("held_out", stats.held_out)
        with self._place_for(name) as path:
            save_file(tensors, path, {"activation": activation})
        self.files[activation] = name

    def write_tokens(self, calibration: np.ndarray, held_out: np.ndarray) -> None:
        """Save the token windows, so that a later pass can see exactly the same text."""
        with self._place_for(_TOKENS) as path:
            save_arrays({"calibration": calibration, "held_out": held_out}, path)

    @contextmanager
    def _place_for(self, name: str) -> Iterator[Path]:
        try:
            yield self.folder / name
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"The calibration cache can't be written to {self.folder.parent} ({error}); free space there, or "
                "choose another place with --cache_dir."
            ) from error


@contextmanager
def new_cache(folder: Path, key: CacheKey, *, overwrite: bool) -> Iterator[CacheWriter]:
    """Write a cache; it gets its place when the block ends without an error, else nothing is left.

    Raises:
        UserError: the folder exists and ``overwrite`` is off, or can't be written.
    """
    with whole_directory(folder, overwrite=overwrite, option="--cache_dir") as scratch:
        writer = CacheWriter(scratch, {})
        yield writer
        manifest = Manifest(key=key, files=writer.files)
        (scratch / MANIFEST).write_bytes(_MANIFESTS.dump_json(manifest, indent=1))


def find_cache(folder: Path) -> CalibrationCache | None:
    """The cache in ``folder``, or None where there is none.

    Raises:
        CacheMismatch: the folder holds something that is not a readable cache of this version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = _MANIFESTS.validate_json(path.read_bytes())
    except ValidationError as error:
        raise CacheMismatch(
            f"{path} was written by another version or is damaged; run stages.calibrate with --overwrite."
        ) from error
    if manifest.format != _FORMAT:
        raise CacheMismatch(f"{path} has format {manifest.format}, not {_FORMAT}; calibrate with --overwrite.")
    return CalibrationCache(folder, manifest)


def open_cache(folder: Path, model_fingerprint: str) -> CalibrationCache:
    """The cache in ``folder`` if it belongs to the model.

    Raises:
        CacheMismatch: there is none, or it was made from another model.
    """
    cache = find_cache(folder)
    if cache is None:
        raise CacheMismatch(f"--cache_dir {folder} holds no calibration cache; run stages.calibrate first.")
    if cache.manifest.key.model_fingerprint != model_fingerprint:
        raise CacheMismatch(
            f"--cache_dir {folder} was made from another model (or another build of it); run stages.calibrate on "
            "this one, or pass its cache."
        )
    return cache
