"""Define what competitors have in common: a run with a note, what is asked of one method, and their material."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Int64
from numpy import ndarray

from genai_quant.base_models.build import checkpoint_folder
from scripts.options import PeerConfig
from stages.calibration.cache import open_cache
from stages.evaluation.bench.runs import Run
from stages.model.directory import ModelDirectory
from stages.model.load import fingerprint_model

_OUR_BLOCK = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A competitor's run, and what a reader of the table must know of it."""

    run: Run
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRequest:
    """One method of a competitor."""

    method: str
    block_size: int
    use_zero_point: bool

    def name(self, library: str) -> str:
        """Return the run's name: library, method and format."""
        return f"{library}-{self.method}-b{self.block_size}{'-zp' if self.use_zero_point else ''}"


def block_sizes(config: PeerConfig) -> tuple[int, ...]:
    """Return the block sizes that were asked for; where that is left to us, what we choose for the CPU."""
    return tuple(dict.fromkeys(size or _OUR_BLOCK for size in config.block_size))


def zero_points(config: PeerConfig) -> tuple[bool, ...]:
    """Return the choices of zero points; where our own target decides, the others have none."""
    return tuple(dict.fromkeys(map(bool, config.use_zero_point)))


def empty(folder: Path) -> None:
    """Make ``folder`` anew, with nothing in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def calibration_windows(base: ModelDirectory, config: PeerConfig) -> Int64[ndarray, "windows L"]:
    """Return the windows that our own search minimises over.

    Raises:
        UserError: there is no calibration of this model.
    """
    return open_cache(config.cache_path, fingerprint_model(base)).read_tokens()[0]


def float_checkpoint(config: PeerConfig) -> Path:
    """Return where the Hugging Face folder lies that the base was built from."""
    grid = "-grid" if config.builder_keep_grid else ""
    return config.output.absolute() / f"checkpoint-{Path(str(config.builder_source)).name}{grid}"


def make_float_checkpoint(config: PeerConfig) -> None:
    """Make that folder unless it is there: a link, or the weights of a GGUF as ``genai-quant base-model`` changes them.

    Raises:
        UserError: --builder_source can't be found or read.
    """
    kept = float_checkpoint(config)
    if kept.is_dir():
        return
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".checkpoint-") as scratch:
        source, keep_grid = str(config.builder_source), config.builder_keep_grid
        folder, _ = checkpoint_folder(source, Path(scratch), keep_grid=keep_grid)
        if folder.is_relative_to(scratch):
            folder.rename(kept)
        else:
            kept.symlink_to(folder, target_is_directory=True)
