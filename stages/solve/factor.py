"""The factor of the inverse Gram matrix that GPTQ walks along (Frantar et al., GPTQ, 2022, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from stages.errors import SolveError

_DOUBLE_UP_TO = 16384
"""Inputs up to which the factorization runs in float64: four copies of K x K then stay below 9 GB."""
_ATTEMPTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class InverseFactor:
    """Upper triangular U with U^T U = (G + damping I)^-1, rows and columns of G taken in ``order``."""

    order: Int64[Tensor, " K"]
    upper: Float[Tensor, "K K"]


def damped(gram: Float[Tensor, "K K"], damping: float) -> Float[Tensor, "K K"]:
    """G + damping * mean(diag G) I, with 1 on the diagonal of channels that were always 0."""
    diagonal = torch.diagonal(gram)
    added = torch.where(diagonal > 0, damping * diagonal.mean(), torch.ones_like(diagonal))
    return gram + torch.diag(added)


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
    ordered = gram[order][:, order]
    precise = ordered.double() if len(order) <= _DOUBLE_UP_TO and gram.device.type != "mps" else ordered
    for attempt in range(_ATTEMPTS):
        lower, failed = torch.linalg.cholesky_ex(damped(precise, damping * 10**attempt))
        if not bool(failed):
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not bool(failed):
                return InverseFactor(order=order, upper=upper.float())
    raise SolveError(
        f"A Gram matrix of {len(order)} channels can't be factored with {10 ** (_ATTEMPTS - 1)} times the damping; "
        "calibrate again, on more text."
    )
