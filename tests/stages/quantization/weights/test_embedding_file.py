"""An embedding's file: exact, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stages.errors import OptionError
from stages.quantization.weights import embedding_file
from stages.quantization.weights.embedding_file import TableFile
from tests.support.embeddings import plan_of, random_table, rounded


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("axis", [0, 1])
def test_codes_and_scales_come_back_exactly(tmp_path: Path, dtype: str, axis: int) -> None:
    plan = plan_of(37, 41, dtype=dtype, axis=axis)
    stored = rounded(plan, random_table(plan))
    file = TableFile(tmp_path / "table.safetensors", plan)
    assert not file.is_finished()
    file.write(stored)
    assert file.is_finished()
    assert torch.equal(file.read_packed(), stored.packed)
    scales = file.read_scales()
    assert scales.dtype == stored.scales.dtype
    assert torch.equal(scales, stored.scales)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(8, 16)

    def fails(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedding_file, "save_file", fails)
    with pytest.raises(KeyboardInterrupt):
        TableFile(tmp_path / "table.safetensors", plan).write(rounded(plan, random_table(plan)))
    assert list(tmp_path.iterdir()) == []


def test_missing_and_damaged_files_say_what_to_do(tmp_path: Path) -> None:
    plan = plan_of(8, 16)
    file = TableFile(tmp_path / "table.safetensors", plan)
    with pytest.raises(OptionError, match=r"run stages\.quantize again"):
        file.read_scales()
    file.write(rounded(plan, random_table(plan)))
    file.path.write_bytes(file.path.read_bytes()[:60])
    with pytest.raises(OptionError, match="damaged"):
        file.read_packed()
