"""Read the INT4 weights of a quantized Hugging Face checkpoint, as GPTQ's tools and Olive pack them.

Both hold a row's codes with the first in the lowest bits, and zero points the same way:

    GPTQ   qweight int32 [K / 8, N], qzeros int32 [nB, N / 8] (one less than the zero point in its first version),
           scales [nB, N], g_idx [K], each input's block
    Olive  qweight uint8 [N, K / 2], qzeros uint8 [N, ceil(nB / 2)] (absent where symmetric), scales [N, nB]
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from safetensors import safe_open
from torch import Tensor

from stages.errors import UserError
from stages.quantization.weights.bitpack import unpack_4bit

_CENTRE = 8
"""Zero point of a symmetric weight, whose codes are stored without a sign."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """One linear layer, unpacked: w[n, k] is (code - zero_point) * scale."""

    codes: UInt8[Tensor, "N K"]
    scales: Float32[Tensor, "N nB"]
    zero_points: UInt8[Tensor, "N nB"]

    @property
    def is_symmetric(self) -> bool:
        """Return whether every zero point lies in the centre."""
        return bool((self.zero_points == _CENTRE).all())

    @property
    def signed_codes(self) -> Tensor:
        """Return the codes of a symmetric weight with the centre at 0, int8."""
        return self.codes.to(torch.int8) - _CENTRE


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedCheckpoint:
    """An open folder of config.json and safetensors."""

    folder: Path
    method: str
    """gptq or olive."""
    block_size: int
    plus_one: bool
    """Whether stored zero points are one too small."""
    files: Mapping[str, Path]
    """Where each tensor lies."""

    def holds(self, module: str) -> bool:
        """Return whether the layer ``module`` is quantized."""
        return f"{module}.qweight" in self.files

    def read(self, module: str) -> PackedWeight:
        """Load the layer ``module``.

        Raises:
            UserError: its inputs were reordered, or its scales don't fit its blocks.
        """
        read = self._read_gptq if self.method == "gptq" else self._read_olive
        weight = read(module)
        outputs, inputs = weight.codes.shape
        expected = (outputs, -(-inputs // self.block_size))
        if weight.scales.shape != expected:
            raise UserError(
                f"{self.folder}: '{module}' has {list(weight.scales.shape)} scales, and blocks of {self.block_size} "
                f"need {list(expected)}; quantize it with one block size throughout."
            )
        return weight

    def _read_gptq(self, module: str) -> PackedWeight:
        self._require_order(module)
        packed, scales = self._tensor(f"{module}.qweight"), self._tensor(f"{module}.scales")
        codes = _unpack(packed.T, 8 * packed.shape[0])
        zeros = _unpack(self._tensor(f"{module}.qzeros"), scales.shape[1])
        zero_points = (zeros + 1) & 15 if self.plus_one else zeros
        return PackedWeight(codes=codes, scales=scales.T.float().contiguous(), zero_points=zero_points.T.contiguous())

    def _read_olive(self, module: str) -> PackedWeight:
        packed, scales = self._tensor(f"{module}.qweight"), self._tensor(f"{module}.scales").float()
        zeros = f"{module}.qzeros"
        centred = torch.full(scales.shape, _CENTRE, dtype=torch.uint8)
        zero_points = _unpack(self._tensor(zeros), scales.shape[1]) if zeros in self.files else centred
        return PackedWeight(codes=_unpack(packed, 2 * packed.shape[1]), scales=scales, zero_points=zero_points)

    def _require_order(self, module: str) -> None:
        name = f"{module}.g_idx"
        if name in self.files:
            order = self._tensor(name)
            if not torch.equal(order.long(), torch.arange(len(order)) // self.block_size):
                raise UserError(
                    f"{self.folder}: '{module}' has its inputs in another order (desc_act), which no ONNX operator "
                    "reads; quantize it without that."
                )

    def _tensor(self, name: str) -> Tensor:
        with safe_open(self.files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def open_checkpoint(folder: Path) -> QuantizedCheckpoint:
    """Open the checkpoint in ``folder``.

    Raises:
        UserError: it isn't one of 4 bits that GPTQ's tools or Olive wrote.
    """
    settings = _settings(folder)
    method = str(settings.get("quant_method", ""))
    if method not in ("gptq", "olive") or settings.get("bits") != 4:
        raise UserError(
            f"{folder} has no INT4 weights of GPTQ's or Olive's form (quant_method '{method}', bits "
            f"{settings.get('bits')}); pass another checkpoint."
        )
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    return QuantizedCheckpoint(
        folder=folder,
        method=method,
        block_size=int(settings["group_size"]),
        plus_one=settings.get("checkpoint_format") != "gptq_v2",
        files=files,
    )


def _settings(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} can't be read ({error}); pass a quantized checkpoint.") from error
    settings: dict[str, Any] = config.get("quantization_config") or {}
    return settings


def _unpack(packed: Tensor, columns: int) -> UInt8[Tensor, "rows columns"]:
    """Return the codes of each row of ``packed``, whatever integers hold them; surplus ones at the end are cut off."""
    rows = np.ascontiguousarray(packed.numpy()).view(np.uint8)
    whole = unpack_4bit(rows.reshape(-1), (rows.shape[0], 2 * rows.shape[1]), np.dtype(np.uint8))
    return torch.from_numpy(whole[:, :columns].copy())
