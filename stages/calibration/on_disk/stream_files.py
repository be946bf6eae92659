"""Keep what enters each link of a chain in files: a few windows at a time, from one process or several."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stages.errors import UserError, in_one_line


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamFiles:
    """A file of float32 numbers for each link, by its place in the chain, in a folder that all processes see."""

    folder: Path
    names: tuple[str, ...]
    """The graph's values that enter the links, in order."""
    windows: int
    """Of the whole text."""
    length: int
    """Tokens of each."""

    def files(self, places: Iterable[int]) -> list[Path]:
        """Return the files of what enters the links at ``places``."""
        return [self._file(place) for place in places]

    def has(self, place: int) -> bool:
        """Return whether anything was kept of what enters the link at ``place``."""
        return self._file(place).is_file()

    def keep(self, place: int, first: int, stream: Float[Tensor, "windows length hidden"]) -> None:
        """Keep what enters the link at ``place`` of some windows.

        Args:
            place: of the link.
            first: number of the first of these windows.
            stream: what enters it.

        Raises:
            UserError: the disk is full.
        """
        values = stream.detach().cpu().float().contiguous().numpy()
        try:
            with suppress(FileExistsError):  # perhaps made by another machine, and not to be seen here yet
                self.folder.mkdir()
            # Opened without cutting it: other processes write other windows.
            handle = os.open(self._file(place), os.O_CREAT | os.O_WRONLY | getattr(os, "O_BINARY", 0), 0o644)
            with os.fdopen(handle, "wb") as file:
                file.seek(first * values[0].nbytes)
                file.write(values.data)
        except OSError as error:
            raise UserError(
                f"What enters each layer can't be written to {self.folder.parent} ({in_one_line(error)}); free space "
                "there, choose another --cache_dir, or pass --token_weights none."
            ) from error

    def read(self, place: int) -> Float[Tensor, "windows length hidden"]:
        """Return what enters the link at ``place``, all windows.

        Raises:
            UserError: the file is gone or cut short.
        """
        try:
            flat = np.fromfile(self._file(place), np.float32)
        except OSError as error:
            raise self._lost(place, in_one_line(error)) from error
        if flat.size == 0 or flat.size % (self.windows * self.length):
            raise self._lost(place, f"it has {flat.nbytes} bytes")
        return torch.from_numpy(flat).view(self.windows, self.length, -1)

    def take(self, place: int) -> Float[Tensor, "windows length hidden"]:
        """Return what ``read`` returns, and remove the file."""
        stream = self.read(place)
        self._file(place).unlink()
        return stream

    def _lost(self, place: int, why: str) -> UserError:
        return UserError(
            f"{self._file(place)}, which this calibration has written, is missing or damaged ({why}); let nothing "
            "remove files there, and run the same command again."
        )

    def _file(self, place: int) -> Path:
        return self.folder / f"stream-{place}.bin"
