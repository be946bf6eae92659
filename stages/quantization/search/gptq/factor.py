"""Factor a damped Gram matrix, from which GPTQ reads how the error of a column is compensated in those behind it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from stages.errors import SolveError

_DOUBLE_UP_TO = 16384
"""Inputs up to which a Gram matrix is factored in float64: a copy of K x K then stays below 2.2 GB."""

_SINGLE_ERROR = 0.01
"""Bound of the relative error that float32 may cause; the usual damping keeps far below it."""

_BLOCK = 512
"""Columns that are factored by the library; all other work is products, which run faster and need no copy."""

_ATTEMPTS = 5
"""Dampings that are tried, each ten times the one before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GramFactor:
    """U diag(d) U^T = G + damping I, rows and columns of G in ``order``.

    U has ones on its diagonal and zeros below it; d_k is the mean square of input k without what the inputs behind it
    tell about it.
    """

    order: Int64[Tensor, " K"]
    upper: Float[Tensor, "K K"]
    unpredicted: Float[Tensor, " K"]
    """d."""


def factor_gram(
    gram: Float[Tensor, "K K"], damping: float, *, act_order: bool, input_scale: Float[Tensor, " K"] | None = None
) -> GramFactor:
    """Factor the damped Gram matrix of x / s; damping grows tenfold until it can be factored.

    Args:
        gram: X^T X / T, float32.
        damping: the part of the mean diagonal that is added to the diagonal.
        act_order: largest activations first, so that the errors of their columns are compensated in the others.
        input_scale: s; None: ones.

    Raises:
        SolveError: it can't be factored at any damping.
    """
    scale = torch.ones_like(gram[0]) if input_scale is None else input_scale
    diagonal = torch.diagonal(gram) / scale / scale
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(diagonal))
    order = order.to(gram.device)
    for attempt in range(_ATTEMPTS):
        matrix = gram[order[:, None], order].div_(scale[order]).div_(scale[order, None])
        if _needs_double(len(order), damping * 10**attempt, gram.device):
            matrix = matrix.double()
        if _factor_in_place(damp(matrix, damping * 10**attempt)):
            roots = torch.diagonal(matrix).clone()
            upper = matrix.div_(roots).triu_()
            return GramFactor(order=order, upper=upper.float(), unpredicted=roots.square_().float())
    raise SolveError(
        f"A Gram matrix of {len(order)} channels can't be factored with {10 ** (_ATTEMPTS - 1)} times the damping; "
        "calibrate again, on more text."
    )


def _factor_in_place(matrix: Float[Tensor, "K K"]) -> bool:
    """Overwrite the upper triangle with R, where R R^T is the matrix; return whether that was possible.

    The last columns come first. What is below the diagonal is neither read nor kept.
    """
    for stop in range(len(matrix), 0, -_BLOCK):
        start = max(stop - _BLOCK, 0)
        own = matrix[start:stop, start:stop]
        lower, failed = torch.linalg.cholesky_ex(own.flip(0, 1))
        if bool(failed):
            return False
        own.copy_(lower.flip(0, 1))
        above = matrix[:start, start:stop]
        above.copy_(torch.linalg.solve_triangular(own.triu().T, above, upper=False, left=False))
        for first in range(0, start, _BLOCK):
            last = min(first + _BLOCK, start)
            matrix[:last, first:last].addmm_(above[:last], above[first:last].T, alpha=-1)
    return True


def _needs_double(channels: int, damping: float, device: torch.device) -> bool:
    """Tell whether float32 could lose much: the damped matrix's condition number is at most channels / damping + 1."""
    rough = channels * torch.finfo(torch.float32).eps > damping * _SINGLE_ERROR
    return rough and channels <= _DOUBLE_UP_TO and device.type != "mps"


def damped(gram: Float[Tensor, "K K"], damping: float) -> Float[Tensor, "K K"]:
    """Return G + damping * mean(diag G) I, a new matrix, with 1 on the diagonal of channels that were always 0."""
    return damp(gram.clone(), damping)


def damp(gram: Float[Tensor, "K K"], damping: float) -> Float[Tensor, "K K"]:
    """Do what ``damped`` does, in place."""
    diagonal = torch.diagonal(gram)
    diagonal += torch.where(diagonal > 0, damping * diagonal.mean(), torch.ones_like(diagonal))
    return gram
