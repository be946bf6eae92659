"""Rows come back as they were added, part by part, from a file that safetensors reads too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stages.calibration.on_disk.row_files import RowsWriter, open_rows
from stages.errors import SolveError

COUNTS = {"held_out": 3, "calibration": 10}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_come_back_as_they_were_added(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = {part: torch.randn(count, 7, generator=generator).to(dtype) for part, count in COUNTS.items()}
    writer = RowsWriter(tmp_path / "rows.safetensors", "x", COUNTS)
    writer.add("held_out", rows["held_out"].view(1, 3, 7))
    writer.add("calibration", rows["calibration"][:6].view(2, 3, 7))
    writer.add("calibration", rows["calibration"][6:])
    found = open_rows(tmp_path / "rows.safetensors")
    for reader in (load_file(tmp_path / "rows.safetensors"), {part: torch.tensor(found[part]) for part in found}):
        assert all(torch.equal(reader[part], rows[part]) for part in COUNTS)


def test_numbers_that_are_none_are_refused_by_name(tmp_path: Path) -> None:
    writer = RowsWriter(tmp_path / "rows.safetensors", "/layers.3/norm", COUNTS)
    with pytest.raises(SolveError, match=r"'/layers\.3/norm' holds NaN"):
        writer.add("held_out", torch.tensor([[1.0, float("nan")]]))


def test_a_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.safetensors"
    RowsWriter(file, "x", COUNTS).add("calibration", torch.ones(2, 5))
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises((OSError, ValueError)):
        open_rows(file)


def test_a_later_run_goes_on_to_fill_the_file(tmp_path: Path) -> None:
    rows, file = torch.randn(10, 7), tmp_path / "rows.safetensors"
    RowsWriter(file, "x", COUNTS).add("calibration", rows[:8])
    RowsWriter(file, "x", COUNTS, {"held_out": 0, "calibration": 6}).add("calibration", rows[6:])
    assert torch.equal(load_file(file)["calibration"], rows)
