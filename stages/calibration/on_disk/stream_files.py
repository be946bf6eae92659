"""Keep what enters each link of a chain in files: a few windows at a time, from one process or several."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from stages.errors import UserError, in_one_line
from stages.system.shared_folder import wait_until


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
    kind: str = "stream"
    """How the files' names begin."""

    def files(self, places: Iterable[int]) -> list[Path]:
        """Return the files of what enters the links at ``places``."""
        return [self._file(place) for place in places]

    def bytes(self, hidden: int) -> int:
        """Return the bytes of what enters all links, with so many channels of each token."""
        return len(self.names) * self.windows * self.length * hidden * torch.float32.itemsize

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

    def wait_until_whole(self, places: Iterable[int], hidden: int) -> None:
        """Wait until this machine sees what all processes have kept of what enters the links at ``places``.

        Args:
            places: in the chain.
            hidden: channels of each token.

        Raises:
            UserError: it doesn't.
        """
        size = self.bytes(hidden) // len(self.names)
        for file in self.files(places):
            wait_until(partial(_has, file, size), file)

    def read(self, place: int, windows: Int64[Tensor, " batch"]) -> Float[Tensor, "batch length hidden"]:
        """Return what enters the link at ``place`` of some windows; all must have been kept.

        Args:
            place: of the link.
            windows: their numbers.

        Raises:
            UserError: the file is gone or cut short.
        """
        file = self._file(place)
        try:
            size = file.stat().st_size
            if size == 0 or size % (self.windows * self.length * torch.float32.itemsize):
                raise self._lost(place, f"it has {size} bytes")
            shape = (self.windows, self.length, size // (self.windows * self.length * torch.float32.itemsize))
            return torch.from_numpy(np.memmap(file, np.float32, "r", shape=shape)[windows.numpy()])
        except OSError as error:
            raise self._lost(place, in_one_line(error)) from error

    def remove(self, places: Iterable[int]) -> None:
        """Remove what was kept of what enters the links at ``places``."""
        for place in places:
            self._file(place).unlink(missing_ok=True)

    def _lost(self, place: int, why: str) -> UserError:
        return UserError(
            f"{self._file(place)}, which this calibration has written, is missing or damaged ({why}); let nothing "
            "remove files there, and run the same command again."
        )

    def _file(self, place: int) -> Path:
        return self.folder / f"{self.kind}-{place}.bin"


def _has(file: Path, size: int) -> bool:
    try:
        return file.stat().st_size == size
    except FileNotFoundError:
        return False
