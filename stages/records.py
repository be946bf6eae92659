"""The value types that cross rooms: all frozen, keyword-only, and free of behaviour beyond derived values.

Shapes: N = out_features, K = in_features, T = tokens, B = block size, nB = ceil(K / B) blocks along K.
Weights are always [N, K] here, whatever the graph stores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

FloatName = Literal["float32", "float16", "bfloat16"]
"""Floating-point storage types a base model can have, named as torch names them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatType:
    """A floating-point storage type under the names that each library gives it."""

    name: FloatName
    torch: torch.dtype
    numpy: np.dtype[np.generic]
    onnx: ir.DataType
    onnxruntime: str


FLOAT_TYPES: Mapping[FloatName, FloatType] = MappingProxyType(
    {
        "float32": FloatType(
            name="float32",
            torch=torch.float32,
            numpy=np.dtype(np.float32),
            onnx=ir.DataType.FLOAT,
            onnxruntime="tensor(float)",
        ),
        "float16": FloatType(
            name="float16",
            torch=torch.float16,
            numpy=np.dtype(np.float16),
            onnx=ir.DataType.FLOAT16,
            onnxruntime="tensor(float16)",
        ),
        "bfloat16": FloatType(
            name="bfloat16",
            torch=torch.bfloat16,
            numpy=np.dtype(ml_dtypes.bfloat16),
            onnx=ir.DataType.BFLOAT16,
            onnxruntime="tensor(bfloat16)",
        ),
    }
)


def torch_float(name: FloatName) -> torch.dtype:
    """Return the torch dtype that ``name`` stands for."""
    return FLOAT_TYPES[name].torch


def onnx_float(name: FloatName) -> ir.DataType:
    """Return the ONNX type that ``name`` stands for."""
    return FLOAT_TYPES[name].onnx


def float_of_onnx(dtype: ir.DataType | None) -> FloatType | None:
    """Return the storage type that ONNX calls ``dtype``; None where a base model can't have it."""
    return next((kind for kind in FLOAT_TYPES.values() if kind.onnx == dtype), None)


# --------------------------------------------------------------------------- the graph's sites


