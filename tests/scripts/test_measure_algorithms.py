"""Each combination of the measured options is run once, under a name of its own."""

from __future__ import annotations

from pathlib import Path

import tyro

from scripts.measure_algorithms import Variant, variants_of
from scripts.options import MeasureConfig
from stages.config import QuantizeConfig


def variants(**options: object) -> list[Variant]:
    return variants_of(MeasureConfig(base=Path("base"), output=Path("out"), **options))


def test_combinations_have_names_of_their_own() -> None:
    found = variants(
        enable_mixed_quant=(False, True),
        int8_block_size=(None, 128),
        lm_head=(None, "4", "8"),
        use_column_major=(False, True),
    )
    assert len({variant.name for variant in found}) == len(found)
    # Five algorithms, two block sizes, two zero points, two layouts; per head INT4 alone once, all others twice.
    assert len(found) == 5 * 2 * 2 * 2 * ((1 + 2) + (1 + 2) + (2 + 2))
    assert [variant.name for variant in variants(algo=("rtn_dq",))] == [
        "rtn_dq-b32",
        "rtn_dq-b32-zp",
        "rtn_dq-b128",
        "rtn_dq-b128-zp",
    ]


def test_a_variants_arguments_are_what_the_command_line_takes() -> None:
    variant = Variant(
        algo="awq_lite",
        block_size=64,
        zero_point=True,
        mixed=True,
        int8_block_size=128,
        lm_head="8",
        column_major=True,
    )
    places = ["--onnx_path=base", "--output_path=out"]
    parsed = tyro.cli(QuantizeConfig, args=[*places, *variant.arguments])
    expected = QuantizeConfig(
        onnx_path=Path("base"),
        output_path=Path("out"),
        algo="awq_lite",
        block_size=64,
        use_zero_point=True,
        enable_mixed_quant=True,
        int8_block_size=128,
        lm_head="8",
        use_column_major=True,
    )
    assert parsed == expected
    assert variant.name == "awq_lite-b64-zp-mixed-int8b128-head8-col"
