"""Pack codes into bytes and unpack them, four-bit ones two to a byte, low nibble first as in ONNX; turn matrices."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Int8, Shaped, UInt8
from torch import Tensor

_LIMITS = {np.dtype(np.int8): (-8, 7), np.dtype(np.uint8): (0, 15)}
_SIGN = 8
_BYTES = 1 << 17
"""Of packed codes that are made at once: temporaries stay in a core's own cache."""
_WORD, _TILE_ROWS, _TILE_COLUMNS = 4, 1024, 256


def pack_4bit(
    codes: Int8[np.ndarray, "*shape"] | UInt8[np.ndarray, "*shape"] | Int8[Tensor, "*shape"] | UInt8[Tensor, "*shape"],
) -> UInt8[np.ndarray, " bytes"]:
    """Pack codes in C order; an odd count is padded with one zero nibble.

    Args:
        codes: int8 codes in [-8, 7], or uint8 codes in [0, 15], any shape, on the CPU.

    Returns:
        ceil(count / 2) bytes: code 2i in the low nibble of byte i, code 2i + 1 in the high one.

    Raises:
        ValueError: a code doesn't fit four bits.
    """
    flat = np.ascontiguousarray(codes).reshape(-1)
    _require_range(flat)
    nibbles = flat.view(np.uint8)
    packed = np.empty(-(-flat.size // 2), np.uint8)
    for part in slices(flat.size // 2, _BYTES):
        pairs = nibbles[2 * part.start : 2 * part.stop].view("<u2") & 0x0F0F
        pairs |= pairs >> 4
        packed[part] = pairs.astype(np.uint8)  # which drops the upper byte
    if flat.size % 2:
        packed[-1] = nibbles[-1] & 0x0F
    return packed


def pack_4bit_turned(
    codes: Int8[Tensor, "rows columns"] | UInt8[Tensor, "rows columns"],
) -> UInt8[np.ndarray, " bytes"]:
    """Pack the transposed matrix: ``pack_4bit(codes.T)``, without one of a code a byte.

    Args:
        codes: as in ``pack_4bit``.

    Raises:
        ValueError: a code doesn't fit four bits.
    """
    if codes.shape[0] % 2:
        return pack_4bit(codes.T)
    rows = np.empty((codes.shape[0] // 2, codes.shape[1]), np.uint8)
    for part in slices(len(rows), max(1, _BYTES // codes.shape[1])):
        pairs = codes[2 * part.start : 2 * part.stop].numpy()
        _require_range(pairs)
        nibbles = pairs.view(np.uint8)
        np.left_shift(nibbles[1::2], 4, out=rows[part])
        rows[part] |= nibbles[0::2] & 0x0F
    return turned(rows).reshape(-1)


def turned(matrix: Shaped[np.ndarray, "rows columns"]) -> Shaped[np.ndarray, "columns rows"]:
    """Return the transposed matrix of bytes, in C order.

    Four bytes are moved as one, a tile that fits a core's own cache at a time: three times as fast as one by one.
    """
    height, width = matrix.shape
    result = np.empty((width, height), matrix.dtype)
    whole = width - width % _WORD
    source, target = matrix.view(np.uint8), result.view(np.uint8)
    for rows in slices(height, _TILE_ROWS):
        for columns in slices(whole, _TILE_COLUMNS):
            words = np.array(source[rows, columns], order="C").view(np.int32)
            planes = torch.from_numpy(words).T.contiguous().numpy().view(np.uint8).reshape(*words.T.shape, _WORD)
            place = target[columns, rows]
            place.reshape(len(place) // _WORD, _WORD, -1)[:] = planes.transpose(0, 2, 1)
    target[whole:] = source[:, whole:].T
    return result


def _require_range(codes: np.ndarray) -> None:
    smallest, largest = _LIMITS[codes.dtype]
    if codes.size and (codes.min() < smallest or codes.max() > largest):
        raise ValueError(f"codes lie in [{codes.min()}, {codes.max()}], four bits hold [{smallest}, {largest}]")


def slices(count: int, step: int) -> list[slice]:
    """Return ``count`` rows in slices of ``step`` each; the last may be shorter."""
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def unpack_4bit(
    packed: UInt8[np.ndarray, " bytes"], shape: tuple[int, ...], dtype: np.dtype[np.int8] | np.dtype[np.uint8]
) -> Int8[np.ndarray, "*shape"] | UInt8[np.ndarray, "*shape"]:
    """Undo ``pack_4bit``.

    Args:
        packed: the bytes.
        shape: that of the codes.
        dtype: int8 for codes in [-8, 7], uint8 for codes in [0, 15].

    Raises:
        ValueError: ``packed`` doesn't hold exactly ``shape``'s codes.
    """
    count = int(np.prod(shape))
    if packed.size != -(-count // 2):
        raise ValueError(f"{packed.size} bytes can't hold {count} four-bit codes of shape {shape}")
    pairs = packed.astype("<u2")
    pairs |= pairs << 4
    pairs &= 0x0F0F
    codes = pairs.view(np.uint8)[:count].reshape(shape)
    return codes if dtype == np.uint8 else signed_4bit(codes)


def signed_4bit(nibbles: UInt8[np.ndarray, "*shape"]) -> Int8[np.ndarray, "*shape"]:
    """Return what four-bit numbers in the lower halves of bytes are as signed ones."""
    moved: np.ndarray = nibbles ^ np.uint8(_SIGN)
    moved -= np.uint8(_SIGN)
    return moved.view(np.int8)


def pack(codes: Int8[Tensor, "*shape"], bits: Literal[4, 8]) -> UInt8[np.ndarray, " bytes"]:
    """Pack signed codes of either width in C order; eight-bit ones are bytes already."""
    return pack_4bit(codes) if bits == 4 else codes.numpy().reshape(-1).view(np.uint8)


def unpack(
    packed: UInt8[np.ndarray, " bytes"], shape: tuple[int, ...], bits: Literal[4, 8]
) -> Int8[np.ndarray, "*shape"]:
    """Undo ``pack``.

    Args:
        packed: the bytes.
        shape: that of the codes.
        bits: of a code.

    Raises:
        ValueError: ``packed`` doesn't hold exactly ``shape``'s codes.
    """
    return packed.view(np.int8).reshape(shape) if bits == 8 else unpack_4bit(packed, shape, np.dtype(np.int8))
