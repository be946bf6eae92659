"""Options of quantize that depend on each other; tests/bad_input/options.py holds the rest of what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tyro

from stages.commands.quantize_options import QuantizeConfig
from stages.errors import OptionError


def config(**options: Any) -> QuantizeConfig:
    return QuantizeConfig(onnx_path=Path("models/base/model.onnx"), output_path=Path("models/int4"), **options)


def test_folders_lie_beside_the_models() -> None:
    found = config()
    assert found.cache_path == Path("models/base.calibration")
    assert found.weights_folder == Path("models/int4.weights")
    given = config(cache_dir=Path("a"), weights_path=Path("b"))
    assert (given.cache_path, given.weights_folder) == (Path("a"), Path("b"))


@pytest.mark.parametrize(
    ("options", "needs_cache"),
    [
        ({}, True),
        ({"algo": "rtn"}, False),
        ({"algo": "rtn_dq"}, False),
        ({"algo": "rtn_dq", "refine": True}, True),
        ({"algo": "rtn_dq", "target_bpw": 4.5}, True),
    ],
)
def test_what_follows_from_the_options(options: dict[str, Any], needs_cache: bool) -> None:
    found = config(**options)
    found.validate()
    assert found.needs_cache == needs_cache


def test_the_search_before_signround_is_its_start() -> None:
    assert config(algo="signround", signround_start="gptq").search_algorithm == "gptq"
    assert config(algo="gptq", signround_start="awq_full").search_algorithm == "gptq"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"algo": "rtn", "use_column_major": True}, "--use_column_major works only with DQ nodes; use --algo rtn_dq"),
        ({"algo": "rtn", "weight_operator": "matmul_nbits"}, "can't be combined with --algo rtn; use --algo rtn_dq"),
        ({"use_column_major": True, "weight_operator": "matmul_nbits"}, "can't be combined with --use_column_major"),
        ({"algo": "rtn", "target_size": "1GB"}, "it can't keep to a budget; use rtn_dq"),
        ({"target_bpw": 4.5, "enable_mixed_quant": True}, "--target_bpw decides .* and so does --enable_mixed_quant"),
        ({"target_size": "1GB", "enable_mixed_quant": True}, "--target_size decides .* so does --enable_mixed_quant"),
        ({"embedding": "none", "gather_quantize_axis": 1}, "--embedding none and --gather_quantize_axis contradict"),
        ({"embedding": "none", "share_embedding": "on"}, "--share_embedding on stores the embedding quantized"),
        ({"plan": Path("p"), "exclude": ""}, "--plan decides about every site's format, and so does --exclude"),
        ({"plan": Path("p"), "layers_8bit": "x"}, "--plan decides about every site's format, and so does --layers_8"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        config(**options).validate()


@pytest.mark.parametrize(
    ("options", "follows_base", "runtime"),
    [
        ({}, True, None),
        ({"target": "Auto"}, True, None),
        ({"target": "any"}, False, None),
        ({"target": "dml"}, False, "dml"),
    ],
)
def test_the_target_is_the_bases_unless_it_is_named(
    options: dict[str, Any], follows_base: bool, runtime: str | None
) -> None:
    found = config(**options)
    assert found.follows_base is follows_base
    assert (found.parsed_target and found.parsed_target.runtime) == runtime


@pytest.mark.parametrize(
    ("options", "embedding", "axis"),
    [
        ({}, None, 1),
        ({"gather_quantize_axis": 1}, "4", 1),
        ({"gather_quantize_axis": 0}, "4", 0),
        ({"embedding": "8", "gather_quantize_axis": 1}, "8", 1),
        ({"embedding": "none"}, "none", 1),
    ],
)
def test_the_older_name_of_the_embeddings_option_means_int4(
    options: dict[str, Any], embedding: str | None, axis: int
) -> None:
    found = config(**options)
    found.validate()
    assert (found.requested_embedding, found.embedding_axis) == (embedding, axis)


@pytest.mark.parametrize(
    ("arguments", "asked"), [((), None), (("--use_zero_point",), True), (("--no_use_zero_point",), False)]
)
def test_zero_points_can_be_asked_for_refused_or_left_to_the_target(
    arguments: tuple[str, ...], asked: bool | None
) -> None:
    given = ["--onnx_path", "a", "--output_path", "b", *arguments]
    assert tyro.cli(QuantizeConfig, args=given, use_underscores=True).use_zero_point is asked
