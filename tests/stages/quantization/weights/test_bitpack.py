"""Packing is ONNX's layout and has an exact inverse."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from stages.quantization.weights.bitpack import pack_4bit, pack_4bit_turned, turned, unpack_4bit

SHAPES = [(1,), (2,), (7,), (3, 5), (4, 6), (2, 3, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "low", "high"), [(np.int8, -8, 8), (np.uint8, 0, 16)])
def test_unpacking_gives_back_every_code(shape: tuple[int, ...], dtype: type, low: int, high: int) -> None:
    codes = np.random.default_rng(0).integers(low, high, shape).astype(dtype)
    back = unpack_4bit(pack_4bit(codes), shape, np.dtype(dtype))
    assert back.dtype == codes.dtype
    np.testing.assert_array_equal(back, codes)


def test_every_byte_is_kept_by_packing_again() -> None:
    packed = np.arange(256, dtype=np.uint8)
    for dtype in (np.dtype(np.int8), np.dtype(np.uint8)):
        np.testing.assert_array_equal(pack_4bit(unpack_4bit(packed, (512,), dtype)), packed)


def test_the_first_code_is_the_low_nibble_and_an_odd_count_ends_in_zero() -> None:
    np.testing.assert_array_equal(pack_4bit(np.array([1, -1, 7], np.int8)), np.array([0xF1, 0x07], np.uint8))


@pytest.mark.parametrize(("dtype", "onnx_dtype", "low"), [(np.int8, "INT4", -8), (np.uint8, "UINT4", 0)])
def test_onnx_reads_the_bytes_as_the_same_codes(dtype: type, onnx_dtype: str, low: int) -> None:
    codes = np.random.default_rng(1).integers(low, low + 16, (5, 7)).astype(dtype)
    tensor = ir.PackedTensor(pack_4bit(codes), ir.DataType[onnx_dtype], shape=ir.Shape(codes.shape))
    np.testing.assert_array_equal(tensor.numpy().astype(dtype), codes)


def test_a_transposed_tensor_is_packed_in_the_order_that_it_shows() -> None:
    codes = torch.arange(-8, 7, dtype=torch.int8).reshape(3, 5)
    np.testing.assert_array_equal(pack_4bit(codes.T), pack_4bit(np.ascontiguousarray(codes.numpy().T)))


@pytest.mark.parametrize("code", [8, -9])
def test_codes_that_do_not_fit_are_refused(code: int) -> None:
    with pytest.raises(ValueError, match="four bits"):
        pack_4bit(np.array([0, code], np.int8))


def test_bytes_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="can't hold"):
        unpack_4bit(np.zeros(3, np.uint8), (7,), np.dtype(np.int8))


@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (4, 3), (6, 1030), (1030, 262)])
def test_turned_matrices_are_transposed_ones(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).integers(-8, 8, shape).astype(np.int8)
    np.testing.assert_array_equal(turned(matrix), matrix.T)
    np.testing.assert_array_equal(pack_4bit_turned(torch.from_numpy(matrix)), pack_4bit(matrix.T))
    unsigned = (matrix + 8).astype(np.uint8)
    np.testing.assert_array_equal(pack_4bit_turned(torch.from_numpy(unsigned)), pack_4bit(unsigned.T))


def test_a_code_out_of_range_is_no_turned_one_either() -> None:
    with pytest.raises(ValueError, match="four bits hold"):
        pack_4bit_turned(torch.full((4, 4), 16, dtype=torch.uint8))
