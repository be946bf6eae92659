"""Pack weights as each tool does, one code after the other, and write the folders that they write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Outputs of a word, from the lowest bits up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """A weight by plain rounding: w[n, k] is (code - zero) * scale of k's block."""

    bits: int
    codes: Tensor
    zeros: Tensor
    scales: Tensor
    block: int

    @property
    def floats(self) -> Tensor:
        rows, columns = self.codes.shape
        found = torch.zeros(rows, columns)
        for column in range(columns):
            block = column // self.block
            codes = self.codes[:, column].float() - self.zeros[:, block].float()
            found[:, column] = codes * self.scales[:, block].float()
        return found


def rounded(weight: Tensor, block: int, bits: int = 4, *, symmetric: bool = False) -> Rounded:
    """Round in blocks; the last may be shorter. Scales are float16, as the tools store them."""
    top, centre = (1 << bits) - 1, 1 << (bits - 1)
    scales, zeros, codes = [], [], []
    for part in weight.split(block, dim=1):
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scale = (part.abs().amax(1) / (centre - 1) if symmetric else (high - low) / top).clamp(min=1e-4).half()
        zero = torch.full_like(low, centre) if symmetric else (-low / scale.float()).round().clamp(0, top)
        codes.append((part / scale.float()[:, None] + zero[:, None]).round().clamp(0, top))
        scales.append(scale)
        zeros.append(zero)
    return Rounded(
        bits=bits,
        codes=torch.cat(codes, dim=1).to(torch.uint8),
        zeros=torch.stack(zeros, dim=1).to(torch.uint8),
        scales=torch.stack(scales, dim=1),
        block=block,
    )


def words(rows: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Put the codes of each row into int32 words: the i-th place of a word holds its code ``order[i]``."""
    count = 32 // bits
    found = []
    for row in rows.tolist():
        filled = row + [0] * (-len(row) % count)
        line = []
        for start in range(0, len(filled), count):
            word = 0
            for place in range(count):
                word |= filled[start + (order or range(count))[place]] << (bits * place)
            line.append(word - (1 << 32) if word >= 1 << 31 else word)
        found.append(line)
    return torch.tensor(found, dtype=torch.int32)


def as_gptq(weight: Rounded, *, minus_one: bool = True) -> dict[str, Tensor]:
    zeros = (weight.zeros.int() - int(minus_one)) % (1 << weight.bits)
    return {
        "qweight": words(weight.codes, weight.bits).T.contiguous(),
        "qzeros": words(zeros.T, weight.bits),
        "scales": weight.scales.T.contiguous(),
        "g_idx": (torch.arange(weight.codes.shape[1]) // weight.block).int(),
    }


def as_gptq_v2(weight: Rounded) -> dict[str, Tensor]:
    return as_gptq(weight, minus_one=False)


def as_awq(weight: Rounded) -> dict[str, Tensor]:
    return {
        "qweight": words(weight.codes.T, 4, AWQ_ORDER),
        "qzeros": words(weight.zeros.T, 4, AWQ_ORDER),
        "scales": weight.scales.T.contiguous(),
    }


def as_compressed(weight: Rounded) -> dict[str, Tensor]:
    """Signed codes with the centre added, which are the unsigned ones."""
    parts = {
        "weight_packed": words(weight.codes, weight.bits),
        "weight_scale": weight.scales,
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if not bool((weight.zeros == 1 << (weight.bits - 1)).all()):
        parts["weight_zero_point"] = words(weight.zeros.T, weight.bits).T.contiguous()
    return parts


def as_bytes(weight: Rounded) -> dict[str, Tensor]:
    """Return what compressed-tensors calls int-quantized."""
    zeros = (weight.zeros.int() - 128).to(torch.int8)
    codes = (weight.codes.int() - 128).to(torch.int8)
    return {"weight": codes, "weight_scale": weight.scales, "weight_zero_point": zeros}


def as_olive(weight: Rounded) -> dict[str, Tensor]:
    def packed(rows: Tensor) -> Tensor:
        whole = torch.nn.functional.pad(rows, (0, rows.shape[1] % 2))
        return whole if weight.bits == 8 else whole[:, 0::2] | (whole[:, 1::2] << 4)

    return {"qweight": packed(weight.codes), "qzeros": packed(weight.zeros), "scales": weight.scales}


SCHEMAS = {
    "gptq": (as_gptq, {"quant_method": "gptq"}),
    "gptq_v2": (as_gptq_v2, {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}),
    "awq": (as_awq, {"quant_method": "awq", "version": "gemm"}),
    "auto-round": (as_gptq, {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}),
    "auto-round awq": (as_awq, {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}),
    "compressed-tensors": (as_compressed, {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    "int-quantized": (as_bytes, {"quant_method": "compressed-tensors", "format": "int-quantized"}),
    "olive": (as_olive, {"quant_method": "olive"}),
}
"""What packs a weight, and what config.json then says."""


def save_checkpoint(
    folder: Path,
    weights: Mapping[str, Rounded],
    schema: str,
    floats: Mapping[str, Tensor] | None = None,
    **said: object,
) -> Path:
    """Write a folder with ``weights`` by the names of their layers, and ``floats`` by those of the tensors."""
    pack, settings = SCHEMAS[schema]
    tensors = {f"{name}.{part}": tensor for name, each in weights.items() for part, tensor in pack(each).items()}
    first = next(iter(weights.values()))
    content = {"bits": first.bits, "group_size": first.block, **settings, **said}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": content}))
    save_file({**tensors, **(floats or {})}, folder / "model.safetensors")
    return folder
