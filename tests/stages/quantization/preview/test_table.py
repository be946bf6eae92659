"""Show previews made by hand."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from stages.quantization.preview.table import (
    DiskUse,
    Preview,
    PreviewedSite,
    SearchEstimate,
    SharedRun,
    StageMemory,
    preview_table,
)
from stages.quantization.targets.formats import Explanation

SITE = PreviewedSite(
    name="/model/layers.0/mlp/down_proj/MatMul",
    in_features=96,
    out_features=64,
    format="4b32",
    formats=(),
    bits=4,
    block_size=32,
    zero_point=False,
    why="",
    bytes_before=2_000_000,
    bytes_after=500_000,
    input_scale="linear",
    input_scale_into="/model/layers.0/mlp/up_proj/MatMul",
    input_scale_why="",
    seconds=1.5,
)
PREVIEW = Preview(
    base=Path("base/model.onnx"),
    output=Path("out"),
    recipe="awq_lite INT4 block 32 without zero point",
    sites=(SITE,),
    unquantizable=(),
    embeddings=(),
    unreached=(),
    bits_per_weight=4.5,
    bytes_before=3_000_000,
    bytes_after=1_500_000,
    memory=(StageMemory(stage="search", bytes=7_000_000, holds="the largest group"),),
    disk=DiskUse(calibration=0, weights=2_000_000, output=1_500_000),
    search=SearchEstimate(seconds=12.0, device="cpu", groups=3),
    unspent=None,
    sharing=(
        SharedRun(
            processes=1,
            calibrate_seconds=90.0,
            search_seconds=12.0,
            memory_first=7_000_000_000,
            memory_others=None,
            read=5_000_000_000,
            written=2_000_000_000,
            sent=0,
        ),
        SharedRun(
            processes=8,
            calibrate_seconds=None,
            search_seconds=2.0,
            memory_first=7_000_000_000,
            memory_others=6_100_000_000,
            read=9_000_000_000,
            written=2_000_000_000,
            sent=1_500_000_000,
        ),
    ),
    obstacles=(),
    notes=(),
    target="cpu@1.32",
    target_because="the base names no other",
    formats=(Explanation(option="--lm_head", chosen="8", why="it is fast"),),
)


def _shown(preview: Preview) -> list[str]:
    console = Console(file=StringIO(), width=200)
    console.print(preview_table(preview))
    file = console.file
    assert isinstance(file, StringIO)
    return [" ".join(line.split()) for line in file.getvalue().splitlines() if line.strip()]


def _row(shown: list[str], kind: str) -> str:
    (row,) = (line for line in shown if kind in line)
    return row


def test_sites_that_differ_only_in_their_layer_share_a_row() -> None:
    layers = [replace(SITE, name=SITE.name.replace("layers.0", f"layers.{index}")) for index in (0, 1, 2, 5)]
    shown = _shown(replace(PREVIEW, sites=tuple(layers)))
    assert _row(shown, "down_proj") == "4 x mlp/down_proj 0-2, 5 96 x 64 4b32 8.0 2.0 6.0 into up_proj"
    other = replace(layers[1], format="8b128", bits=8)
    shown = _shown(replace(PREVIEW, sites=(layers[0], other)))
    assert [line for line in shown if "down_proj" in line] == [
        "1 x mlp/down_proj 0 96 x 64 4b32 2.0 0.5 1.5 into up_proj",
        "1 x mlp/down_proj 1 96 x 64 8b128 2.0 0.5 1.5 into up_proj",
    ]


@pytest.mark.parametrize(
    ("changes", "cells"),
    [
        ({"format": "4b32z"}, "4b32z 2.0"),
        ({"why": "--layers_8bit"}, "4b32 (--layers_8bit) 2.0"),
        ({"formats": ("4b128", "4b32"), "why": "--lm_head 4"}, "4b128 / 4b32 (--lm_head 4) 2.0"),
        ({"format": "keep", "bits": None, "why": "--exclude x"}, "keep (--exclude x) 2.0 0.5 into up_proj"),
        ({"input_scale": "mul", "input_scale_why": "no norm"}, "1.5 Mul node: no norm"),
        ({"input_scale": "none"}, "0.5 1.5"),
    ],
)
def test_a_site_s_format_and_input_scale_are_named(changes: dict[str, object], cells: str) -> None:
    assert cells in _row(_shown(replace(PREVIEW, sites=(replace(SITE, **changes),))), "down_proj")


def test_what_concerns_the_whole_model_follows() -> None:
    nodes = tuple((f"/odd/{name}/MatMul", "two inputs vary") for name in "abcdef")
    shown = _shown(replace(PREVIEW, unquantizable=nodes, notes=("a note",), obstacles=("no cache",)))
    assert "3.0 MB -> about 1.5 MB" in _row(shown, "size")
    assert "4.500 a weight of the quantized MatMuls; embeddings aren't counted" in _row(shown, "bits")
    assert "about 7 MB at most: the largest group" in _row(shown, "memory, search")
    assert "6 x two inputs vary:" in _row(shown, "two inputs vary")
    assert "and 2 more" in _row(shown, "two inputs vary")
    assert "a note" in _row(shown, "note")
    assert "no cache" in _row(shown, "not yet")


def test_what_the_target_decided_stands_first() -> None:
    shown = _shown(PREVIEW)
    assert shown[0] == "formats for cpu@1.32"
    assert "--lm_head 8 it is fast" in shown
    assert "target cpu@1.32: the base names no other; choose another with --target" in shown
    assert _shown(replace(PREVIEW, formats=(), target_because=""))[0].startswith("awq_lite INT4 block 32")


def test_a_budget_that_waits_for_statistics_is_the_size_that_was_asked_for() -> None:
    shown = _shown(replace(PREVIEW, unspent=2_500_000))
    assert "3.0 MB -> at most 2.5 MB, once there are statistics to spend it by" in _row(shown, "size")


def test_the_disk_that_stages_need_is_said_by_stage() -> None:
    assert "disk about 4 MB: 2 MB quantized weights, 2 MB output" in _shown(PREVIEW)
    with_cache = replace(PREVIEW, disk=replace(PREVIEW.disk, calibration=9_160_000_000))
    (line,) = [line for line in _shown(with_cache) if line.startswith("disk")]
    assert line.startswith("disk about 9,164 MB: 9,160 MB calibration, ")
    meanwhile = replace(PREVIEW, disk=replace(PREVIEW.disk, meanwhile=5_000_000))
    assert "2 MB output; 5 MB more while it calibrates" in " ".join(_shown(meanwhile))


def test_what_several_processes_take_is_a_table() -> None:
    shown = _shown(PREVIEW)
    assert "1 1 min 30 s 12 s 7.0 - 5.0 2.0 0.0" in shown
    assert "8 - 2.0 s 7.0 6.1 9.0 2.0 1.5" in shown
