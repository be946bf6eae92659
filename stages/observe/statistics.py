"""Streaming statistics of one activation: mean |x| and the Gram matrix, or the raw rows where they are smaller.

The output error of a weight error D [N, K] over T tokens is ||X D^T||^2 / T = tr(D G D^T) with G = X^T X / T: exact,
and independent of T once G is known. Sums are float32 whatever the model's type; float16 products are exact there.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from stages.errors import SolveError
from stages.records import TokenStats


class StatisticsAccumulator:
    """Folds batches of one activation into TokenStats.

    Args:
        activation: the tapped value's name, for messages.
        in_features: K.
        planned_tokens: tokens that will be seen in all; below K the rows themselves are kept.
        device: where sums live.
    """

    def __init__(self, activation: str, in_features: int, planned_tokens: int, device: torch.device) -> None:
        self._activation = activation
        self._device = device
        self._num_tokens = 0
        self._abs_sum = torch.zeros(in_features, dtype=torch.float64, device="cpu")
        self._rows: list[Tensor] | None = [] if planned_tokens < in_features else None
        self._gram = None if self._rows is not None else torch.zeros(in_features, in_features, device=device)

    def add(self, batch: Float[Tensor, "*tokens K"]) -> None:
        """Fold in one batch of any floating type.

        Raises:
            SolveError: it holds NaN or infinite values.
        """
        stored = batch.reshape(-1, batch.shape[-1]).to(self._device)
        rows = stored.float()
        abs_sum = rows.abs().sum(dim=0)
        if not bool(torch.isfinite(abs_sum).all()):
            raise SolveError(
                f"The activation '{self._activation}' holds NaN or infinite values; run a float32 or bfloat16 build "
                "of the base model, or another execution provider."
            )
        self._abs_sum += abs_sum.double().cpu()
        self._num_tokens += rows.shape[0]
        if self._gram is not None:
            self._gram.addmm_(rows.T, rows)
        elif self._rows is not None:
            self._rows.append(stored.cpu().clone())

    def finish(self) -> TokenStats:
        """The statistics so far, on the CPU; zeros where no token came (an expert that nobody chose)."""
        divisor = max(self._num_tokens, 1)
        return TokenStats(
            num_tokens=self._num_tokens,
            abs_mean=(self._abs_sum / divisor).float(),
            gram=None if self._gram is None else (self._gram / divisor).cpu(),
            rows=None if self._rows is None else torch.cat(self._rows),
        )
