"""Number formats: float types under each library's name, INT4 and INT8 codes with their scales, embeddings' formats.

Shapes: N = out_features, K = in_features, B = block size, V = vocabulary, D = hidden size.
Weights are always [N, K] here, whatever the graph stores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch

from stages.records.sites import BlockAxis, FloatName, GatherForm

_CHANNEL_BLOCK_SIZES = (128, 64, 32, 16)
"""Every block size that CUDA's 4-bit kernels take, the largest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatType:
    """A floating-point storage type, under the name that each library gives it."""

    name: FloatName
    torch: torch.dtype
    onnx: ir.DataType
    onnxruntime: str

    @property
    def numpy(self) -> np.dtype[np.generic]:
        """Return numpy's type, of ml_dtypes where numpy has none."""
        return self.onnx.numpy()


_FLOAT_TYPES = (
    FloatType(name="float32", torch=torch.float32, onnx=ir.DataType.FLOAT, onnxruntime="tensor(float)"),
    FloatType(name="float16", torch=torch.float16, onnx=ir.DataType.FLOAT16, onnxruntime="tensor(float16)"),
    FloatType(name="bfloat16", torch=torch.bfloat16, onnx=ir.DataType.BFLOAT16, onnxruntime="tensor(bfloat16)"),
)
FLOAT_TYPES: Mapping[FloatName, FloatType] = MappingProxyType({kind.name: kind for kind in _FLOAT_TYPES})


NARROW_SCALES: Mapping[FloatName, FloatName] = MappingProxyType({"float32": "float16"})
"""Of stored scales that a Cast widens, by the type in which the graph computes; others are stored in that type."""


def torch_float(name: FloatName) -> torch.dtype:
    """Return the torch dtype that ``name`` stands for."""
    return FLOAT_TYPES[name].torch


def onnx_float(name: FloatName) -> ir.DataType:
    """Return the ONNX type that ``name`` stands for."""
    return FLOAT_TYPES[name].onnx


def float_of_onnx(dtype: ir.DataType | None) -> FloatType | None:
    """Return the storage type that ONNX calls ``dtype``; None where a base model can't have it."""
    return next((kind for kind in FLOAT_TYPES.values() if kind.onnx == dtype), None)


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
        """Short name: 4b32 is INT4 in blocks of 32, 4b32z has zero points too, 8ch is INT8 with a scale per channel."""
        zero_point = "" if self.symmetric else "z"
        match self.granularity:
            case PerBlock(block_size=size):
                return f"{self.bits}b{size}{zero_point}"
            case PerChannel():
                return f"{self.bits}ch{zero_point}"

    @property
    def description(self) -> str:
        """Describe the format in words: INT4, a float32 scale and a zero point for every 32 weights."""
        return self.in_words(self.scale_dtype)

    def in_words(self, scale: str) -> str:
        """Return ``description`` with another word for the type of the stored scales."""
        parts = f"{scale} scale" + ("" if self.symmetric else " and a zero point")
        match self.granularity:
            case PerBlock(block_size=size):
                return f"INT{self.bits}, a {parts} for every {size} weights"
            case PerChannel():
                return f"INT{self.bits}, a {parts} for every output channel"

    def block_size(self, in_features: int) -> int:
        """Return the block size B for a row of ``in_features`` inputs: the whole row where scales are per channel."""
        match self.granularity:
            case PerBlock(block_size=size):
                return size
            case PerChannel():
                return in_features

    def num_blocks(self, in_features: int) -> int:
        """Return the number of blocks, and so of scales, in a row of ``in_features`` inputs."""
        return -(-in_features // self.block_size(in_features))

    def format_bytes(self, out_features: int, in_features: int) -> int:
        """Return the bytes of codes, scales and zero points for an [N, K] weight."""
        scales = out_features * self.num_blocks(in_features)
        code_bits = out_features * in_features * self.bits
        zero_point_bits = 0 if self.symmetric else scales * self.bits
        return -(-code_bits // 8) + -(-zero_point_bits // 8) + scales * torch_float(self.scale_dtype).itemsize


class WeightForm(StrEnum):
    """The nodes that stand before the MatMul, or in its place."""

    DQ = "dq"
    """Packed codes and DequantizeLinear."""
    QDQ = "qdq"
    """The floating-point weight, QuantizeLinear and DequantizeLinear: ONNX Runtime packs it when it loads."""
    DQ_COLUMN_MAJOR = "dq_column_major"
    """Packed codes in rows of output channels, DequantizeLinear and Transpose: for execution providers that need it;
    ONNX Runtime's own never fuse it."""
    MATMUL_NBITS = "matmul_nbits"
    """com.microsoft MatMulNBits in place of the MatMul, for runtimes that fuse no DequantizeLinear and for bfloat16."""


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
    """How one table is stored: codes [V, D], a scale for each block along ``axis``, and zero points where it shares.

    Records of earlier versions lack the fields that have defaults: their tables are INT4 of their own.
    """

    table: EmbeddingTable
    axis: BlockAxis
    block_size: int
    form: GatherForm
    bits: Literal[4, 8] = 4
    symmetric: bool = True
    scale_range: Literal["full", "signed"] = "full"
    """Of INT4 without zero points, as of a weight; a shared table has the weight's own scales."""
    shared_with: str | None = None
    """Name of the lm_head site whose stored weight the lookups read too; such a table has no numbers of its own."""
    scale_dtype: FloatName | None = None
    """Of stored scales; None: the table's own."""

    @property
    def spec(self) -> QuantSpec:
        return QuantSpec(
            bits=self.bits,
            symmetric=self.symmetric,
            granularity=PerBlock(block_size=self.block_size),
            scale_dtype=self.scale_dtype or self.table.dtype,
        )

    @property
    def scales_shape(self) -> tuple[int, int]:
        rows, columns = self.table.shape
        blocks = self.spec.num_blocks(self.table.shape[self.axis])
        return (blocks, columns) if self.axis == 0 else (rows, blocks)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the codes, in C order."""
        return -(-self.table.vocabulary * self.table.hidden * self.bits // 8)

    @property
    def format_bytes(self) -> int:
        """Bytes of codes, scales and zero points, wherever they are stored."""
        rows, columns = self.scales_shape
        zero_points = 0 if self.symmetric else rows * -(-columns * self.bits // 8)
        return self.packed_bytes + rows * columns * torch_float(self.spec.scale_dtype).itemsize + zero_points

    @property
    def own_bytes(self) -> int:
        """Bytes that the table adds to a model: none where it shares those of lm_head."""
        return self.format_bytes if self.shared_with is None else 0

    @property
    def label(self) -> str:
        """Short description for people: INT8 block 128."""
        return f"INT{self.bits} block {self.block_size}"


def channel_block_size(in_features: int) -> int:
    """Return the block size that pads a row of ``in_features`` inputs least; of several, the largest."""
    return min(_CHANNEL_BLOCK_SIZES, key=lambda size: -in_features % size)
