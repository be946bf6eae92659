"""A MoE node: experts that each have two matrices, and the router's scores that say which of them see a token.

Shapes: E = experts, H = hidden size, I = inner size, F = 2 where fc1 holds gate and up, else 1; T = tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stages.records.sites import ActivationGroup, FloatName, MatMulSite, Projection

ActivationKind = Literal["relu", "gelu", "silu", "identity", "swiglu"]
GateLayout = Literal["none", "interleaved", "halves"]
"""How fc1 holds gate and up: not at all, row by row in turn, or one after the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertActivation:
    """What happens between fc1 and fc2; swiglu is g sigmoid(alpha g) (l + beta), g and l clamped to ``limit``."""

    kind: ActivationKind
    gate: GateLayout
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How a token's scores choose its experts: the ``top_k`` largest, weighted by softmax over these or over all."""

    top_k: int
    over_chosen: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayer:
    """One MoE node."""

    name: str
    output: str
    tokens: str
    """The node's input, [..., H]."""
    scores: str
    """The router's output, [T, E]."""
    experts: int
    hidden: int
    inner: int
    dtype: FloatName
    fc1: str
    """Initializer [E, F I, H]."""
    fc1_bias: str | None
    fc2: str
    """Initializer [E, H, I]."""
    fc2_bias: str | None
    activation: ExpertActivation
    routing: Routing
    groups: tuple[ActivationGroup, ...]
    """Two for each expert: fc1, then fc2."""

    @property
    def sites(self) -> tuple[MatMulSite, ...]:
        return tuple(site for group in self.groups for site in group.sites)

    def of(self, projection: Projection) -> tuple[MatMulSite, ...]:
        """Return one projection of every expert."""
        return self.sites[0 if projection == "fc1" else 1 :: 2]

    def token_weights(self, projection: Projection) -> str:
        """Return the name under which a cache keeps how much each token counts in each expert, [T, E]."""
        return f"{self.output}#{projection}.tokens"

    def channel_weights(self, projection: Projection) -> str:
        """Return the name under which a cache keeps how much each expert's output channels count, [E, N]."""
        return f"{self.output}#{projection}.channels"
