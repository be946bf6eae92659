"""The table says of each build how many sites run fused, and below it why others have no number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from scripts.architectures.matrix import BUILDS, Cell, append_cell, markdown, read_cells
from stages.errors import UserError

DONE = Cell(architecture="A", build="cpu", sites=21, fused=21, divergence=0.0214)
STOPPED = Cell(
    architecture="B", build="cpu", stopped_at="build", reason="KeyError: 'model.layers.3.x'", base_generates=False
)
DESCRIBED = {"A": ("Model A", "tied head"), "B": ("Model B", "experts")}


def rows(*cells: Cell) -> list[list[str]]:
    lines = markdown(cells, DESCRIBED).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def notes(*cells: Cell) -> list[str]:
    return markdown(cells, DESCRIBED).partition("\n\n")[2].splitlines()


def test_a_row_for_each_architecture_with_a_cell_for_each_build() -> None:
    cells = [replace(DONE, build=build) for build in BUILDS] + [STOPPED]
    header, _, first, second = rows(*cells)
    assert [len(row) for row in rows(*cells)] == [len(header)] * 4
    assert first == ["`A`", "Model A", "tied head", *["21 of 21"] * 5, "yes", "0.021"]
    assert second == ["`B`", "Model B", "experts", "stops [1]", *["-"] * 4, "-", "-"]
    assert notes(*cells) == ["1. onnxruntime-genai's builder stops: KeyError: 'model.layers.N.x'."]


def test_equal_reasons_share_a_note_whatever_layer_they_name() -> None:
    other = replace(STOPPED, build="cuda", reason="KeyError: 'model.layers.0.x'")
    third = replace(STOPPED, build="dml", stopped_at="quantize", reason="The base model stops.")
    assert [row[3:6] for row in rows(STOPPED, other, third)][-1] == ["stops [1]", "stops [1]", "stops [2]"]
    assert notes(STOPPED, other, third)[1] == (
        "2. quantization stops; nor does onnxruntime-genai generate with the float model: The base model stops."
    )


def test_long_reasons_are_cut_behind_a_sentence_or_a_word() -> None:
    two = replace(STOPPED, reason=f"The first{' word' * 30}. The second{' word' * 30}.")
    assert notes(two) == [f"1. onnxruntime-genai's builder stops: The first{' word' * 30}."]
    one = replace(STOPPED, reason=f"A{' sentence' * 40}.")
    assert notes(one) == [f"1. onnxruntime-genai's builder stops: A{' sentence' * 26} ..."]


def test_a_quantized_model_that_does_what_its_base_does_has_its_numbers() -> None:
    only_gpu = replace(DONE, stopped_at="generate", reason="No such kernel.", base_generates=False)
    assert rows(only_gpu)[2][3:] == ["21 of 21 [1]", *["-"] * 4, "yes", "0.021"]
    assert notes(only_gpu) == [
        "1. onnxruntime-genai generates with neither the float model nor the quantized one on the CPU: No such kernel."
    ]
    worse = replace(only_gpu, base_generates=True)
    assert rows(worse)[2][3:] == ["stops [1]", *["-"] * 4, "-", "-"]
    assert notes(worse) == ["1. onnxruntime-genai doesn't generate with the quantized model: No such kernel."]


def test_what_stays_as_it_is_and_tokens_that_count_alike_are_said() -> None:
    kept = replace(DONE, fused=None, kept=(("router", 4),), elsewhere=0.5, unweighted="an operator")
    assert rows(kept)[2][3:] == ["not run of 21 [1] [2]", *["-"] * 4, "no", "0.021"]
    assert notes(kept) == ["1. Kept as it is: router.", "2. Experts stay as they are, inside MoE nodes."]


def test_experts_in_qmoe_are_counted_beside_the_matmuls() -> None:
    assert rows(replace(DONE, experts=32))[2][3] == "21 of 21 + 32 in QMoE"


def test_the_last_result_of_a_cell_counts(tmp_path: Path) -> None:
    file = tmp_path / "cells.jsonl"
    for cell in (DONE, STOPPED, replace(DONE, fused=20)):
        append_cell(cell, file)
    assert read_cells(file) == (replace(DONE, fused=20), STOPPED)
    file.write_text("no cell\n")
    with pytest.raises(UserError, match=r"cells\.jsonl can't be read .*; run scripts\.architectures\."):
        read_cells(file)
