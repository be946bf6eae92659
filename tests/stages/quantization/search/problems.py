"""Random layers with the traits that matter: correlated, heavy-tailed activations and a few outlier channels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stages.quantization.search.affine import BlockParameters
from stages.quantization.search.choices import site_errors
from stages.quantization.search.gptq.codes import gptq_codes
from stages.quantization.search.gptq.columns import ColumnParameters, columns_of
from stages.quantization.search.gptq.coordinate_descent import coordinate_descent, two_sided_descent
from stages.quantization.search.gptq.factor import GramFactor
from stages.quantization.search.problem import GroupProblem, SearchOptions, SiteChoice
from stages.quantization.search.solver import ALGORITHMS, GroupSolver
from stages.records.formats import PerBlock, QuantSpec
from stages.records.results import ActivationStats, QuantizedWeight, SearchStats, TokenStats
from stages.records.sites import ActivationGroup, HeadSharing, MatMulSite, WeightLayout

OPTIONS = SearchOptions(
    range_rule="full",
    alpha_step=0.1,
    clip_step=0.05,
    clip_min=0.5,
    column_chunk=7,
    damping=0.01,
    act_order=True,
    descent_passes=2,
)


def spec(*, symmetric: bool = True, block_size: int = 16, bits: int = 4) -> QuantSpec:
    return QuantSpec(bits=bits, symmetric=symmetric, granularity=PerBlock(block_size=block_size), scale_dtype="float32")


def gram_stats(tokens: Tensor) -> TokenStats:
    return TokenStats(num_tokens=len(tokens), abs_mean=tokens.abs().mean(0), gram=tokens.T @ tokens / len(tokens))


def row_stats(tokens: Tensor) -> TokenStats:
    return TokenStats(num_tokens=len(tokens), abs_mean=tokens.abs().mean(0), rows=tokens)


def site(name: str, out_features: int, in_features: int) -> MatMulSite:
    return MatMulSite(
        name=name,
        op_type="MatMul",
        weight=f"{name}.weight",
        activation="x",
        output=f"{name}.output",
        in_features=in_features,
        out_features=out_features,
        layout=WeightLayout.K_BY_N,
        dtype="float32",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomLayer:
    tokens: Tensor
    held_out: Tensor
    problem: GroupProblem


def random_layer(
    seed: int,
    *,
    in_features: int = 48,
    widths: tuple[int, ...] = (20,),
    symmetric: bool = True,
    heads: HeadSharing | None = None,
) -> RandomLayer:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    loudness = torch.exp(1.5 * torch.randn(in_features, generator=generator))
    draw = torch.randn(400, in_features, generator=generator) @ mixing * loudness
    tokens, held_out = draw[:300], draw[300:]
    weights = tuple(torch.randn(width, in_features, generator=generator) for width in widths)
    sites = tuple(site(f"site{index}", width, in_features) for index, width in enumerate(widths))
    problem = GroupProblem(
        group=ActivationGroup(activation="x", in_features=in_features, sites=sites, absorber=None),
        weights=weights,
        specs=tuple(spec(symmetric=symmetric) for _ in widths),
        stats=ActivationStats(calibration=gram_stats(tokens), held_out=gram_stats(held_out)),
        output_grams=(None,) * len(widths),
        head_sharing=heads,
    )
    return RandomLayer(tokens=tokens, held_out=held_out, problem=problem)


def gptq_of_one(weight: Tensor, parameters: BlockParameters, number: QuantSpec, factor: GramFactor) -> Tensor:
    """Return ``gptq_codes`` of one matrix, [N, K]."""
    return gptq_codes(columns_of([weight]), ColumnParameters.of([parameters]), number, [factor])[0].T.contiguous()


def descent_of_one(
    weight: Tensor, codes: Tensor, parameters: BlockParameters, number: QuantSpec, gram: Tensor, passes: int
) -> tuple[Tensor, BlockParameters]:
    """Return ``coordinate_descent`` of one matrix, [N, K]."""
    ranges = ColumnParameters.of([parameters])
    found, fitted = coordinate_descent(columns_of([weight]), columns_of([codes]), ranges, number, gram[None], passes)
    return found[0].T.contiguous(), fitted.matrix(0)


def two_sided_of_one(
    weight: Tensor, codes: Tensor, parameters: BlockParameters, number: QuantSpec, gram: Tensor, output_gram: Tensor
) -> Tensor:
    """Return ``two_sided_descent`` of one matrix, [N, K]."""
    ranges = ColumnParameters.of([parameters])
    columns = columns_of([weight]), columns_of([codes])
    return two_sided_descent(*columns, ranges, number, gram[None], output_gram[None])[0].T.contiguous()


def joint_error(problem: GroupProblem, choices: tuple[SiteChoice, ...], stats: TokenStats) -> float:
    """Return the error summed over the sites of the group."""
    return sum(site_errors(problem, choices, stats))


def solver_of(problem: GroupProblem, name: str, *, fold: bool = True, one_scale: bool = False) -> GroupSolver:
    """Return a solver that reads ``problem``'s weights and statistics."""
    weights = {site.name: weight for site, weight in zip(problem.group.sites, problem.weights, strict=True)}

    def read_stats(_: str) -> SearchStats:
        assert problem.stats is not None
        named = zip(problem.group.sites, problem.output_grams, strict=True)
        output_grams = {site.name: gram for site, gram in named if gram is not None}
        return SearchStats(tokens=problem.stats, channel_weights={}, output_grams=output_grams)

    return GroupSolver(
        algorithm_name=name,
        algorithm=ALGORITHMS[name],
        options=OPTIONS,
        specs={site.name: spec for site, spec in zip(problem.group.sites, problem.specs, strict=True)},
        device=torch.device("cpu"),
        read_weight=lambda site: weights[site.name],
        read_stats=None if name.startswith("rtn") else read_stats,
        fold=fold,
        one_scale=one_scale,
    )


def spread(parameters: BlockParameters, in_features: int, block_size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Return the scale and the zero point of every weight, [N, K]."""
    scales = parameters.scales.double().numpy().repeat(block_size, axis=1)[:, :in_features]
    if parameters.zero_points is None:
        return scales, np.zeros_like(scales, dtype=int)
    return scales, parameters.zero_points.numpy().astype(int).repeat(block_size, axis=1)[:, :in_features]


def stored_weight(weight: QuantizedWeight) -> Tensor:
    """Return (code - zero point) * scale / input scale, computed block by block."""
    codes = weight.codes.float()
    size = weight.spec.block_size(codes.shape[1])
    for block in range(weight.scales.shape[1]):
        part = slice(block * size, (block + 1) * size)
        zero = 0 if weight.zero_points is None else weight.zero_points[:, block, None].float()
        codes[:, part] = (codes[:, part] - zero) * weight.scales[:, block, None].float()
    return codes if weight.input_scale is None else codes / weight.input_scale
