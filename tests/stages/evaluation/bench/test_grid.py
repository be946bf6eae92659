"""Each combination of a sweep's options is one point, under a name of its own, made by a command that is understood."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path, PureWindowsPath

import pytest

from stages.commands.evaluate_options import SweepGrid
from stages.commands.quantize_options import QuantizeConfig
from stages.errors import OptionError
from stages.evaluation.bench.grid import Point, points_of


def test_combinations_have_names_of_their_own() -> None:
    grid = SweepGrid(
        enable_mixed_quant=(False, True),
        int8_block_size=(None, 128, "channel"),
        lm_head=(None, "4", "8"),
        use_column_major=(False, True),
        options=("", "awqclip_alpha_min=0.7", "awqclip_alpha_min=0.7 exclude="),
    )
    found = points_of(grid)
    assert len({point.name for point in found}) == len(found)
    # Two block sizes, two layouts, and three INT8 block sizes but for rtn_dq with a head in INT4 and nothing else said:
    # searches spread bytes over INT8 where zero points are open.
    assert len(found) == 2 * 2 * (len(grid.algo) * 2 * 3 * 3 * 3 - 2)


def test_int8_block_sizes_are_left_out_only_where_nothing_can_be_int8() -> None:
    def sizes(**options: object) -> list[object]:
        grid = SweepGrid(algo=("gptq",), block_size=(32,), int8_block_size=(32, 128))
        return [point.int8_block_size for point in points_of(replace(grid, **options))]

    assert sizes() == [32, 128]
    assert sizes(lm_head=("4",)) == [32, 128]
    assert sizes(use_zero_point=(True,)) == [32, 128]
    assert sizes(use_zero_point=(True,), lm_head=("4",)) == [None]
    assert sizes(use_zero_point=(True,), lm_head=("none",), enable_mixed_quant=(True,)) == [32, 128]
    assert sizes(algo=("rtn_dq",), lm_head=("none",)) == [None]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("dataset=mix", "sets dataset, and all points of a sweep share one calibration"),
        ("layers_8bit=down_proj calib-size=8", "sets calib_size, and all points"),
        ("no_apply_chat_template", "sets no_apply_chat_template, and all points"),
        ("cache_dir=other", "sets cache_dir, and all points"),
        ("output_path=elsewhere", "sets output_path, which the sweep itself does; leave it out."),
        ("overwrite", "sets overwrite, which the sweep itself does"),
        ("exclude='a", "--options exclude='a has a quotation mark without its partner; add it."),
    ],
)
def test_options_that_points_cannot_have_of_their_own_are_refused(options: str, words: str) -> None:
    with pytest.raises(OptionError, match=re.escape(words)):
        points_of(SweepGrid(options=("", options)))


def test_a_point_knows_what_its_own_options_ask_for() -> None:
    grid = SweepGrid(algo=("rtn_dq",), block_size=(None,), options=("", "target_size=90MB", "algo=gptq"))
    places = (Path("/models/base"), Path("/sweep"), Path("/cache"))
    assert [point.config(*places).needs_cache for point in points_of(grid)] == [False, True, True]
    (point,) = points_of(SweepGrid(algo=("rtn_dq",), block_size=(None,), options=("taget_size=90MB",)))
    words = "--options 'taget_size=90MB': stages.quantize has no option --taget_size; did you mean --target_size?"
    with pytest.raises(OptionError, match=re.escape(words)):
        point.config(*places)


def test_points_are_named_after_what_they_vary() -> None:
    grid = SweepGrid(algo=("rtn_dq",), block_size=(32, None), options=("", "target=cuda"))
    assert [point.name for point in points_of(grid)] == [
        "rtn_dq-b32",
        "rtn_dq-b32-target-cuda",
        "rtn_dq",
        "rtn_dq-target-cuda",
    ]
    zero_points = SweepGrid(algo=("rtn_dq",), block_size=(32,), use_zero_point=(None, False, True))
    assert [point.name for point in points_of(zero_points)] == ["rtn_dq-b32", "rtn_dq-b32-nozp", "rtn_dq-b32-zp"]
    assert [point.arguments[2:] for point in points_of(zero_points)] == [
        (), ("--no_use_zero_point",), ("--use_zero_point",),
    ]  # fmt: skip


def test_a_points_command_is_what_the_command_line_takes() -> None:
    point = Point(
        algo="awq_lite",
        block_size=64,
        zero_point=True,
        mixed=True,
        int8_block_size=128,
        lm_head="8",
        column_major=True,
        options="layers_8bit='layers.0, down_proj' awqlite_run_per_subgraph",
    )
    places = (Path("/models/base"), Path("/sweep"), Path("/cache"))
    run = point.run(*places)
    assert run.command[:3] == (sys.executable, "-m", "stages.quantize")
    assert point.config(*places) == QuantizeConfig(
        onnx_path=Path("/models/base"),
        output_path=Path("/sweep") / point.name,
        cache_dir=Path("/cache"),
        algo="awq_lite",
        block_size=64,
        use_zero_point=True,
        enable_mixed_quant=True,
        int8_block_size=128,
        lm_head="8",
        use_column_major=True,
        layers_8bit="layers.0, down_proj",
        awqlite_run_per_subgraph=True,
        overwrite=True,
    )
    assert run.weights == Path(f"/sweep/{point.name}.weights")
    assert run.shown_command.startswith("python -m stages.quantize --onnx_path=/models/base ")


def test_names_of_points_are_names_of_folders() -> None:
    grid = SweepGrid(algo=("rtn_dq",), options=("layers_8bit=/model/a:b*?.", f"exclude={'model.' * 60}", "plan=a|b"))
    names = [point.name for point in points_of(grid)]
    assert len({name.lower() for name in names}) == len(names)
    for name in names:
        assert PureWindowsPath(name).name == name == name.rstrip(". ")
        assert not set(name) & set('<>:"/\\|?*')
        assert len(name) <= 120
