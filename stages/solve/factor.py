"""The factor of the inverse Gram matrix that GPTQ walks along (Frantar et al., GPTQ, 2022, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from stages.errors import SolveError

_DOUBLE_UP_TO = 16384
"""Inputs up to which the factorization runs in float64: three copies of K x K then stay below 7 GB."""
_ATTEMPTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class InverseFactor:
    """Upper triangular U with U^T U = (G + damping I)^-1, rows and columns of G taken in ``order``."""

    order: Int64[Tensor, " K"]
    upper: Float[Tensor, "K K"]


def damped(gram: Float[Tensor, "K K"], damping: float) -> Float[Tensor, "K K"]:
    """G + damping * mean(diag G) I, with 1 on the diagonal of channels that were always 0; a new matrix."""
    return _damp(gram.clone(), damping)


def _damp(gram: Float[Tensor, "K K"], damping: float) -> Float[Tensor, "K K"]:
    diagonal = torch.diagonal(gram)
    diagonal += torch.where(diagonal > 0, damping * diagonal.mean(), torch.ones_like(diagonal))
    return gram


def inverse_factor(gram: Float[Tensor, "K K"], damping: float, *, act_order: bool) -> InverseFactor:
    """Factor the inverse of the damped Gram matrix; damping grows tenfold until it can be factored.

    Args:
        gram: X^T X / T, float32.
        damping: part of the mean diagonal that is added to the diagonal.
        act_order: loudest channels first, so that quieter ones make up for their errors.

    Raises:
        SolveError: it can't be factored at any damping.
    """
    diagonal = torch.diagonal(gram)
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(diagonal))
    order = order.to(gram.device)
    for attempt in range(_ATTEMPTS):
        upper = _upper(gram, order, damping * 10**attempt)
        if upper is not None:
            return InverseFactor(order=order, upper=upper)
    raise SolveError(
        f"A Gram matrix of {len(order)} channels can't be factored with {10 ** (_ATTEMPTS - 1)} times the damping; "
        "calibrate again, on more text."
    )


def _upper(gram: Float[Tensor, "K K"], order: Int64[Tensor, " K"], damping: float) -> Float[Tensor, "K K"] | None:
    """U, or None where rounding leaves nothing to factor. Each matrix is dropped as soon as the next one is there."""
    matrix = gram[order][:, order]
    if len(order) <= _DOUBLE_UP_TO and gram.device.type != "mps":
        matrix = matrix.double()
    lower, failed = torch.linalg.cholesky_ex(_damp(matrix, damping))
    del matrix
    if bool(failed):
        return None
    inverse = torch.cholesky_inverse(lower)
    del lower
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return None if bool(failed) else upper.float()
