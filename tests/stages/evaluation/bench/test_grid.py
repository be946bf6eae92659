"""Each combination of a sweep's options is one point, under a name of its own, made by a command that is understood."""

from __future__ import annotations

import sys
from pathlib import Path, PureWindowsPath

import tyro

from stages.commands.evaluate_options import SweepGrid
from stages.commands.quantize_options import QuantizeConfig
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
    # All algorithms, two block sizes, two layouts; a head without INT8 and further options: only INT4,
    # once; everything else with three INT8 block sizes.
    assert len(found) == len(grid.algo) * 2 * 2 * ((1 + 3) + (1 + 3) + (3 + 3) + 2 * 3 * 2 * 3)


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
    run = point.run(Path("/models/base"), Path("/sweep"), Path("/cache"))
    assert run.command[:3] == (sys.executable, "-m", "stages.quantize")
    assert tyro.cli(QuantizeConfig, args=list(run.command[3:])) == QuantizeConfig(
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
