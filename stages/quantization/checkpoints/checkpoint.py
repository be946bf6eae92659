"""Open a quantized Hugging Face checkpoint: what its files say, and its layers as they are asked for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from stages.errors import UserError, in_one_line
from stages.quantization.checkpoints.packed_weights import (
    PackedWeight,
    Unreadable,
    require_order,
    unpack_awq,
    unpack_compressed,
    unpack_gptq,
    unpack_olive,
)

_Unpack = Callable[[Mapping[str, Tensor]], PackedWeight]
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_EXPERT = re.compile(r"\bexperts\.(?:[A-Za-z_]+\.)*(\d+)(?:\.|$)")
_PARTS = (
    *("qweight", "qzeros", "scales", "g_idx"),
    *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight"),
)
_COMPRESSED = ("pack-quantized", "int-quantized", "naive-quantized", "mixed-precision")
"""Formats of compressed-tensors that hold integers."""
_SETTINGS_FILES = ("quantize_config.json", "quant_config.json")
"""Where older tools wrote what stands in config.json today."""
_SAMPLE = 4096
Place = tuple[int | None, int | None]
"""A decoder layer, None outside all, and an expert of it, None outside of experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeight:
    """A quantized linear layer and the inputs that share a scale there."""

    packed: PackedWeight
    block_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedCheckpoint:
    """An open folder of config.json and safetensors."""

    folder: Path
    method: str
    """What config.json calls it: gptq, awq, auto-round, compressed-tensors, olive."""
    group_size: int
    """That most layers have; -1 for one scale a row."""
    unpack: _Unpack
    modules: tuple[str, ...]
    """Names of the quantized layers."""
    files: Mapping[str, Path]
    """Where each tensor lies."""

    def modules_of(self, place: Place) -> tuple[str, ...]:
        """Return the quantized layers that lie at a place; of an expert all of its layer where none has a number."""
        layer, expert = place
        inside = [module for module in self.modules if layer_number(module) == layer]
        experts = {module: number for module in inside if (number := expert_number(module)) is not None}
        if expert is not None and not experts:
            return tuple(inside)
        return tuple(module for module in inside if experts.get(module) == expert)

    def read(self, module: str) -> LayerWeight:
        """Load the layer ``module``.

        Raises:
            UserError: it can't be taken over as it is.
        """
        try:
            packed = self.unpack({part: self.tensor(f"{module}.{part}") for part in _PARTS if self._has(module, part)})
            size = packed.block_size(self.group_size)
            if packed.scales.shape != packed.zero_points.shape or len(packed.scales) != len(packed.codes):
                raise Unreadable("has scales and zero points of other shapes than its codes need")
            for part in ("g_idx", "weight_g_idx"):
                if self._has(module, part):
                    require_order(self.tensor(f"{module}.{part}"), size)
        except Unreadable as why:
            raise UserError(f"--checkpoint {self.folder}: '{module}' {why}.") from why
        except (KeyError, ValueError, IndexError, RuntimeError) as error:
            raise UserError(
                f"--checkpoint {self.folder}: '{module}' has tensors that are not of the form '{self.method}' "
                f"({in_one_line(error)}); download or quantize it again."
            ) from error
        return LayerWeight(packed=packed, block_size=size)

    def vectors(self, layer: int | None, size: int) -> list[Tensor]:
        """Return the floating-point vectors of ``size`` numbers in a decoder layer (outside all for None), float32."""
        names = [name for name in self.files if layer_number(name) == layer and not name.endswith(_PARTS[:-1])]
        tensors = [self.tensor(name) for name in names if self._shape(name) == [size]]
        return [tensor.float() for tensor in tensors if tensor.is_floating_point()]

    def fingerprint(self) -> str:
        """Return a digest of the files' names, sizes, and first and last 4 KiB."""
        digest = hashlib.sha256()
        for path in (*sorted({*self.files.values()}), *sorted(self.folder.glob("*config.json"))):
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            with path.open("rb") as file:
                digest.update(file.read(_SAMPLE))
                file.seek(max(size - _SAMPLE, 0))
                digest.update(file.read())
        return digest.hexdigest()

    def tensor(self, name: str) -> Tensor:
        """Load one tensor.

        Raises:
            UserError: its file can't be read.
        """
        try:
            with safe_open(self.files[name], "pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise _damaged(self.files[name], error) from error
        return tensor

    def _has(self, module: str, part: str) -> bool:
        return f"{module}.{part}" in self.files

    def _shape(self, name: str) -> list[int]:
        with safe_open(self.files[name], "pt") as file:
            shape: list[int] = file.get_slice(name).get_shape()
        return shape


def layer_number(name: str) -> int | None:
    """Return the first number that is a whole part of ``name``: model.layers.3.mlp.experts.5.up_proj lies in 3."""
    found = _LAYER.search(name)
    return None if found is None else int(found[1])


def expert_number(name: str) -> int | None:
    """Return the number of the expert that ``name`` lies in, 5 of layers.3.mlp.experts.5.w1; None for other names."""
    found = _EXPERT.search(name)
    return None if found is None else int(found[1])


def open_checkpoint(folder: Path) -> QuantizedCheckpoint:
    """Open the checkpoint in ``folder``.

    Raises:
        UserError: it holds no integer weights of a form that is known, or can't be read.
    """
    settings = _settings(folder)
    method = _method(folder, settings)
    unpack = _unpacker(folder, method, settings)
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                files |= dict.fromkeys(file.keys(), path)
        except (OSError, SafetensorError) as error:
            raise _damaged(path, error) from error
    modules = tuple(name.rpartition(".")[0] for name in files if _marks_module(name, files))
    if not modules:
        why = "has no *.safetensors" if not files else "holds no quantized layer"
        raise UserError(f"--checkpoint {folder} {why}; pass a folder that was quantized to INT4 or INT8.")
    return QuantizedCheckpoint(
        folder=folder,
        method=method,
        group_size=int(settings.get("group_size", settings.get("q_group_size", -1))),
        unpack=unpack,
        modules=modules,
        files=files,
    )


def _marks_module(name: str, files: Mapping[str, Path]) -> bool:
    module, _, part = name.rpartition(".")
    return part in ("qweight", "weight_packed") or (part == "weight" and f"{module}.weight_scale" in files)


def _method(folder: Path, settings: Mapping[str, Any]) -> str:
    said = str(settings.get("quant_method", "")).lower()
    if said:
        return said.removeprefix("intel/")
    if "w_bit" in settings or "zero_point" in settings:
        return "awq"
    if "bits" in settings and "desc_act" in settings:
        return "gptq"
    raise UserError(
        f"--checkpoint {folder}: config.json says nothing about quantization; pass a folder that GPTQ, AWQ, AutoRound "
        "or llm-compressor wrote."
    )


def _unpacker(folder: Path, method: str, settings: Mapping[str, Any]) -> _Unpack:
    """Return what unpacks a layer's tensors."""
    packing = str(settings.get("packing_format", "")).lower()
    match method:
        case "awq":
            version = str(settings.get("version", "gemm")).lower()
            if version != "gemm":
                raise UserError(
                    f"--checkpoint {folder} is packed for AWQ's kernel {version}; save it for GEMM, the usual one."
                )
            return unpack_awq
        case "auto-round" if "awq" in packing:
            return unpack_awq
        case "gptq" | "auto-round":
            return partial(unpack_gptq, plus_one=settings.get("checkpoint_format") != "gptq_v2")
        case "compressed-tensors":
            _require_integers(folder, settings)
            return unpack_compressed
        case "olive":
            return partial(unpack_olive, bits=int(settings.get("bits", 4)))
        case _:
            raise UserError(
                f"--checkpoint {folder} is quantized by '{method}', whose weights can't be taken over; pass one of "
                "GPTQ, AWQ, AutoRound or compressed-tensors."
            )


def _require_integers(folder: Path, settings: Mapping[str, Any]) -> None:
    form = str(settings.get("format", ""))
    if form not in _COMPRESSED:
        raise UserError(
            f"--checkpoint {folder} has compressed-tensors of the format '{form}'; pass one with INT4 or INT8 weights "
            "(pack-quantized, int-quantized)."
        )
    if _rotates((settings.get("transform_config") or {}).get("config_groups") or {}):
        raise UserError(
            f"--checkpoint {folder} rotates activations while it runs, which the base's graph doesn't; pass one "
            "without online transforms."
        )


def _rotates(groups: Mapping[str, Any]) -> bool:
    """Return whether any transform is computed for activations, and not folded into weights alone."""
    places = [apply.get("location", "") for group in groups.values() for apply in group.get("apply", ())]
    return any(not str(place).startswith("weight") for place in places)


def _settings(folder: Path) -> dict[str, Any]:
    """Return what the folder says about its quantization; nothing where it says nothing."""
    found = _json(folder, "config.json").get("quantization_config")
    if isinstance(found, dict):
        return found
    beside = [name for name in _SETTINGS_FILES if (folder / name).is_file()]
    return _json(folder, beside[0]) if beside else {}


def _json(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"--checkpoint {folder / name} can't be read ({in_one_line(error)}); pass a Hugging Face folder with "
            "quantized weights."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"--checkpoint {folder / name} holds no JSON object; download it again.")
    return content


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"--checkpoint {path} can't be read ({in_one_line(error)}); download it again.")
