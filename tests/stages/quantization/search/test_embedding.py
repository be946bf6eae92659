"""Tables are rounded as weights are, along either axis, and the size of a chunk doesn't change the result."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.quantization.search import embedding
from stages.quantization.search.embedding import quantize_table
from stages.quantization.weights.bitpack import unpack_4bit
from tests.reference.rounding import round_trip
from tests.support.embeddings import dequantized, plan_of, random_table, rounded


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("vocabulary", "hidden"), [(64, 48), (37, 40), (51, 41)])
def test_rounding_matches_the_reference(dtype: str, axis: int, vocabulary: int, hidden: int, bits: int) -> None:
    plan = plan_of(vocabulary, hidden, dtype=dtype, axis=axis, bits=bits)
    table = random_table(plan)
    table[5] = 0
    stored = rounded(plan, table)
    assert stored.scales.shape == plan.scales_shape
    assert stored.scales.dtype == getattr(torch, dtype)
    ours = dequantized(plan, stored)
    along = table if axis == 1 else table.T
    reference = round_trip(along, 16, bits, symmetric=True, scale_type=np.dtype(dtype).type)
    reference = reference if axis == 1 else reference.T
    # float32 against float64: one code may fall on the other side of a tie; nothing else may differ.
    differs = np.abs(ours - reference) > 1e-5 * np.abs(table).max()
    assert differs.mean() < 0.002
    assert np.abs(ours - table).max() < 0.6 * float(stored.scales.max())


@pytest.mark.parametrize("axis", [0, 1])
def test_chunks_do_not_change_the_result(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(1037, 33, axis=axis)
    table = random_table(plan)
    whole = rounded(plan, table)
    monkeypatch.setattr(embedding, "_CHUNK", 256 * 33)
    read: list[int] = []

    def counted(rows: slice) -> torch.Tensor:
        read.append(rows.stop - rows.start)
        return torch.from_numpy(table[rows])

    parts = quantize_table(plan, counted)
    assert read == [256, 256, 256, 256, 13]
    assert torch.equal(parts.packed, whole.packed)
    assert torch.equal(parts.scales, whole.scales)


def test_codes_of_a_hand_made_row_are_packed_low_nibble_first() -> None:
    plan = plan_of(1, 16)
    row = np.array([7, -8, 3.5, 2.5, 0.5, -0.5, 1.5, 0, 1, 2, 3, 4, 5, 6, -1, -2], np.float32)
    stored = rounded(plan, row[None])
    assert stored.scales.tolist() == [[1.0]]
    codes = unpack_4bit(stored.packed.numpy(), (16,), np.dtype(np.int8))
    assert codes.tolist() == [7, -8, 4, 2, 0, 0, 2, 0, 1, 2, 3, 4, 5, 6, -1, -2]
    assert stored.packed[0].item() == 0x87


def test_a_signed_range_gives_the_larger_side_the_level_more() -> None:
    plan = plan_of(1, 16, scale_range="signed")
    row = np.linspace(-7, 8, 16, dtype=np.float32)
    stored = rounded(plan, row[None])
    assert stored.scales.tolist() == [[-1.0]]
    np.testing.assert_array_equal(dequantized(plan, stored)[0], row)


@pytest.mark.parametrize("bits", [4, 8])
def test_format_bytes_are_those_of_the_file(bits: int) -> None:
    for axis in (0, 1):
        plan = plan_of(37, 41, dtype="float16", axis=axis, bits=bits)
        stored = rounded(plan, random_table(plan))
        assert plan.format_bytes == stored.packed.nbytes + stored.scales.nbytes
