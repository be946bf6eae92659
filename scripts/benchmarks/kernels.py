"""Measure GPTQ's parts against plain products of their shapes, on random weights and activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import median

import torch
from jaxtyping import Float
from torch import Tensor

from scripts.benchmarks.capture import seconds_on
from scripts.benchmarks.figures import KernelFigure
from stages.quantization.search.affine import choose_parameters, split
from stages.quantization.search.gptq.codes import gptq_codes
from stages.quantization.search.gptq.columns import ColumnParameters, columns_of
from stages.quantization.search.gptq.coordinate_descent import coordinate_descent
from stages.quantization.search.gptq.factor import damped, factor_gram
from stages.quantization.search.parallel import most_at_once
from stages.records.formats import PerBlock, QuantSpec

_SQUARE = (512, 1024, 2048, 4096)
"""K of square weights, from which growth is seen."""
_DAMPING = 0.5


def measure_kernels(
    shapes: Sequence[tuple[int, int]], block_size: int, device: torch.device, rounds: int
) -> Iterator[KernelFigure]:
    """Yield the seconds of each part: of square weights first, then of ``shapes``.

    Args:
        shapes: (in_features, out_features) of the model's own sites.
        block_size: inputs that share a scale.
        device: where it runs.
        rounds: how often each part runs; medians count.
    """
    spec = QuantSpec(bits=4, symmetric=True, granularity=PerBlock(block_size=block_size), scale_dtype="float32")
    for shape in dict.fromkeys([*((size, size) for size in _SQUARE), *shapes]):
        yield _measure(shape, spec, device, rounds)


@torch.no_grad()
def _measure(shape: tuple[int, int], spec: QuantSpec, device: torch.device, rounds: int) -> KernelFigure:
    in_features, out_features = shape
    generator, count = torch.Generator().manual_seed(0), most_at_once(in_features * out_features, device)
    weight = torch.randn(out_features, in_features, generator=generator).to(device)
    gram = _gram(in_features, generator).to(device)
    found = choose_parameters(split(weight, spec.block_size(in_features)), spec)
    factor = factor_gram(gram, _DAMPING, act_order=True)
    # As a search does: as many layers at once.
    weights, ranges, factors = columns_of([weight] * count), ColumnParameters.of([found] * count), [factor] * count
    codes = gptq_codes(weights, ranges, spec, factors)
    grams = damped(gram, _DAMPING).repeat(count, 1, 1)
    return KernelFigure(
        in_features=in_features,
        out_features=out_features,
        product=_seconds(lambda: weight @ gram, device, rounds),
        factoring=_seconds(lambda: factor_gram(gram, _DAMPING, act_order=True), device, rounds),
        gptq=_seconds(lambda: gptq_codes(weights, ranges, spec, factors), device, rounds) / count,
        descent=_seconds(lambda: coordinate_descent(weights, codes, ranges, spec, grams, 1), device, rounds) / count,
    )


def _gram(in_features: int, generator: torch.Generator) -> Float[Tensor, "K K"]:
    """Return a Gram matrix whose channels depend on one another, as activations' do."""
    mixing = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    gram: Tensor = mixing @ mixing.T
    return gram


def _seconds(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    return median([seconds_on(device, work) for _ in range(rounds + 1)][1:])
