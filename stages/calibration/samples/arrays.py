"""Read samples from .npz files, whose names are the graph's inputs, and from .npy files of its only one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from stages.errors import UserError, in_one_line
from stages.records.quantities import counted
from stages.runtime.feeds import Sample

ARRAYS = frozenset({".npz", ".npy"})
_INSIDE_A_SAMPLE = re.compile("patch|token|seq|frame|len|num_|image_count|tile|crop")
"""Names of first axes that don't count samples."""


def read_arrays(file: Path, inputs: Mapping[str, ir.Value]) -> Iterator[Sample]:
    """Yield the samples of a file: its rows where all arrays have as many, and the first axes count samples; else one.

    Args:
        file: .npz or .npy.
        inputs: the graph's, by name.

    Raises:
        UserError: the file can't be read, holds none of the inputs, or an array doesn't fit its input.
    """
    found = {name: _with_first_axis(array, inputs[name]) for name, array in _arrays(file, inputs).items()}
    for name, array in found.items():
        require_fits(str(file), array, inputs[name])
    rows = _rows_of_sample([inputs[name] for name in found])
    lengths = {len(array) if array.ndim else 0 for array in found.values()}
    length = lengths.pop() if len(lengths) == 1 else 0
    if rows is None or length <= rows:
        yield found
        return
    if length % rows:
        raise UserError(f"{file} has {length} rows, and the graph takes {rows} at a time; pass a multiple of that.")
    for start in range(0, length, rows):
        yield {name: array[start : start + rows] for name, array in found.items()}


def _arrays(file: Path, inputs: Mapping[str, ir.Value]) -> dict[str, np.ndarray]:
    try:
        content = np.load(file, allow_pickle=False)
        arrays = {name: content[name] for name in content.files} if file.suffix == ".npz" else {"": content}
    except Exception as error:  # numpy and zipfile raise their own classes for damaged files
        raise UserError(
            f"{file} can't be read as {file.suffix[1:]} ({in_one_line(error)}); save arrays of numbers with numpy."
        ) from error
    if file.suffix == ".npy":
        if len(inputs) != 1:
            raise UserError(
                f"{file} holds one array, and the graph has {counted(len(inputs), 'input')} ({', '.join(inputs)}); "
                "save them by name with numpy.savez."
            )
        return dict(zip(inputs, arrays.values(), strict=True))
    known = {name: array for name, array in arrays.items() if name in inputs}
    if not known:
        raise UserError(
            f"{file} holds {', '.join(arrays) or 'nothing'} and none of the graph's inputs; name its arrays "
            f"{', '.join(inputs)}."
        )
    return known


def _with_first_axis(array: np.ndarray, given: ir.Value) -> np.ndarray:
    """Return the array, with a first axis of length 1 where its input has one axis more."""
    return array[None] if given.shape is not None and array.ndim == len(given.shape) - 1 else array


def require_fits(where: str, array: np.ndarray, given: ir.Value) -> None:
    """Raise UserError where an array can't be what an input holds: by its type, rank or the sizes that are fixed.

    Args:
        where: the array's origin.
        array: what shall be fed; its first axis may count more samples than the graph takes.
        given: the graph's input.
    """
    if array.dtype.kind not in "biuf":
        raise UserError(f"{where}: {given.name} holds {array.dtype}, not numbers; save numbers.")
    if given.dtype is not None and given.dtype.is_integer() and array.dtype.kind == "f":
        raise UserError(
            f"{where}: {given.name} holds {array.dtype}, and the graph takes {given.dtype.name}; save these."
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UserError(f"{where}: {given.name} holds NaN or infinite values; leave that sample out.")
    if given.shape is None:
        return
    wanted = [dim if isinstance(dim, int) else None for dim in given.shape]
    sizes = zip(array.shape[1:], wanted[1:], strict=False)
    if array.ndim != len(wanted) or any(size != dim for size, dim in sizes if dim is not None):
        shape = ", ".join(map(str, given.shape))
        raise UserError(
            f"{where}: {given.name} has shape {list(array.shape)}, and the graph takes [{shape}]; save it so, or "
            "without the first axis."
        )


def _rows_of_sample(inputs: list[ir.Value]) -> int | None:
    """Return how many rows of its arrays the graph takes at a time; None where their first axes don't count samples."""
    first = [given.shape[0] if given.shape is not None and len(given.shape) else None for given in inputs]
    if any(dim is None or (not isinstance(dim, int) and _INSIDE_A_SAMPLE.search(str(dim.value))) for dim in first):
        return None
    fixed = {dim for dim in first if isinstance(dim, int)}
    return 1 if not fixed else fixed.pop() if len(fixed) == 1 else None
