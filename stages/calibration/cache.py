"""Read and write the calibration cache: a folder of manifest.json, the tokens, and a safetensors file per activation.

It is written whole or not at all, and knows the model, tokens and options it was made from: a cache that doesn't match
is refused with the reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.calibration.on_disk.row_files import open_rows
from stages.calibration.statistics import pack_symmetric, unpack_symmetric
from stages.errors import CacheMismatch, UserError, in_one_line
from stages.model.weights import all_finite
from stages.records.results import ActivationStats, SearchStats, TokenStats, TokenWeights
from stages.system.atomic import atomic_directory, is_occupied, require_creatable
from stages.system.paths import reachable
from stages.system.shared_folder import wait_until

MANIFEST = "manifest.json"
_TOKENS = "tokens.safetensors"
_MAXIMA = "kv-maxima.safetensors"
_TRIANGLE = ".gram_triangle"
"""How the name of a packed Gram matrix ends, which is read once, to be unpacked."""
_FORMAT = 3
_EARLIER = frozenset({1, 2})
_CHANNELS, _OUTPUTS = "channels of ", "outputs of "
"""What comes before a site's name where the weights and Gram matrices of its output channels are stored."""


Weighting = Literal["end loss", "none"]
"""What decides how much a token counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheKey:
    """What a cache was made from; two caches with equal keys hold the same statistics."""

    model_fingerprint: str
    token_fingerprint: str
    source: str
    calibration_windows: int
    held_out_windows: int
    seq_len: int | None
    """None where the statistics come from samples of sizes of their own."""
    providers: tuple[str, ...]
    token_weights: Weighting
    expert_rows: bool = False
    """Whether the rows that experts read are kept."""
    key_values: bool = False
    """Whether the largest keys and values are kept."""

    def digest(self) -> str:
        """Return the sha256 of all fields that a search depends on."""
        return hashlib.sha256(TypeAdapter(CacheKey).dump_json(self, exclude={"key_values"})).hexdigest()

    @property
    def text(self) -> str:
        """Return the text in words."""
        what = "samples" if self.seq_len is None else f"windows of {self.seq_len} tokens"
        return f"{self.source} ({self.calibration_windows} + {self.held_out_windows} {what})"

    def difference(self, other: CacheKey) -> str:
        """Return in what ``other`` differs first, in words; "" where they are equal."""
        if self.model_fingerprint != other.model_fingerprint:
            return "it was made from another model (or another build of it)"
        if self.text != other.text:
            return f"its text is {self.text}, and {other.text} is asked for"
        if self.token_fingerprint != other.token_fingerprint:
            return f"its text is other text of {self.source} than is asked for"
        if self.providers != other.providers:
            return f"it ran on {', '.join(self.providers)}, and this run has {', '.join(other.providers)}"
        if other.expert_rows and not self.expert_rows:
            return "it has no rows of what experts read (--expert_rows)"
        if other.key_values and not self.key_values:
            return "it has no largest keys and values (--kv_scales)"
        if self.token_weights != other.token_weights:
            return f"its tokens are weighted by {self.token_weights}, and {other.token_weights} is asked for"
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """manifest.json: the key, and which file holds which activation."""

    format: int = _FORMAT
    key: CacheKey
    files: dict[str, str]
    rows: dict[str, str] = field(default_factory=dict)
    """Which file holds the tokens' own rows of a value that experts share."""
    samples: tuple[str, ...] = ()
    """sha256 of each sample that it was made from; empty where it was made from text windows."""
    weighted: tuple[str, ...] = ()
    """The activations that also have a file of statistics whose tokens are weighted."""


@dataclass(frozen=True, slots=True)
class _Version:
    """What all versions of manifest.json say."""

    format: int


_MANIFESTS, _VERSIONS = TypeAdapter(Manifest), TypeAdapter(_Version)
_CALIBRATE_AGAIN = "run stages.calibrate again with --overwrite"


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsOutline:
    """What an activation's file holds, without its numbers."""

    in_features: int
    as_rows: bool
    """Whether the calibration tokens' own rows are kept in place of their Gram matrix."""
    bytes: int


