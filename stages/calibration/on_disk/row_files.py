"""Keep the tokens' own rows of an activation in a safetensors file that is filled, and later read, piece by piece."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Shaped
from torch import Tensor

from stages.errors import SolveError
from stages.model.weights import all_finite

_TYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_NOTHING: Mapping[str, int] = MappingProxyType({})
_LENGTH = 8
"""Bytes of a safetensors file before its header: the header's length."""


class RowsWriter:
    """Fills the file of one activation, batch after batch; no batch stays in memory.

    Args:
        path: the file, which is made when the first batch comes.
        activation: the tapped value's name, for messages.
        counts: rows that will come, by part of the text.
        filled: those that an earlier run has put into the file.
    """

    def __init__(
        self, path: Path, activation: str, counts: Mapping[str, int], filled: Mapping[str, int] = _NOTHING
    ) -> None:
        self._path, self._activation, self._counts = path, activation, counts
        self._parts: dict[str, np.ndarray] = open_rows(path, mode="r+") if any(filled.values()) else {}
        self._filled = dict.fromkeys(counts, 0) | dict(filled)

    def add(self, part: str, batch: Shaped[Tensor, "*tokens K"]) -> None:
        """Append a batch.

        Raises:
            OSError: the disk is full.
            SolveError: it holds NaN or infinite values.
        """
        rows = batch.reshape(-1, batch.shape[-1]).cpu()
        if not all_finite(rows):
            raise SolveError(
                f"The activation '{self._activation}' holds NaN or infinite values; run a float32 build of the base "
                "model, or another execution provider."
            )
        numbers = rows.numpy()
        if not self._parts:
            self._parts = _create(self._path, self._counts, numbers.shape[1], numbers.dtype)
        start = self._filled[part]
        self._parts[part][start : start + len(numbers)] = numbers
        self._filled[part] = start + len(numbers)


def _create(path: Path, counts: Mapping[str, int], columns: int, dtype: np.dtype[Any]) -> dict[str, np.ndarray]:
    """Make a file of zeros that takes its whole place on the disk, and return its parts, which write through."""
    header, begin = {}, 0
    for part, rows in counts.items():
        end = begin + rows * columns * dtype.itemsize
        header[part] = {"dtype": _NAMES[dtype], "shape": [rows, columns], "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _LENGTH)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH, "little") + text)
        for rows in counts.values():
            for _ in range(rows):
                file.write(bytes(columns * dtype.itemsize))
    return open_rows(path, mode="r+")


def open_rows(path: Path, mode: str = "r") -> dict[str, np.ndarray]:
    """Return the rows of each part, [tokens, K], which are read from the file where they are looked at.

    Raises:
        OSError: the file can't be read.
        ValueError: it is no such file, or cut short.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        header = json.loads(file.read(length))
    parts: dict[str, np.ndarray] = {}
    for part, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype, shape = _TYPES[entry["dtype"]], tuple(entry["shape"])
        if end - begin != prod(shape) * dtype.itemsize:
            raise ValueError(f"its {part} doesn't fit its shape")
        place = _LENGTH + length + begin
        parts[part] = np.memmap(path, dtype, "r+" if mode == "r+" else "r", place, shape)
    return parts
