"""Every way in which stored tensors can contradict their format and site is refused, and sound ones pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stages.quantization.weights.validate import (
    InvalidFile,
    PartName,
    require_packed,
    require_part,
    require_recipe,
    require_spec,
    require_table_scales,
)
from stages.records.formats import PerBlock, QuantSpec
from stages.records.sites import ActivationGroup
from tests.stages.quantization.search.problems import site
from tests.stages.quantization.weights.test_store import RECIPE
from tests.support.embeddings import plan_of, random_table, rounded

SITE = site("up", 3, 8)
SYMMETRIC = QuantSpec(bits=4, symmetric=True, granularity=PerBlock(block_size=4), scale_dtype="float16")
ASYMMETRIC = replace(SYMMETRIC, symmetric=False)
CODES = torch.full((3, 8), -8, dtype=torch.int8)
SCALES = torch.ones(3, 2, dtype=torch.float16)
ZEROS = torch.full((3, 2), 15, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "part", "spec"),
    [
        ("codes", CODES, SYMMETRIC),
        ("codes", torch.full((3, 8), 15, dtype=torch.uint8), ASYMMETRIC),
        ("scales", SCALES, SYMMETRIC),
        ("zero_points", None, SYMMETRIC),
        ("zero_points", ZEROS, ASYMMETRIC),
        ("input_scale", None, SYMMETRIC),
        ("input_scale", torch.ones(8), SYMMETRIC),
    ],
)
def test_sound_parts_pass(name: PartName, part: Tensor | None, spec: QuantSpec) -> None:
    require_part(name, part, SITE, spec)


@pytest.mark.parametrize(
    ("name", "part", "spec", "fault"),
    [
        ("codes", None, SYMMETRIC, "it has no codes"),
        ("codes", CODES[:2], SYMMETRIC, r"its codes tensor is torch.int8 \[2, 8\], not torch.int8 \[3, 8\]"),
        ("codes", CODES, ASYMMETRIC, "its codes tensor is torch.int8"),
        ("codes", CODES - 1, SYMMETRIC, "its codes leave the range of 4 bits"),
        ("codes", -CODES, SYMMETRIC, "its codes leave the range of 4 bits"),
        ("scales", SCALES.float(), SYMMETRIC, "its scales tensor is torch.float32"),
        ("scales", SCALES * torch.nan, SYMMETRIC, "its scales hold NaN or infinite"),
        ("scales", SCALES * torch.inf, SYMMETRIC, "its scales hold NaN or infinite"),
        ("zero_points", ZEROS, SYMMETRIC, "it has zero_points and a format without them"),
        ("zero_points", None, ASYMMETRIC, "it has no zero_points"),
        ("zero_points", ZEROS + 1, ASYMMETRIC, "its zero_points leave the range of 4 bits"),
        ("input_scale", torch.ones(7), SYMMETRIC, "its input_scale tensor is torch.float32"),
        ("input_scale", torch.zeros(8), SYMMETRIC, "its input_scale isn't positive"),
        ("input_scale", torch.ones(8) * torch.inf, SYMMETRIC, "its input_scale hold NaN or infinite"),
    ],
)
def test_parts_that_contradict_the_format_are_refused(
    name: PartName, part: Tensor | None, spec: QuantSpec, fault: str
) -> None:
    with pytest.raises(InvalidFile, match=fault):
        require_part(name, part, SITE, spec)


def test_a_format_needs_blocks() -> None:
    require_spec(SYMMETRIC, SITE)
    with pytest.raises(InvalidFile, match="blocks are smaller than 1"):
        require_spec(replace(SYMMETRIC, granularity=PerBlock(block_size=0)), SITE)


def test_a_recipe_names_something_of_a_possible_size() -> None:
    empty = ActivationGroup(activation="x", in_features=8, sites=(), absorber=None)
    sizeless = replace(empty, sites=(site("none", 0, 8),))
    require_recipe(RECIPE)
    for groups, fault in (((), "no groups"), ((empty,), "'x' has no sites"), ((sizeless,), "'none' are below 1")):
        with pytest.raises(InvalidFile, match=fault):
            require_recipe(replace(RECIPE, groups=groups))
    with pytest.raises(InvalidFile, match="'table' are below 1"):
        require_recipe(replace(RECIPE, embeddings=(plan_of(0, 8),)))


def test_a_tables_codes_and_scales_have_the_plans_shape() -> None:
    plan = plan_of(6, 16, dtype="float16")
    table = rounded(plan, random_table(plan))
    require_packed(table.packed, plan)
    require_table_scales(table.scales, plan)
    with pytest.raises(InvalidFile, match="its packed tensor is"):
        require_packed(table.packed[1:], plan)
    with pytest.raises(InvalidFile, match="its scales tensor is"):
        require_table_scales(table.scales.float(), plan)
    with pytest.raises(InvalidFile, match="its scales hold NaN"):
        require_table_scales(table.scales * torch.nan, plan)
