"""How samples are split, and what tells one calibration's from another's."""

from __future__ import annotations

import numpy as np
import pytest

from stages.calibration.samples.samples import SampleCounts, count_samples, sample_digest, split_samples
from stages.errors import UserError


def numbered(count: int) -> list[dict[str, np.ndarray]]:
    return [{"x": np.full((1, 2), number, np.float32)} for number in range(count)]


@pytest.mark.parametrize(
    ("available", "wanted", "expected"),
    [
        (3, None, (1, 1, 1)),
        (10, None, (8, 1, 1)),
        (100, None, (81, 9, 10)),
        (1000, None, (116, 12, 32)),
        (1000, 20, (18, 2, 32)),
        (10, 500, (8, 1, 1)),
    ],
)
def test_a_tenth_is_held_out_and_another_is_kept_for_the_evaluation(
    available: int, wanted: int | None, expected: tuple[int, int, int]
) -> None:
    counts = count_samples(available, wanted, "--samples x")
    assert (counts.calibration, counts.held_out, counts.unseen) == expected


def test_too_few_are_refused() -> None:
    with pytest.raises(UserError, match=r"--samples x gives 2 samples, and at least 3"):
        count_samples(2, None, "--samples x")


def test_no_sample_is_in_two_parts() -> None:
    counts = SampleCounts(calibration=4, held_out=2, unseen=3)
    found = split_samples(numbered(9), counts, source="", tokenizer="")
    parts = [{int(each["x"][0, 0]) for each in part} for part in (found.calibration, found.held_out, found.unseen)]
    assert [len(part) for part in parts] == [4, 2, 3]
    assert set.union(*parts) == set(range(9))
    assert len(found.digests) == 6


def test_samples_with_other_inputs_are_refused() -> None:
    with pytest.raises(UserError, match="a sample with y and one with x"):
        split_samples(
            [*numbered(2), {"y": np.zeros(1)}], SampleCounts(calibration=1, held_out=1, unseen=1), source="f",
            tokenizer="",
        )  # fmt: skip


def test_the_fingerprint_follows_numbers_types_shapes_and_the_split() -> None:
    x = np.arange(4, dtype=np.float32)
    digests = {
        sample_digest({"x": x}),
        sample_digest({"y": x}),
        sample_digest({"x": x.astype(np.float16)}),
        sample_digest({"x": x[None]}),
        sample_digest({"x": x + 1}),
    }
    assert len(digests) == 5
    one, other = (
        split_samples(numbered(6), SampleCounts(calibration=n, held_out=5 - n, unseen=1), source="", tokenizer="")
        for n in (3, 4)
    )
    assert one.fingerprint != other.fingerprint
