"""Whether stored numbers are what their format and site say: checked once, when they are read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stages.finite import all_finite
from stages.records import EmbeddingPlan, ExportRecipe, MatMulSite, QuantSpec, torch_float


class Damage(Exception):
    """Carries what is wrong with a file that could be parsed."""


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise Damage(what)


def require_recipe(recipe: ExportRecipe) -> None:
    """Raise Damage when ``recipe`` names nothing, or sizes that can't be."""
    _need(bool(recipe.groups or recipe.embeddings), "it has no groups")
    for group in recipe.groups:
        _need(bool(group.sites), f"the group of '{group.activation}' has no sites")
        for site in group.sites:
            _need(site.in_features >= 1 and site.out_features >= 1, f"the sizes of '{site.name}' are below 1")
    for plan in recipe.embeddings:
        _need(min(plan.table.shape) >= 1 and plan.block_size >= 1, f"the sizes of '{plan.table.weight}' are below 1")


def require_parts(part: Mapping[str, Tensor], site: MatMulSite, spec: QuantSpec) -> None:
    """Raise Damage when a site's codes, scales, zero points and input scale aren't those of its shape and format."""
    _need(spec.block_size(site.in_features) >= 1, "its blocks are smaller than 1")
    codes = (site.out_features, site.in_features)
    scales = (site.out_features, spec.num_blocks(site.in_features))
    _require(part, "codes", codes, spec.code_dtype)
    _require(part, "scales", scales, torch_float(spec.scale_dtype))
    _require_range(part["codes"], "codes", spec)
    _require_finite(part["scales"], "scales")
    if spec.symmetric:
        _need("zero_points" not in part, "it has zero_points and a format without them")
    else:
        _require(part, "zero_points", scales, torch.uint8)
        _require_range(part["zero_points"], "zero_points", spec)
    if "input_scale" in part:
        _require(part, "input_scale", (site.in_features,), torch.float32)
        _require_finite(part["input_scale"], "input_scale")
        _need(bool((part["input_scale"] > 0).all()), "its input_scale isn't positive")


def require_packed(packed: Tensor, plan: EmbeddingPlan) -> None:
    """Raise Damage when ``packed`` aren't the codes of the table."""
    _require({"packed": packed}, "packed", (-(-plan.table.vocabulary * plan.table.hidden // 2),), torch.uint8)


def require_table_scales(scales: Tensor, plan: EmbeddingPlan) -> None:
    """Raise Damage when ``scales`` aren't those of the table."""
    _require({"scales": scales}, "scales", plan.scales_shape, torch_float(plan.table.dtype))
    _require_finite(scales, "scales")


def _require(part: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    _need(name in part, f"it has no {name}")
    found = part[name]
    _need(
        found.dtype == dtype and tuple(found.shape) == shape,
        f"its {name} are {found.dtype} {list(found.shape)}, not {dtype} {list(shape)}",
    )


def _require_range(codes: Tensor, name: str, spec: QuantSpec) -> None:
    inside = codes.numel() == 0 or (int(codes.min()) >= spec.code_min and int(codes.max()) <= spec.code_max)
    _need(inside, f"its {name} leave the range of {spec.bits} bits")


def _require_finite(numbers: Tensor, name: str) -> None:
    _need(all_finite(numbers), f"its {name} hold NaN or infinite values")
