"""Sums are exact, the smaller form is kept, and a packed symmetric matrix comes back as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.calibration.statistics import StatisticsAccumulator, StatisticsSize, pack_symmetric, unpack_symmetric
from stages.errors import SolveError

CPU = torch.device("cpu")


def _size(in_features: int, tokens: int, itemsize: int = 2) -> StatisticsSize:
    return StatisticsSize(in_features=in_features, tokens=tokens, itemsize=itemsize)


def _accumulate(tokens: torch.Tensor, planned: int):
    accumulator = StatisticsAccumulator("x", _size(tokens.shape[-1], planned), CPU)
    for batch in torch.split(tokens, 7):
        accumulator.add(batch.reshape(1, *batch.shape))
    return accumulator.finish()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_streamed_sums_equal_the_float64_sums_over_all_tokens(dtype: torch.dtype) -> None:
    # Loud float16 channels: a float16 Gram would overflow, a float16 mean would stall.
    tokens = (torch.randn(100, 12, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.01, 900, 12)).to(
        dtype
    )
    stats = _accumulate(tokens, planned=100)
    exact = tokens.double().numpy()
    assert stats.gram is not None
    assert stats.rows is None
    assert stats.gram.dtype == torch.float32
    assert stats.num_tokens == 100
    scale = np.sqrt(np.outer(np.square(exact).mean(0), np.square(exact).mean(0)))
    # float32 sums of 100 products, relative to what Cauchy-Schwarz allows for the entry.
    assert np.abs((stats.gram.double().numpy() - exact.T @ exact / 100) / scale).max() < 1e-5
    np.testing.assert_allclose(stats.abs_mean.numpy(), np.abs(exact).mean(0), rtol=1e-6)


def test_rows_are_kept_in_the_models_type_where_they_are_fewer_than_channels() -> None:
    tokens = torch.randn(9, 12).half()
    stats = _accumulate(tokens, planned=9)
    assert stats.gram is None
    assert stats.rows is not None
    assert torch.equal(stats.rows, tokens)


@pytest.mark.parametrize("planned", [5, 100])
def test_an_activation_that_no_token_came_to_is_silent(planned: int) -> None:
    accumulator = StatisticsAccumulator("x", _size(12, planned), CPU)
    accumulator.add(torch.zeros(0, 12))
    stats = accumulator.finish()
    assert stats.num_tokens == 0
    assert stats.is_silent
    assert torch.equal(stats.abs_mean, torch.zeros(12))
    found = stats.gram if planned > 12 else stats.rows
    assert found is not None
    assert torch.equal(found, torch.zeros(12, 12) if planned > 12 else torch.zeros(0, 12))
    other = StatisticsAccumulator("x", _size(12, planned), CPU)
    other.add(torch.ones(1, 12))
    assert not other.finish().is_silent


@pytest.mark.parametrize(
    ("in_features", "tokens", "itemsize", "keeps_rows", "memory"),
    [
        (100, 99, 2, True, 99 * 100 * 2),
        (100, 100, 2, False, 100 * 100 * 4),  # as many as channels: no cheaper to multiply with
        (100, 50, 4, True, 50 * 100 * 4),
        (100, 51, 4, False, 100 * 100 * 4),  # fewer than channels, but larger than half a matrix
    ],
)
def test_the_smaller_form_is_kept_where_it_is_cheaper_too(
    in_features: int, tokens: int, itemsize: int, keeps_rows: bool, memory: int
) -> None:
    size = _size(in_features, tokens, itemsize)
    assert (size.keeps_rows, size.memory) == (keeps_rows, memory)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_name_the_activation(bad: float) -> None:
    tokens = torch.zeros(3, 4)
    tokens[1, 2] = bad
    with pytest.raises(SolveError, match="'x' holds NaN or infinite values"):
        _accumulate(tokens, planned=3)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 33, 1024, 2050])
def test_unpacking_gives_back_the_matrix(size: int) -> None:
    """The largest have several strips to mirror, of which the last is a short one."""
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(size))
    matrix = (x.T @ x).tril()
    matrix = matrix + matrix.tril(-1).T
    packed = pack_symmetric(matrix)
    assert packed.shape == (-(-size // 2), size + 1)
    assert torch.equal(unpack_symmetric(packed), matrix)


def test_files_hold_the_lower_triangle_in_this_order() -> None:
    """Caches that are there already must stay readable."""
    matrix = torch.arange(1.0, 17).reshape(4, 4)
    assert pack_symmetric(matrix).tolist() == [[1, 16, 15, 14, 13], [5, 6, 11, 10, 9]]
    assert pack_symmetric(matrix[:3, :3]).tolist() == [[1, 11, 10, 9], [5, 6, 6, 5]]


def test_on_the_disk_lies_half_a_gram_matrix_or_the_rows() -> None:
    assert StatisticsSize(in_features=8, tokens=100, itemsize=2).disk == 4 * (8 * 9 // 2)
    assert StatisticsSize(in_features=8, tokens=3, itemsize=2).disk == 3 * 8 * 2


@pytest.mark.parametrize("tokens", [4, 1000], ids=["rows", "gram"])
def test_an_accumulator_goes_on_with_the_same_bits(tokens: int) -> None:
    size = StatisticsSize(in_features=300, tokens=tokens, itemsize=4)
    whole, first, second = (StatisticsAccumulator("x", size, torch.device("cpu")) for _ in range(3))
    batches = torch.randn(3, 2, 300)
    for batch in batches:
        whole.add(batch)
    for batch in batches[:2]:
        first.add(batch)
    second.go_on(first.state())
    second.add(batches[2])
    expected, found = whole.finish(), second.finish()
    assert found.num_tokens == expected.num_tokens
    for name in ("abs_mean", "gram", "rows"):
        one, other = getattr(expected, name), getattr(found, name)
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
