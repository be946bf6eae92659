"""Forecast what each format would cost a site in accuracy, by the output error of a short clip search.

A few clip ratios by the diagonal blocks of the Gram matrix predict what the real searches reach better than plain
rounding does: over the 150 sites of SmolLM2-135M the logarithm of the final error (awq_full, INT4) scatters around
that of the forecast by 0.4, around that of rounding by 0.55. INT8 is rounded: clipping gains nothing there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from pydantic import TypeAdapter
from torch import Tensor

from stages.quantization.search.affine import choose_parameters, join, round_trip, split
from stages.quantization.search.choices import rows_per_chunk
from stages.quantization.search.objective import gram_blocks, output_error
from stages.quantization.search.ranges import search_clip_ratios
from stages.records.formats import QuantSpec
from stages.records.results import SiteForecast, TokenStats
from stages.records.sites import MatMulSite
from stages.system.json_file import explained, read_json, write_json

FILE = "forecast.json"
_FILES = TypeAdapter(dict[str, SiteForecast])
_RATIOS = [1.0, 0.9, 0.8, 0.7, 0.6]

Sections = tuple[slice, ...]
"""Output channels whose relative errors count one by one."""
WHOLE: Sections = (slice(None),)


def forecast_site(
    site: MatMulSite,
    weight: Float[Tensor, "N K"],
    specs: Mapping[str, QuantSpec],
    stats: TokenStats,
    sections: Sections = WHOLE,
) -> SiteForecast:
    """Return what each of ``specs`` costs, by its key; no error at all where no token reached the site.

    Args:
        site: whether it makes the logits matters.
        weight: its weight.
        specs: number formats by the keys that the errors get.
        stats: of the site's activation.
        sections: output channels whose relative errors count one by one.
    """
    energies = output_error(_signal(site, weight), stats)
    return SiteForecast(
        energy=float(energies.double().sum()),
        errors={
            label: _relative(output_error(quick_weight(weight, spec, stats) - weight, stats), energies, sections)
            for label, spec in specs.items()
        },
    )


def quick_error(
    site: MatMulSite,
    weight: Float[Tensor, "N K"],
    stored: Float[Tensor, "N K"],
    stats: TokenStats,
    sections: Sections = WHOLE,
) -> float:
    """Return the relative error, as forecasts count it, of ``stored`` in the place of ``weight``.

    Args:
        site: whether it makes the logits matters.
        weight: its weight.
        stored: what the runtime would compute with.
        stats: of the site's activation.
        sections: output channels whose relative errors count one by one.
    """
    return _relative(output_error(stored - weight, stats), output_error(_signal(site, weight), stats), sections)


def quick_weight(weight: Float[Tensor, "N K"], spec: QuantSpec, stats: TokenStats) -> Float[Tensor, "N K"]:
    """Return what the runtime would compute with, after a short clip search (INT4) or plain rounding (INT8)."""
    size = spec.block_size(weight.shape[1])
    gram = gram_blocks(stats, size) if spec.bits == 4 else None
    parts = []
    for rows in torch.split(weight, rows_per_chunk(weight)):
        blocks = split(rows, size)
        ratios = 1.0 if gram is None else search_clip_ratios(rows, spec, "full", gram, _RATIOS)
        parts.append(join(round_trip(blocks, choose_parameters(blocks, spec, "full", ratios), spec), weight.shape[1]))
    return torch.cat(parts)


def forecast_key(spec: QuantSpec) -> str:
    """Return a format's name in a forecast: its label, and whether codes have a zero point."""
    return spec.label if spec.symmetric else f"{spec.label}z"


def read_forecasts(folder: Path) -> dict[str, SiteForecast]:
    """Return the forecasts by site; none where there is no readable file."""
    return read_json(folder / FILE, _FILES) or {}


def write_forecasts(folder: Path, forecasts: Mapping[str, SiteForecast]) -> None:
    """Write the forecasts of a cache's sites into its folder.

    Raises:
        UserError: the folder can't be written.
    """
    failure = f"A budget's forecasts can't be kept in {folder / FILE}"
    with explained(failure, "choose a --cache_dir that can be written"):
        write_json(folder / FILE, _FILES, dict(forecasts))


def _signal(site: MatMulSite, weight: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
    """Return what errors are compared with: for logits without the part that softmax ignores, which all tokens share.

    On SmolLM2-135M that part is nine tenths of the energy.
    """
    return weight - weight.mean(dim=0) if site.feeds_logits else weight


def _relative(errors: Float[Tensor, " N"], energies: Float[Tensor, " N"], sections: Sections) -> float:
    """Return the sum of the sections' relative errors; those without energy count for nothing."""
    total = 0.0
    for section in sections:
        energy = float(energies[section].double().sum())
        total += float(errors[section].double().sum()) / energy if energy > 0 else 0.0
    return total