@dataclass(frozen=True, slots=True)
class CalibrationCache:
    """An opened cache; statistics are read one activation at a time."""

    folder: Path
    manifest: Manifest
    written: int | None
    """When the manifest was, in nanoseconds."""

    def wait_until_seen(self) -> None:
        """Wait until this machine sees the cache as the process did that opened it.

        Raises:
            UserError: it doesn't.
        """
        path = self.folder / MANIFEST
        wait_until(lambda: _written(path) == self.written, path)

    def read(self, activation: str) -> ActivationStats:
        """Return the statistics of one activation.

        Raises:
            CacheMismatch: the cache has no such activation, or its file is missing or damaged.
        """
        with self._reading(self._file_of(activation)) as path:
            return _activation_stats(_load(path))

    def read_for_search(self, activation: str) -> SearchStats:
        """Return what a search minimizes at the sites that read ``activation``.

        Raises:
            CacheMismatch: see ``read``.
        """
        if activation not in self.manifest.weighted:
            return SearchStats(tokens=self.read(activation), channel_weights={})
        with self._reading(weighted_file(self._file_of(activation))) as path:
            tensors = _load(path)
            return SearchStats(
                tokens=_activation_stats(tensors),
                channel_weights=_by_site(tensors, _CHANNELS),
                token_weights=TokenWeights(
                    calibration=_weights(tensors, "calibration"), held_out=_weights(tensors, "held_out")
                ),
                output_grams=_by_site(tensors, _OUTPUTS),
            )

    @contextmanager
    def _reading(self, name: str) -> Iterator[Path]:
        """Give the block the path of a file; raise CacheMismatch where it is missing, damaged or was replaced."""
        path = self.folder / name
        try:
            yield path
        except (OSError, ValueError, SafetensorError, _Damage) as error:
            self._require_unchanged()
            raise CacheMismatch(f"{path} is missing or damaged ({in_one_line(error)}); {_CALIBRATE_AGAIN}.") from error
        self._require_unchanged()

    def _require_unchanged(self) -> None:
        """Raise CacheMismatch where another run replaced the cache: its files would be mixed with those read before."""
        if _written(self.folder / MANIFEST) != self.written:
            raise CacheMismatch(f"{self.folder} was replaced or removed while it was read; run the same command again.")

    def _file_of(self, activation: str) -> str:
        name = self.manifest.files.get(activation)
        if name is None:
            raise CacheMismatch(f"{self.folder} has no statistics of '{activation}'; {_CALIBRATE_AGAIN}.")
        return name

    def outline(self, activation: str) -> StatisticsOutline:
        """Return what is stored of one activation, without reading its numbers.

        Raises:
            CacheMismatch: its file is missing or damaged.
        """
        with self._reading(self.manifest.files[activation]) as path, safe_open(path, "pt") as file:
            return StatisticsOutline(
                in_features=file.get_slice("calibration.abs_mean").get_shape()[0],
                as_rows="calibration.rows" in file.keys(),  # noqa: SIM118
                bytes=path.stat().st_size,
            )

    def read_rows(self, value: str) -> dict[str, np.ndarray]:
        """Return the tokens' own rows of a value that experts share, by part of the text; nothing is read yet.

        Raises:
            CacheMismatch: the cache has no such value, or its file is missing or damaged.
        """
        name = self.manifest.rows.get(value)
        if name is None:
            raise CacheMismatch(
                f"{self.folder} has no rows of '{value}', which experts read; {_CALIBRATE_AGAIN}, or leave the experts "
                "as they are with --experts none."
            )
        with self._reading(name) as path:
            return open_rows(path)

    def read_maxima(self) -> dict[str, Tensor]:
        """Return the largest keys and values, [channels] float32 by name.

        Raises:
            CacheMismatch: their file is missing or damaged.
        """
        with self._reading(_MAXIMA) as path:
            return load_file(path)

    def read_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the windows that the statistics come from: calibration and held out, each [windows, length] int64.

        Raises:
            CacheMismatch: their file is missing or damaged, or the statistics come from samples.
        """
        if self.manifest.key.seq_len is None:
            raise CacheMismatch(f"{self.folder} comes from samples and has no text; calibrate on text (--dataset).")
        with self._reading(_TOKENS) as path:
            windows = load_arrays(path)
            return _windows(windows, "calibration"), _windows(windows, "held_out")


@dataclass(frozen=True, slots=True)
class CacheWriter:
    """Fills the scratch folder of a new cache; several processes may fill one, each its own activations."""

    folder: Path
    files: Mapping[str, str]
    """File by activation."""
    rows: Mapping[str, str] = field(default_factory=dict)
    """File by value of which experts share the tokens' own rows."""
    weighted: set[str] = field(default_factory=set)
    """The activations whose weighted statistics this process has written."""

    @classmethod
    def of(cls, folder: Path, activations: Iterable[str], rows: Iterable[str] = ()) -> CacheWriter:
        """Return a writer of ``activations`` and ``rows``, whose files are numbered in this order."""
        files = {name: f"{index:04d}.safetensors" for index, name in enumerate(activations)}
        return cls(folder, files, {name: f"rows-{index:04d}.safetensors" for index, name in enumerate(rows)})

    def write(self, activation: str, stats: ActivationStats) -> None:
        """Save one activation's statistics."""
        tensors = _both_as_tensors(stats)
        with self.place_for(self.files[activation]) as path:
            save_file(tensors, path, {"activation": activation})

    def write_weighted(self, activation: str, stats: SearchStats) -> None:
        """Save the statistics of one activation whose tokens are weighted."""
        tensors = _both_as_tensors(stats.tokens)
        tensors |= {f"{_CHANNELS}{site}": weights for site, weights in stats.channel_weights.items()}
        tensors |= {f"{_OUTPUTS}{site}": gram for site, gram in stats.output_grams.items()}
        if stats.token_weights is not None:
            tensors["calibration.weights"] = stats.token_weights.calibration
            tensors["held_out.weights"] = stats.token_weights.held_out
        with self.place_for(weighted_file(self.files[activation])) as path:
            save_file(tensors, path, {"activation": activation})
        self.weighted.add(activation)

    def write_maxima(self, maxima: Mapping[str, Tensor]) -> Path:
        """Save the largest keys and values by name; return the file."""
        with self.place_for(_MAXIMA) as path:
            save_file(dict(maxima), path)
        return self.folder / _MAXIMA

    def write_tokens(self, calibration: np.ndarray, held_out: np.ndarray) -> None:
        """Save the token windows, so that a later pass can see exactly the same text."""
        with self.place_for(_TOKENS) as path:
            save_arrays({"calibration": calibration, "held_out": held_out}, path)

    @contextmanager
    def place_for(self, name: str) -> Iterator[Path]:
        """Give the block the path to write the file ``name`` to; raise UserError where the disk is full."""
        try:
            yield self.folder / name
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"The calibration cache can't be written to {self.folder.parent} ({error}); free space there, or "
                "choose another place with --cache_dir."
            ) from error