class WeightLayout(StrEnum):
    """How the graph stores a site's weight."""

    K_BY_N = "k_by_n"
    """MatMul's own layout, also Gemm with transB = 0."""
    N_BY_K = "n_by_k"
    """Gemm with transB = 1."""
    N_BY_K_TRANSPOSED = "n_by_k_transposed"
    """An [N, K] initializer read through a Transpose node (tied embedding and lm_head)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatMulSite:
    """One MatMul or Gemm whose second input is a constant weight.

    ``output`` is the node's output value: unique in a graph, so it identifies the node even where nodes are unnamed.
    """

    name: str
    op_type: Literal["MatMul", "Gemm"]
    weight: str
    activation: str
    output: str
    in_features: int
    out_features: int
    layout: WeightLayout
    dtype: FloatName
    weight_shared_with: tuple[str, ...] = ()
    """Outputs of the other nodes that read the same initializer."""
    feeds_logits: bool = False
    routes_experts: bool = False
    """Whether its output decides which experts of a mixture a token goes to."""


# --------------------------------------------------------------------------- where an input scale can be folded


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
    """Why there is no absorber, in words a person can read; empty where there is one."""


# --------------------------------------------------------------------------- number formats


@dataclass(frozen=True, slots=True, kw_only=True)
class PerChannel:
    """One scale for a whole row of K inputs."""

    kind: Literal["per_channel"] = "per_channel"


@dataclass(frozen=True, slots=True, kw_only=True)
class PerBlock:
    """One scale for each ``block_size`` consecutive inputs of a row; the last block may be shorter."""

    kind: Literal["per_block"] = "per_block"
    block_size: int


Granularity = PerChannel | PerBlock


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSpec:
    """How one weight is stored: w = (code - zero_point) * scale.

    Symmetric codes are signed with an implied zero point 0; asymmetric codes are unsigned with one stored zero point a
    scale, as ONNX DequantizeLinear defines both.
    """

    bits: Literal[4, 8]
    symmetric: bool
    granularity: Granularity
    scale_dtype: FloatName

    @property
    def code_min(self) -> int:
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def code_max(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.int8 if self.symmetric else torch.uint8

    @property
    def label(self) -> str:
        """Short name for tables: 4b32 is INT4 in blocks of 32, 8ch is INT8 with a scale per channel."""
        match self.granularity:
            case PerBlock(block_size=size):
                return f"{self.bits}b{size}"
            case PerChannel():
                return f"{self.bits}ch"

    def block_size(self, in_features: int) -> int:
        """Block size B for a row of ``in_features`` inputs; the whole row where scales are per channel."""
        match self.granularity:
            case PerBlock(block_size=size):
                return size
            case PerChannel():
                return in_features

    def num_blocks(self, in_features: int) -> int:
        return -(-in_features // self.block_size(in_features))

    def stored_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of codes, scales and zero points for an [N, K] weight."""
        scales = out_features * self.num_blocks(in_features)
        code_bits = out_features * in_features * self.bits
        zero_point_bits = 0 if self.symmetric else scales * self.bits
        return -(-code_bits // 8) + -(-zero_point_bits // 8) + scales * torch_float(self.scale_dtype).itemsize


class WeightForm(StrEnum):
    """Which nodes stand before the MatMul."""

    DQ = "dq"
    """Packed codes and DequantizeLinear."""
    QDQ = "qdq"
    """The floating-point weight, QuantizeLinear and DequantizeLinear: ONNX Runtime packs it when it loads."""
    DQ_COLUMN_MAJOR = "dq_column_major"
    """Packed codes in rows of output channels, DequantizeLinear and Transpose: for execution providers that ask for it;
    ONNX Runtime's own never fuse it."""
    MATMUL_NBITS = "matmul_nbits"
    """com.microsoft MatMulNBits in place of the MatMul, for runtimes that fuse no DequantizeLinear and for bfloat16."""


# --------------------------------------------------------------------------- embeddings

GatherForm = Literal["gather_block_quantized", "dq"]
"""com.microsoft GatherBlockQuantized, or DequantizeLinear and Gather."""

BlockAxis = Literal[0, 1]
"""Axis of a [V, D] table that its blocks run along: 1 groups numbers of one token, 0 groups tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingTable:
    """A constant [V, D] table that token ids are looked up in, by every Gather that does so.

    ``transposed`` says that the graph stores it as [D, V] and reads it through a Transpose, as the model builder does
    where lm_head multiplies with the same initializer.
    """

    weight: str
    gathers: tuple[str, ...]
    """Outputs of the Gather nodes, in graph order."""
    vocabulary: int
    hidden: int
    transposed: bool
    dtype: FloatName

    @property
    def shape(self) -> tuple[int, int]:
        return self.vocabulary, self.hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingPlan:
    """How one table is stored: symmetric INT4 codes [V, D], and a scale for each block along ``axis``."""

    table: EmbeddingTable
    axis: BlockAxis
    block_size: int
    form: GatherForm

    @property
    def spec(self) -> QuantSpec:
        return QuantSpec(
            bits=4,
            symmetric=True,
            granularity=PerBlock(block_size=self.block_size),
            scale_dtype=self.table.dtype,
        )

    @property
    def scales_shape(self) -> tuple[int, int]:
        rows, columns = self.table.shape
        blocks = self.spec.num_blocks(self.table.shape[self.axis])
        return (blocks, columns) if self.axis == 0 else (rows, blocks)

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes and scales."""
        rows, columns = self.scales_shape
        codes = -(-self.table.vocabulary * self.table.hidden // 2)
        return codes + rows * columns * torch_float(self.table.dtype).itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedTable:
    """One embedding's stored numbers: table[v, d] is approximated by code * scale."""

    packed: Tensor
    """[ceil(V * D / 2)] uint8: codes in C order, two to a byte, as ONNX stores INT4; unpacked they would need twice
    the memory."""
    scales: Tensor
    """[V, nB] (axis 1) or [nB, D] (axis 0), in the table's type."""


# --------------------------------------------------------------------------- what stays as it is


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreachedWeights:
    """Matrices that one kind of node reads and that quantization leaves alone."""

    op_type: str
    weights: tuple[str, ...]
    """Initializers, in graph order."""
    num_bytes: int
    share: float
    """Part of the bytes of all the model's weights, 0 to 1."""
    reason: str

    @property
    def in_words(self) -> str:
        """Which weights stay, how large they are, and why."""
        more = f" and {len(self.weights) - 1} more" if len(self.weights) > 1 else ""
        size = f"{self.num_bytes / 1e6:,.1f} MB, {self.share:.0%} of the base's weights"
        return f"{self.op_type}: {self.weights[0]}{more} ({size}): {self.reason}"


# --------------------------------------------------------------------------- statistics


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStats:
    """Second-order statistics of one activation over ``num_tokens`` tokens.

    Exactly one of ``gram`` ([K, K], float32, X^T X / T) and ``rows`` ([T, K], the model's type) is present; rows where
    T < K and they are smaller, because they are then cheaper to multiply with too.
    """

    num_tokens: int
    abs_mean: Tensor
    """[K] float32, mean over tokens of |x_k|."""
    gram: Tensor | None = None
    rows: Tensor | None = None

    @property
    def is_silent(self) -> bool:
        """Whether nothing was seen: no token came here (an expert nobody chose), or only zeros."""
        return not bool(self.abs_mean.any())


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationStats:
    """What the search minimises over (``calibration``) and what may veto its choice (``held_out``)."""

    calibration: TokenStats
    held_out: TokenStats


# --------------------------------------------------------------------------- results


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """One site's stored weight: W[n, k] * input_scale[k] is approximated by (code - zero_point) * scale."""

    site: MatMulSite
    spec: QuantSpec
    codes: Tensor
    """[N, K] int8 (symmetric) or uint8 (asymmetric), unpacked."""
    scales: Tensor
    """[N, nB] in the spec's scale type."""
    zero_points: Tensor | None = None
    """[N, nB] uint8, or None where symmetric."""
    input_scale: Tensor | None = None
    """[K] float32 AWQ scale that the weight was multiplied with and the activation must be divided by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteReport:
    """What was chosen for a site and what it costs: one JSON line.

    Losses are mean squared output errors relative to the mean squared output: tr(D G D^T) / tr(W G W^T); None where no
    statistics were used (RTN).
    """

    site: str
    algorithm: str
    format: str
    """The QuantSpec's label."""
    bytes: int
    loss_rtn: float | None = None
    loss: float | None = None
    held_out_loss_rtn: float | None = None
    held_out_loss: float | None = None
    scale_family: str = "identity"
    alpha: float | None = None
    mean_clip_ratio: float | None = None
    block_loss_start: float | None = None
    """Where a decoder block was tuned: mean squared error of its output on held-out tokens, each relative to the
    token's squared length, as tuning found it."""
    block_loss: float | None = None
    """The same, as tuning left it."""
    note: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteForecast:
    """What formats would cost a site, before any search."""

    energy: float
    """Mean squared output, summed over channels."""
    errors: dict[str, float]
    """Relative output error by format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SolvedGroup:
    """Everything the solver found for one activation group."""

    group: ActivationGroup
    weights: tuple[QuantizedWeight, ...]
    reports: tuple[SiteReport, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRecipe:
    """What the exporter must know besides the weights themselves; stored as recipe.json beside them."""

    model_fingerprint: str
    weight_form: WeightForm
    fold_input_scales: bool
    groups: tuple[ActivationGroup, ...]
    """The groups that hold quantized sites, in graph order; only those sites."""
    kept: tuple[tuple[str, str], ...]
    """(site, why) for each site that stays as it is."""
    search: str
    """Fingerprint of the algorithm, options and cache: a folder with another one is refused, not mixed."""
    summary: str
    """The algorithm and options in words."""
    embeddings: tuple[EmbeddingPlan, ...] = ()
    """The tables whose Gather nodes read INT4 codes."""
    unreached: tuple[UnreachedWeights, ...] = ()
    """Large weights that no MatMul or Gemm reads, and so stay as they are."""
    session_options: tuple[tuple[str, str], ...] = ()
    """(key, value) that the target runtime needs in genai_config.json's session options. An accuracy level among them
    holds where none is asked for; MatMulNBits nodes carry it themselves."""


# --------------------------------------------------------------------------- the checks of an export


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFileUse:
    """Bytes of a data file, of the tensors in it, and of the padding between them."""

    file_bytes: int
    referenced_bytes: int
    padding_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteError:
    """max |y - y_ref| / max |y_ref| over 8 random tokens, at accuracy level 1 and at the runtime's default level."""

    site: str
    exact: float
    default: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TableError:
    """max |y - y_ref| / max |y_ref| over the first, the last and a few random tokens."""

    table: str
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UnfusedSite:
    """A site that runs as DequantizeLinear and MatMul, and why."""

    site: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """The figures of a verified export; None where a check was not run, which ``skipped`` then explains."""

    sites: int
    data: DataFileUse
    fused: int | None
    unfused: tuple[UnfusedSite, ...] = ()
    worst_exact: SiteError | None = None
    """Largest error at accuracy level 1."""
    worst_default: SiteError | None = None
    """Largest error at the runtime's default level, where activations are rounded to int8."""
    skipped: tuple[str, ...] = ()
    tables: tuple[TableError, ...] = ()
    widened: bool = False
    """Whether a bfloat16 model ran as float32."""
