"""What a graph holds to quantize: MatMul sites, groups that share an input, and where an input scale can be folded.

Also what is left unquantized, what a site's name says, and the words of the options that describe formats: nothing here
imports torch, so that command lines can be parsed without it.

Shapes: N = out_features, K = in_features; V = vocabulary and D = hidden size of an embedding table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

FloatName = Literal["float32", "float16", "bfloat16"]
"""Floating-point types that a base model's weights can have, named as torch names them."""

GatherForm = Literal["gather_block_quantized", "dq"]
"""How a quantized embedding is looked up: by com.microsoft GatherBlockQuantized, or DequantizeLinear and Gather."""

BlockAxis = Literal[0, 1]
"""Axis of a [V, D] embedding that its blocks run along: 1 groups numbers of one token, 0 groups tokens."""

_LM_HEAD = re.compile(r"(?<![A-Za-z0-9_])lm_head(?![A-Za-z0-9_])")
_LAYER = re.compile(r"layers[./](\d+)[./]?")
"""The builder writes layers.3/, other exporters layers/3/ or layers.3. with dots throughout."""


_EXPERT = re.compile(r"experts\.(\d+)/")

Projection = Literal["fc1", "fc2"]
"""A MoE node's two matrices an expert: fc1 reads the node's input (gate and up), fc2 what becomes of it (down)."""


class WeightLayout(StrEnum):
    """How the graph stores a site's weight."""

    K_BY_N = "k_by_n"
    """MatMul's own layout, also Gemm with transB = 0."""
    N_BY_K = "n_by_k"
    """Gemm with transB = 1."""
    N_BY_K_TRANSPOSED = "n_by_k_transposed"
    """An [N, K] initializer read through a Transpose node (tied embedding and lm_head)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertPlace:
    """Where one expert's matrix lies: number ``index`` of a table [experts, N, K] that a MoE node reads."""

    node: str
    """The MoE node's output."""
    projection: Projection
    index: int
    share: float
    """Part of the tokens that the expert sees if the router chooses all alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatMulSite:
    """One MatMul or Gemm whose second input is a constant weight, or one matrix of one expert in a MoE node.

    ``output`` is the node's output value: unique in a graph, so it identifies the node even where nodes are unnamed.
    The activation and output of an expert's matrix are no values of the graph: their names stand for them.
    """

    name: str
    op_type: Literal["MatMul", "Gemm", "MoE"]
    weight: str
    activation: str
    output: str
    in_features: int
    out_features: int
    layout: WeightLayout
    dtype: FloatName
    """Of the weight as the node reads it."""
    stored_dtype: FloatName | None = None
    """Of the initializer, where a Cast stands between; None where it has the same."""
    weight_shared_with: tuple[str, ...] = ()
    """Outputs of the other nodes that read the same initializer."""
    feeds_logits: bool = False
    routes_experts: bool = False
    """Whether its output decides which experts of a mixture a token goes to."""
    gates_state: bool = False
    """Whether its output decides how fast a recurrent state decays, or how much a token changes it."""
    expert: ExpertPlace | None = None
    """None: a MatMul or Gemm."""

    @property
    def is_lm_head(self) -> bool:
        """Return whether the site is called lm_head or makes the logits."""
        return self.feeds_logits or _LM_HEAD.search(self.name) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class NormAbsorber:
    """A normalization whose gain (and LayerNorm bias) can be divided by the input scale.

    Where a norm is written out in small nodes, it is the Mul by the gain that ends it.
    """

    kind: Literal["norm"] = "norm"
    output: str
    """First output of the norm node: the activation itself, or what a Cast makes the activation from."""
    parameters: tuple[str, ...]
    """Initializers [K] to divide: gain, and bias where the norm adds one of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearAbsorber:
    """A linear site that multiplies into the activation (up_proj): its output channels are divided."""

    kind: Literal["linear"] = "linear"
    site: str
    bias: str | None = None
    """Initializer [N] added after the site, divided too."""
    power: Literal[1, 2] = 1
    """2 where the activation is the square of the site's output or of its Relu: channels take the scale's root."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSharing:
    """Grouped-query attention: ``group_size`` query heads read one key/value head.

    An input scale of o_proj, [kv_heads * group_size * head_size], must repeat over the query heads of a group to be
    foldable into v_proj's [kv_heads * head_size] output channels.
    """

    kv_heads: int
    group_size: int
    head_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueAbsorber:
    """The value projection of an attention node: output is linear in V, so v_proj's channels are divided."""

    kind: Literal["value"] = "value"
    site: str
    first_channel: int
    """Index of the first V channel in the site's output (0, or after Q and K inside a packed qkv)."""
    heads: HeadSharing
    bias: str | None = None


Absorber = NormAbsorber | LinearAbsorber | ValueAbsorber


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationGroup:
    """The sites that read one activation, and so can share one AWQ input scale (q/k/v; gate/up)."""

    activation: str
    in_features: int
    sites: tuple[MatMulSite, ...]
    absorber: Absorber | None
    unfoldable_because: str = ""
    """Why there is no absorber, for people to read; empty where there is one."""

    @property
    def is_of_expert(self) -> bool:
        """Return whether it is the input of one projection of one expert."""
        return self.sites[0].expert is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnquantizedWeights:
    """Matrices that one kind of node reads and that stay unquantized."""

    op_type: str
    weights: tuple[str, ...]
    """Initializers, in graph order."""
    num_bytes: int
    share: float
    """Part of the bytes of all the model's weights, 0 to 1."""
    reason: str

    @property
    def description(self) -> str:
        """Say which weights stay, how large they are, and why."""
        more = f" and {len(self.weights) - 1} more" if len(self.weights) > 1 else ""
        size = f"{self.num_bytes / 1e6:,.1f} MB, {self.share:.0%} of the base's weights"
        return f"{self.op_type}: {self.weights[0]}{more} ({size}): {self.reason}"


def short_name(site: str) -> str:
    """Return the builder's /model/layers.0/attn/o_proj/MatMul as layers.0/attn/o_proj."""
    return site.removeprefix("/model").removeprefix("/").removesuffix("/MatMul").removesuffix("/Gemm")


def kind_of(site: str) -> str:
    """Return the site's short name without layer and expert: attn/o_proj; a name that is all layer stays."""
    short = _EXPERT.sub("experts.*/", short_name(site))
    return _LAYER.sub("", short) or short


def expert_of(site: str) -> tuple[str, int] | None:
    """Return what stands before an expert's number in a site's short name, and the number; None for other sites."""
    short = short_name(site)
    found = _EXPERT.search(short)
    return None if found is None else (short[: found.start()].rstrip("/"), int(found[1]))


def layer_of(name: str) -> int | None:
    """Return the index of the decoder layer; None for what lies outside, such as lm_head."""
    found = _LAYER.search(name)
    return None if found is None else int(found[1])


def within_layer(name: str) -> str:
    """Return what follows the layer in ``name``, such as attn/o_proj/MatMul; nothing outside the layers."""
    found = _LAYER.search(name)
    return "" if found is None else name[found.end() :]