@contextmanager
def new_cache(
    folder: Path,
    key: CacheKey,
    activations: Iterable[str],
    rows: Iterable[str] = (),
    *,
    overwrite: bool,
    samples: Iterable[str] = (),
) -> Iterator[CacheWriter]:
    """Write a cache of ``activations``, which gets its place when the block ends without an error.

    Where the block fails, its files stay in a scratch folder and are there the next time.

    Args:
        folder: where it will lie.
        key: what it is made from.
        activations: names of all that the block will write.
        rows: names of the values whose tokens' own rows it will write.
        overwrite: whether a cache that is there is replaced.
        samples: sha256 of each sample that it is made from.

    Raises:
        UserError: the folder exists and ``overwrite`` is off, or it is not a cache, or can't be written.
    """
    require_place(folder)
    with atomic_directory(folder, overwrite=overwrite, option="--cache_dir", kept=True) as scratch:
        writer = CacheWriter.of(scratch, activations, rows)
        yield writer
        weighted = tuple(sorted(writer.weighted))
        manifest = Manifest(
            key=key, files=dict(writer.files), rows=dict(writer.rows), samples=tuple(samples), weighted=weighted
        )
        with writer.place_for(MANIFEST) as path:
            path.write_bytes(_MANIFESTS.dump_json(manifest, indent=1))


def require_place(folder: Path) -> None:
    """Raise UserError when no cache can be made in ``folder``, or when it holds anything else."""
    require_creatable(folder, option="--cache_dir")
    if not is_occupied(folder):
        return
    others = [] if folder.is_file() else [entry for entry in folder.iterdir() if not _is_of_cache(entry)]
    if others or not (folder / MANIFEST).is_file():
        what = others[0].name if others else "no manifest.json"
        raise UserError(
            f"--cache_dir {folder} is not a calibration cache (it holds {what}) and is never replaced; choose "
            "another path."
        )


def _is_of_cache(entry: Path) -> bool:
    return entry.is_file() and entry.suffix in (".json", ".safetensors")


def find_cache(folder: Path) -> CalibrationCache | None:
    """Return the cache in ``folder``, or None where there is none.

    Raises:
        CacheMismatch: the folder holds something that is not a readable cache of this version.
    """
    folder = reachable(folder)
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        written = _written(path)
        content = path.read_bytes()
        if _is_earlier(content):
            raise CacheMismatch(
                f"{path} was written by an earlier version, whose statistics count all tokens alike; "
                f"{_CALIBRATE_AGAIN}."
            )
        manifest = _MANIFESTS.validate_json(content)
    except OSError as error:
        raise CacheMismatch(f"{path} can't be read ({error.strerror}); get the right to read it.") from error
    except ValidationError as error:
        raise CacheMismatch(f"{path} was written by another version or is damaged; {_CALIBRATE_AGAIN}.") from error
    if manifest.format != _FORMAT:
        raise CacheMismatch(f"{path} has format {manifest.format}, not {_FORMAT}; {_CALIBRATE_AGAIN}.")
    for name in (*manifest.files.values(), *manifest.rows.values()):
        if Path(name).name != name or "\0" in name:
            raise CacheMismatch(f"{path} names the file '{name}', which isn't in its folder; {_CALIBRATE_AGAIN}.")
    return CalibrationCache(folder, manifest, written)


