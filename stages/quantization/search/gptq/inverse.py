"""Factor the inverse of a damped Gram matrix, from which GPTQ reads how errors are compensated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from stages.errors import SolveError

_DOUBLE_UP_TO = 16384
"""Inputs up to which a Gram matrix is factored in float64: three copies of K x K then stay below 7 GB."""

_SINGLE_ERROR = 0.01
"""Bound of the relative error that float32 may cause; the usual damping keeps far below it."""

_TRIANGLE = 256
"""Size of a triangular matrix that is inverted as it is, not by its halves."""

_ATTEMPTS = 5
"""Dampings that are tried, each ten times the one before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InverseCholesky:
    """Upper triangular U with U^T U = (G + damping I)^-1, rows and columns of G in ``order``."""

    order: Int64[Tensor, " K"]
    upper: Float[Tensor, "K K"]


def inverse_cholesky(gram: Float[Tensor, "K K"], damping: float, *, act_order: bool) -> InverseCholesky:
    """Factor the inverse of the damped Gram matrix; damping grows tenfold until it can be factored.

    Args:
        gram: X^T X / T, float32.
        damping: the part of the mean diagonal that is added to the diagonal.
        act_order: largest activations first, so that the errors of their columns are compensated in the others.

    Raises:
        SolveError: it can't be factored at any damping.
    """
    diagonal = torch.diagonal(gram)
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(diagonal))
    order = order.to(gram.device)
    for attempt in range(_ATTEMPTS):
        upper = _upper(gram, order, damping * 10**attempt)
        if upper is not None:
            return InverseCholesky(order=order, upper=upper)
    raise SolveError(
        f"A Gram matrix of {len(order)} channels can't be factored with {10 ** (_ATTEMPTS - 1)} times the damping; "
        "calibrate again, on more text."
    )


def _upper(gram: Float[Tensor, "K K"], order: Int64[Tensor, " K"], damping: float) -> Float[Tensor, "K K"] | None:
    """Return U, or None where rounding leaves nothing to factor; each matrix is dropped once the next one is there.

    Where L L^T is the matrix with rows and columns in reverse, L^-1 with both in reverse is U.
    """
    order = order.flip(0)
    matrix = gram[order][:, order]
    if _needs_double(len(order), damping, gram.device):
        matrix = matrix.double()
    lower, failed = torch.linalg.cholesky_ex(_damp(matrix, damping))
    del matrix
    return None if bool(failed) else _inverse_lower(lower).flip(0, 1).float()


def _needs_double(channels: int, damping: float, device: torch.device) -> bool:
    """Tell whether float32 could lose much: the damped matrix's condition number is at most channels / damping + 1."""
    rough = channels * torch.finfo(torch.float32).eps > damping * _SINGLE_ERROR
    return rough and channels <= _DOUBLE_UP_TO and device.type != "mps"


def _inverse_lower(lower: Float[Tensor, "K K"]) -> Float[Tensor, "K K"]:
    """Invert a lower triangular matrix by products of its parts, which run faster than a solver does."""
    if len(lower) <= _TRIANGLE:
        unit = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        solved: Tensor = torch.linalg.solve_triangular(lower, unit, upper=False)
        return solved
    half = len(lower) // 2
    inverse = torch.zeros_like(lower)
    first, last = inverse[:half, :half], inverse[half:, half:]
    first.copy_(_inverse_lower(lower[:half, :half]))
    last.copy_(_inverse_lower(lower[half:, half:]))
    torch.matmul(last @ lower[half:, :half], first, out=inverse[half:, :half]).neg_()
    return inverse


def damped(gram: Float[Tensor, "K K"], damping: float) -> Float[Tensor, "K K"]:
    """Return G + damping * mean(diag G) I, a new matrix, with 1 on the diagonal of channels that were always 0."""
    return _damp(gram.clone(), damping)


def _damp(gram: Float[Tensor, "K K"], damping: float) -> Float[Tensor, "K K"]:
    diagonal = torch.diagonal(gram)
    diagonal += torch.where(diagonal > 0, damping * diagonal.mean(), torch.ones_like(diagonal))
    return gram
