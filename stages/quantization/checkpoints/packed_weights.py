"""Unpack the integer weights of quantized Hugging Face checkpoints, each tool's packing into one form.

Within a word the first code has the lowest bits. N = outputs, K = inputs, nB = blocks of a row:

    GPTQ    qweight int32 [K * bits / 32, N], qzeros int32 [nB, N * bits / 32] (one less than the zero point in its
            first version), scales [nB, N], g_idx [K], each input's block
    AWQ     qweight int32 [K, N / 8], qzeros int32 [nB, N / 8], the outputs of a word in the order 0 2 4 6 1 3 5 7;
            scales [nB, N]
    compressed-tensors
            weight_packed int32 [N, K * bits / 32], weight_zero_point int32 [N * bits / 32, nB], both with the centre
            added; weight_scale [N, nB], weight_shape. Or weight and weight_zero_point int8, unpacked and signed
    Olive   qweight uint8 [N, K * bits / 8], qzeros uint8 [N, nB * bits / 8] rounded up, none where symmetric;
            scales [N, nB]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, UInt8
from torch import Tensor

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word of AWQ each of eight outputs lies."""
_BYTE = 8


class Unreadable(Exception):
    """Says in words why a layer of a checkpoint can't be taken over: "has its inputs in another order"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """One linear layer, unpacked: w[n, k] is (code - zero_point) * scale."""

    bits: int
    codes: UInt8[Tensor, "N K"]
    scales: Float[Tensor, "N nB"]
    zero_points: UInt8[Tensor, "N nB"]

    @property
    def shape(self) -> tuple[int, int]:
        """Return N and K."""
        rows, columns = self.codes.shape
        return rows, columns

    @property
    def is_symmetric(self) -> bool:
        """Return whether every zero point lies in the centre."""
        return bool((self.zero_points == 1 << (self.bits - 1)).all())

    def block_size(self, said: int) -> int:
        """Return the inputs that share a scale: what the checkpoint says where that fits, else what the shapes say.

        Args:
            said: the checkpoint's group size; -1 for one scale a row.

        Raises:
            Unreadable: blocks of no one size give so many scales.
        """
        inputs, blocks = self.codes.shape[1], self.scales.shape[1]
        if blocks == 1:
            return inputs
        if said > 0 and -(-inputs // said) == blocks:
            return said
        if inputs % blocks:
            raise Unreadable(f"has {blocks} scales for {inputs} inputs, which are no blocks of one size")
        return inputs // blocks

    def floats(self, block_size: int) -> Float32[Tensor, "N K"]:
        """Return the weight that the codes stand for."""
        width = self.codes.shape[1]
        zeros, scales = (
            part.float().repeat_interleave(block_size, dim=1)[:, :width] for part in (self.zero_points, self.scales)
        )
        return (self.codes.float() - zeros) * scales

    def rows(self, first: int, last: int) -> PackedWeight:
        """Return the outputs from ``first`` to before ``last``."""
        return PackedWeight(
            bits=self.bits,
            codes=self.codes[first:last],
            scales=self.scales[first:last],
            zero_points=self.zero_points[first:last],
        )


def unpack_gptq(parts: Mapping[str, Tensor], *, plus_one: bool) -> PackedWeight:
    """Unpack what GPTQ's tools wrote.

    Args:
        parts: qweight, qzeros and scales by name.
        plus_one: whether stored zero points are one too small.
    """
    packed, scales = parts["qweight"], parts["scales"]
    zeros = _integers(parts["qzeros"])
    outputs = scales.shape[1]
    bits = _whole_bits(32 * zeros.shape[1], outputs)
    zero_points = _unpacked(zeros, bits)[:, :outputs]
    if plus_one:
        zero_points = (zero_points + 1) & ((1 << bits) - 1)
    return PackedWeight(
        bits=bits,
        codes=_unpacked(packed.T, bits),
        scales=scales.T.contiguous(),
        zero_points=zero_points.T.contiguous(),
    )


def unpack_awq(parts: Mapping[str, Tensor]) -> PackedWeight:
    """Unpack what AutoAWQ wrote for its kernel GEMM: qweight, qzeros and scales by name."""
    packed, scales = parts["qweight"], parts["scales"]
    zeros = _integers(parts["qzeros"])
    if packed.shape[1] * _BYTE != scales.shape[1]:
        raise Unreadable("isn't packed for AWQ's kernel GEMM")
    return PackedWeight(
        bits=4,
        codes=_unmixed(packed).T.contiguous(),
        scales=scales.T.contiguous(),
        zero_points=_unmixed(zeros).T.contiguous(),
    )


def unpack_compressed(parts: Mapping[str, Tensor]) -> PackedWeight:
    """Unpack what compressed-tensors wrote: weight_packed or weight, weight_scale and the others, by name."""
    packed = parts.get("weight_packed")
    if packed is None:
        return _from_bytes(parts)
    outputs, inputs = (int(size) for size in parts["weight_shape"])
    bits = _whole_bits(32 * packed.shape[1], inputs)
    scales = _by_row(parts["weight_scale"], outputs)
    zeros = parts.get("weight_zero_point")
    return PackedWeight(
        bits=bits,
        codes=_unpacked(packed, bits)[:, :inputs].contiguous(),
        scales=scales,
        zero_points=_centred(scales, bits) if zeros is None else _unpacked(_integers(zeros).T, bits)[:, :outputs].T,
    )


def unpack_olive(parts: Mapping[str, Tensor], bits: int) -> PackedWeight:
    """Unpack what Olive wrote: qweight, scales and qzeros if there are any, by name.

    Args:
        parts: the tensors.
        bits: of a code, which no shape tells.
    """
    scales, zeros = parts["scales"], parts.get("qzeros")
    return PackedWeight(
        bits=bits,
        codes=_unpacked(parts["qweight"], bits),
        scales=scales,
        zero_points=_centred(scales, bits) if zeros is None else _unpacked(zeros, bits)[:, : scales.shape[1]],
    )


def require_order(order: Int[Tensor, " K"], block_size: int) -> None:
    """Raise Unreadable unless input k lies in block k // ``block_size``, or no order was ever set."""
    if bool((order < 0).all()) or torch.equal(order.long(), torch.arange(len(order)) // block_size):
        return
    raise Unreadable(
        "has its inputs in another order (desc_act, actorder group), which no ONNX operator reads; quantize it without "
        "that, or with static groups"
    )


def _from_bytes(parts: Mapping[str, Tensor]) -> PackedWeight:
    codes = parts["weight"]
    if codes.dtype != torch.int8:
        raise Unreadable(f"has {str(codes.dtype).removeprefix('torch.')} codes; only integers can be taken over")
    scales, zeros = _by_row(parts["weight_scale"], len(codes)), parts.get("weight_zero_point")
    shifted = _centred(scales, _BYTE) if zeros is None else _offset(_by_row(_integers(zeros), len(codes)))
    return PackedWeight(bits=_BYTE, codes=_offset(codes), scales=scales, zero_points=shifted)


def _offset(signed: Tensor) -> UInt8[Tensor, "N K"]:
    return (signed.to(torch.int16) + (1 << (_BYTE - 1))).to(torch.uint8)


def _by_row(parameters: Tensor, outputs: int) -> Tensor:
    """Return scales or zero points [N, nB], where there may be one for the whole layer."""
    return parameters.reshape(1, 1).expand(outputs, 1) if parameters.numel() == 1 else parameters.reshape(outputs, -1)


def _integers(zero_points: Tensor) -> Tensor:
    if zero_points.is_floating_point():
        raise Unreadable(
            "has zero points between the codes, which no ONNX operator reads; quantize it with integer ones"
        )
    return zero_points


def _whole_bits(stored: int, numbers: int) -> int:
    bits = stored // max(numbers, 1)
    if bits not in (4, 8):
        raise Unreadable(f"has {stored / max(numbers, 1):.3g} bits for each weight; quantize it with 4 or 8")
    return bits


def _centred(scales: Tensor, bits: int) -> UInt8[Tensor, "N nB"]:
    return torch.full(scales.shape, 1 << (bits - 1), dtype=torch.uint8)


def _unpacked(packed: Tensor, bits: int) -> UInt8[Tensor, "rows columns"]:
    """Return the codes of each row of ``packed``, whatever integers hold them."""
    bytes_ = np.ascontiguousarray(packed.numpy()).view(np.uint8)
    shifts = np.arange(0, _BYTE, bits, dtype=np.uint8)
    codes = (bytes_[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return torch.from_numpy(codes.reshape(len(bytes_), -1))


def _unmixed(packed: Int[Tensor, "rows words"]) -> UInt8[Tensor, "rows columns"]:
    """Undo AWQ's order within each word."""
    codes = _unpacked(packed, 4)
    return codes.reshape(len(codes), -1, _BYTE)[:, :, list(_AWQ_PLACES)].reshape(codes.shape)