def _written(manifest: Path) -> int | None:
    try:
        return manifest.stat().st_mtime_ns
    except OSError:
        return None


def _is_earlier(manifest: bytes) -> bool:
    """Return whether it has the format of an earlier version."""
    try:
        return _VERSIONS.validate_json(manifest).format in _EARLIER
    except ValidationError:
        return False


def open_cache(folder: Path, model_fingerprint: str) -> CalibrationCache:
    """Return the cache in ``folder`` if it belongs to the model.

    Raises:
        CacheMismatch: there is none, or it was made from another model.
    """
    cache = find_cache(folder)
    if cache is None:
        raise CacheMismatch(f"--cache_dir {folder} holds no calibration cache; run stages.calibrate first.")
    if cache.manifest.key.model_fingerprint != model_fingerprint:
        raise CacheMismatch(
            f"--cache_dir {folder} was made from another model (or another build of it); delete it, or choose another "
            "folder."
        )
    return cache


class _Damage(Exception):
    """Carries what is wrong with a file that safetensors can read."""


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise _Damage(what)


def _windows(found: Mapping[str, np.ndarray], part: str) -> np.ndarray:
    _need(part in found, f"it has no {part}")
    windows = found[part]
    _need(windows.ndim == 2 and windows.dtype == np.int64 and windows.size > 0, f"its {part} is not a table of tokens")
    _need(int(windows.min()) >= 0, f"its {part} has tokens below 0")
    return windows


def _load(path: Path) -> dict[str, Tensor]:
    """Return the file's tensors; all of it stays in memory while one that isn't a copy is used."""
    return {name: each if name.endswith(_TRIANGLE) else each.clone() for name, each in load_file(path).items()}


def _activation_stats(tensors: Mapping[str, Tensor]) -> ActivationStats:
    return ActivationStats(calibration=_token_stats(tensors, "calibration"), held_out=_token_stats(tensors, "held_out"))


def _token_stats(tensors: Mapping[str, Tensor], part: str) -> TokenStats:
    abs_mean = _floats(tensors, f"{part}.abs_mean", rank=1)
    assert abs_mean is not None
    size = len(abs_mean)
    gram, rows = _gram(tensors, part, size), _floats(tensors, f"{part}.rows", rank=2, optional=True)
    _need((gram is None) != (rows is None), f"it needs {part}.gram_triangle or {part}.rows")
    _need(rows is None or rows.shape[1] == size, f"{part}.rows doesn't fit {part}.abs_mean of {size}")
    return TokenStats(num_tokens=_count(tensors, f"{part}.num_tokens"), abs_mean=abs_mean, gram=gram, rows=rows)


def _weights(tensors: Mapping[str, Tensor], part: str) -> Tensor:
    found = _floats(tensors, f"{part}.weights", rank=2)
    assert found is not None
    return found


def _by_site(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def weighted_file(name: str) -> str:
    """Return the file with the weighted statistics of the activation whose others are in the file ``name``."""
    return f"weighted-{name}"


def _count(tensors: Mapping[str, Tensor], name: str) -> int:
    _need(name in tensors, f"it has no {name}")
    tensor = tensors[name]
    _need(tensor.numel() == 1 and not tensor.is_floating_point() and int(tensor) >= 0, f"{name} is not a count")
    return int(tensor)


def _gram(tensors: Mapping[str, Tensor], part: str, size: int) -> Tensor | None:
    packed = _floats(tensors, f"{part}{_TRIANGLE}", rank=2, optional=True)
    if packed is None:
        return None
    wanted = (-(-size // 2), size + 1)
    _need(packed.shape == wanted, f"{part}.gram_triangle doesn't fit {part}.abs_mean of {size}")
    return unpack_symmetric(packed)


def _floats(tensors: Mapping[str, Tensor], name: str, *, rank: int, optional: bool = False) -> Tensor | None:
    _need(optional or name in tensors, f"it has no {name}")
    tensor = tensors.get(name)
    if tensor is not None:
        _need(
            tensor.ndim == rank and tensor.is_floating_point(), f"{name} is not a {rank}-dimensional tensor of floats"
        )
        _need(all_finite(tensor), f"{name} holds NaN or infinite values")
    return tensor


def _both_as_tensors(stats: ActivationStats) -> dict[str, Tensor]:
    return _as_tensors("calibration", stats.calibration) | _as_tensors("held_out", stats.held_out)


def _as_tensors(part: str, stats: TokenStats) -> dict[str, Tensor]:
    named = {
        "num_tokens": stats.abs_mean.new_tensor(stats.num_tokens).long(),
        "abs_mean": stats.abs_mean,
        "gram_triangle": None if stats.gram is None else pack_symmetric(stats.gram),
        "rows": stats.rows,
    }
    return {f"{part}.{name}": tensor for name, tensor in named.items() if tensor is not None}
