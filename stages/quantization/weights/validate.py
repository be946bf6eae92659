"""Check stored tensors against their format and site: type, shape, range and finiteness, whenever they are read."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stages.model.weights import all_finite
from stages.records.formats import EmbeddingPlan, QuantSpec, torch_float
from stages.records.results import ExportRecipe
from stages.records.sites import MatMulSite

_BYTE = 8
CHECKED_AT_ONCE = 4
"""Stored weights that an export compares with its output at once, at most: each takes a few times its bytes."""
PartName = Literal["codes", "scales", "zero_points", "input_scale"]
"""The tensors that a site's stored weight is made of."""


class InvalidFile(Exception):
    """Says what is wrong with a file that could be parsed."""


def _check(condition: bool, fault: str) -> None:
    if not condition:
        raise InvalidFile(fault)


def require_recipe(recipe: ExportRecipe) -> None:
    """Raise InvalidFile when ``recipe`` names nothing to quantize, or impossible sizes."""
    _check(bool(recipe.groups or recipe.embeddings), "it has no groups")
    for group in recipe.groups:
        _check(bool(group.sites), f"the group of '{group.activation}' has no sites")
        for site in group.sites:
            _check(site.in_features >= 1 and site.out_features >= 1, f"the sizes of '{site.name}' are below 1")
    names = {site.name for group in recipe.groups for site in group.sites}
    for plan in recipe.embeddings:
        shared = plan.shared_with
        _check(shared is None or shared in names, f"'{plan.table.weight}' is shared with '{shared}', which isn't there")
        _check(min(plan.table.shape) >= 1 and plan.block_size >= 1, f"the sizes of '{plan.table.weight}' are below 1")


def require_spec(spec: QuantSpec, site: MatMulSite) -> None:
    """Raise InvalidFile when no weight of the site can have this format."""
    _check(spec.block_size(site.in_features) >= 1, "its blocks are smaller than 1")


def require_part(name: PartName, part: Tensor | None, site: MatMulSite, spec: QuantSpec) -> None:
    """Raise InvalidFile when a part of a site's weight doesn't fit its shape and format.

    Args:
        name: which part it is.
        part: its numbers; None where the file has no such part.
        site: the site that the weight belongs to.
        spec: how the weight is stored.
    """
    scales = (site.out_features, spec.num_blocks(site.in_features))
    match name:
        case "codes":
            _require_range(
                _require_form(part, name, (site.out_features, site.in_features), spec.code_dtype), name, spec
            )
        case "scales":
            _require_finite(_require_form(part, name, scales, torch_float(spec.scale_dtype)), name)
        case "zero_points" if spec.symmetric:
            _check(part is None, "it has zero_points and a format without them")
        case "zero_points":
            _require_range(_require_form(part, name, scales, torch.uint8), name, spec)
        case "input_scale" if part is not None:
            _require_finite(_require_form(part, name, (site.in_features,), torch.float32), name)
            _check(bool((part > 0).all()), "its input_scale isn't positive")


def require_packed(packed: Tensor, plan: EmbeddingPlan) -> None:
    """Raise InvalidFile when ``packed`` can't be the codes of the table."""
    _require_form(packed, "packed", (plan.packed_bytes,), torch.uint8)


def require_table_scales(scales: Tensor, plan: EmbeddingPlan) -> None:
    """Raise InvalidFile when ``scales`` can't be those of the table."""
    _require_form(scales, "scales", plan.scales_shape, torch_float(plan.spec.scale_dtype))
    _require_finite(scales, "scales")


def _require_form(part: Tensor | None, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if part is None:
        raise InvalidFile(f"it has no {name}")
    _check(
        part.dtype == dtype and tuple(part.shape) == shape,
        f"its {name} tensor is {part.dtype} {list(part.shape)}, not {dtype} {list(shape)}",
    )
    return part


def _require_range(codes: Tensor, name: str, spec: QuantSpec) -> None:
    if spec.bits == _BYTE or codes.numel() == 0:
        return
    low, high = map(int, codes.aminmax())
    _check(low >= spec.code_min and high <= spec.code_max, f"its {name} leave the range of {spec.bits} bits")


def _require_finite(numbers: Tensor, name: str) -> None:
    _check(all_finite(numbers), f"its {name} hold NaN or infinite values")
