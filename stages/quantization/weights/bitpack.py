"""Pack codes into bytes and unpack them, four-bit ones two to a byte, low nibble first: ONNX's layout."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Int8, UInt8
from torch import Tensor

_LIMITS = {np.dtype(np.int8): (-8, 7), np.dtype(np.uint8): (0, 15)}


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
    smallest, largest = _LIMITS[flat.dtype]
    if flat.size and (flat.min() < smallest or flat.max() > largest):
        raise ValueError(f"codes lie in [{flat.min()}, {flat.max()}], four bits hold [{smallest}, {largest}]")
    nibbles = flat.view(np.uint8)
    packed = nibbles[0::2] & 0x0F
    packed[: flat.size // 2] |= nibbles[1::2] << 4
    return packed


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
    nibbles = np.empty(2 * packed.size, np.uint8)
    nibbles[0::2] = packed & 0x0F
    nibbles[1::2] = packed >> 4
    codes = nibbles[:count].reshape(shape)
    if dtype == np.int8:
        # Shifting the sign bit to the byte's own and back extends it.
        return (codes << 4).view(np.int8) >> 4
    return codes


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
