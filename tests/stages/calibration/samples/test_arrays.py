"""Which samples a file of arrays holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from stages.calibration.samples.arrays import read_arrays
from stages.errors import UserError

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def given(name: str, shape: list[int | str] | None, dtype: ir.DataType = FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=None if shape is None else ir.Shape(shape), type=ir.TensorType(dtype))


def inputs(*values: ir.Value) -> dict[str, ir.Value]:
    return {str(value.name): value for value in values}


PIXELS = inputs(given("pixel_values", ["batch", 3, 4, 4]))
PATCHES = inputs(given("pixel_values", ["num_patches", 8]), given("image_grid_thw", ["num_images", 3], INT64))
TEXT = inputs(given("input_ids", ["b", "s"], INT64), given("attention_mask", ["b", "s"], INT64))


def saved(folder: Path, **arrays: np.ndarray) -> Path:
    np.savez(folder / "x.npz", **arrays)
    return folder / "x.npz"


def test_rows_are_samples_where_the_first_axis_counts_them(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).standard_normal((5, 3, 4, 4))
    found = list(read_arrays(saved(tmp_path, pixel_values=pixels, labels=np.arange(5)), PIXELS))
    assert [set(sample) for sample in found] == [{"pixel_values"}] * 5
    np.testing.assert_array_equal(np.concatenate([sample["pixel_values"] for sample in found]), pixels)


def test_a_file_without_the_first_axis_is_a_sample(tmp_path: Path) -> None:
    (found,) = read_arrays(saved(tmp_path, pixel_values=np.zeros((3, 4, 4))), PIXELS)
    assert found["pixel_values"].shape == (1, 3, 4, 4)


def test_patches_of_an_image_stay_together(tmp_path: Path) -> None:
    file = saved(tmp_path, pixel_values=np.zeros((6, 8)), image_grid_thw=np.array([[1, 2, 3]]))
    (found,) = read_arrays(file, PATCHES)
    assert found["pixel_values"].shape == (6, 8)
    only = saved(tmp_path, pixel_values=np.zeros((6, 8)))
    assert len(list(read_arrays(only, {"pixel_values": PATCHES["pixel_values"]}))) == 1


def test_inputs_of_open_rank_take_a_file_as_it_is(tmp_path: Path) -> None:
    (found,) = read_arrays(saved(tmp_path, x=np.zeros((2, 7))), inputs(given("x", None)))
    assert found["x"].shape == (2, 7)


def test_a_fixed_batch_takes_as_many_rows(tmp_path: Path) -> None:
    fixed = inputs(given("x", [2, 4]))
    assert [sample["x"].shape for sample in read_arrays(saved(tmp_path, x=np.zeros((6, 4))), fixed)] == [(2, 4)] * 3
    with pytest.raises(UserError, match="has 5 rows, and the graph takes 2"):
        list(read_arrays(saved(tmp_path, x=np.zeros((5, 4))), fixed))


def test_npy_holds_the_only_input(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 3, 4, 4)))
    assert len(list(read_arrays(tmp_path / "x.npy", PIXELS))) == 2
    with pytest.raises(UserError, match=r"holds one array, and the graph has 2 inputs"):
        list(read_arrays(tmp_path / "x.npy", TEXT))


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (
            {"pixels": np.zeros((1, 3, 4, 4))},
            "holds pixels and none of the graph's inputs; name its arrays pixel_values",
        ),
        ({"pixel_values": np.zeros((1, 3, 5, 4))}, r"has shape \[1, 3, 5, 4\], and the graph takes \[batch, 3, 4, 4\]"),
        ({"pixel_values": np.full((1, 3, 4, 4), np.nan)}, "NaN"),
        ({"pixel_values": np.array([["a"]])}, "not numbers"),
    ],
)
def test_arrays_that_do_not_fit_are_named(arrays: dict[str, np.ndarray], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        list(read_arrays(saved(tmp_path, **arrays), PIXELS))


def test_floats_in_place_of_tokens_are_refused(tmp_path: Path) -> None:
    file = saved(tmp_path, input_ids=np.ones((1, 3)), attention_mask=np.ones((1, 3), np.int64))
    with pytest.raises(UserError, match="input_ids holds float64, and the graph takes INT64"):
        list(read_arrays(file, TEXT))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"text"])
def test_a_damaged_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.npz can't be read as npz"):
        list(read_arrays(tmp_path / "x.npz", PIXELS))


def test_pickled_objects_are_never_run(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", pixel_values=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match=r"x\.npz can't be read as npz"):
        list(read_arrays(tmp_path / "x.npz", PIXELS))
