"""A MoE node as a torch module: every expert multiplies the tokens that the router sends it."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import linear

from stages.records.experts import ExpertActivation, Routing
from stages.runtime.blocks.converters.layers import Linear
from stages.runtime.blocks.experts import activated, route


class ExpertLinear(Linear):
    """One projection of one expert; ``_tokens`` says where its rows lie in the batch, to whoever watches."""

    def __init__(self) -> None:
        super().__init__(1.0)

    def forward(
        self,
        hidden: Float[Tensor, "n K"],
        weight: Float[Tensor, "N K"],
        bias: Float[Tensor, " N"] | None = None,
        _tokens: Int64[Tensor, " n"] | None = None,
    ) -> Float[Tensor, "n N"]:
        return linear(hidden, weight, bias)


class Experts(nn.Module):
    """The mixture; ``biased`` says which of fc1 and fc2 have biases."""

    def __init__(self, activation: ExpertActivation, routing: Routing, biased: tuple[bool, bool]) -> None:
        super().__init__()
        self._activation, self._routing, self._biased, self._linear = activation, routing, biased, ExpertLinear()

    def forward(
        self,
        hidden: Float[Tensor, "*batch H"],
        scores: Float[Tensor, "*scores E"],
        *others: Tensor,
    ) -> Float[Tensor, "*batch H"]:
        """Return the mixture; ``others`` are the biases [E, N] that there are, then fc1 and fc2 of each expert."""
        given = iter(others)
        biases = [next(given) if there else None for there in self._biased]
        weights = tuple(given)
        rows = hidden.reshape(-1, hidden.shape[-1])
        routed, mixed = route(scores.reshape(-1, scores.shape[-1]), self._routing), torch.zeros_like(rows)
        for index, (fc1, fc2) in enumerate(zip(weights[::2], weights[1::2], strict=True)):
            tokens, place = torch.nonzero(routed.experts == index, as_tuple=True)
            if len(tokens) == 0:
                continue
            bias1, bias2 = (None if bias is None else bias[index] for bias in biases)
            inner = activated(self._linear(rows[tokens], fc1, bias1, tokens), self._activation)
            output = self._linear(inner, fc2, bias2, tokens)
            mixed = mixed.index_add(0, tokens, output * routed.weights[tokens, place, None])
        return mixed.reshape(hidden.shape)
