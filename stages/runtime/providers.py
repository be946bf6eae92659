"""Choose the execution providers of ONNX Runtime that load on this machine."""

from __future__ import annotations

from dataclasses import dataclass

import onnxruntime as ort
import torch

from stages.errors import UserError

CPU = "CPUExecutionProvider"
CPU_ONLY = (CPU,)
CUDA = "CUDAExecutionProvider"
NV_TENSORRT_RTX = "NvTensorRTRTXExecutionProvider"
_PROVIDERS = {"cpu": CPU, "cuda": CUDA, "dml": "DmlExecutionProvider", "nvtensorrtrtx": NV_TENSORRT_RTX}
SHORT_NAMES = {provider: short for short, provider in _PROVIDERS.items()} | {NV_TENSORRT_RTX: "NvTensorRtRtx"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderChoice:
    """Providers to ask for, in order, and (short name, why) of those that were requested but can't load."""

    names: tuple[str, ...]
    missing: tuple[tuple[str, str], ...]


def choose_providers(wanted: str, option: str = "--calibration_eps") -> ProviderChoice:
    """Parse a list such as ``cuda,cpu`` and keep what loads on this machine; the CPU is always last.

    Raises:
        UserError: a name isn't one of cpu, cuda, dml, NvTensorRtRtx.
    """
    names: list[str] = []
    missing: list[tuple[str, str]] = []
    available = ort.get_available_providers()
    for raw in wanted.strip("[]").replace(" ", ",").split(","):
        short = raw.strip().lower()
        if not short:
            continue
        if short not in _PROVIDERS:
            raise UserError(f"{option}: '{raw}' is not one of cuda, cpu, dml, NvTensorRtRtx.")
        provider = _PROVIDERS[short]
        if provider not in available:
            missing.append((raw, "this onnxruntime package was built without it"))
        elif short == "cuda" and not torch.cuda.is_available():
            missing.append((raw, "no CUDA device, or torch was installed without CUDA"))
        elif provider not in names:
            names.append(provider)
    if CPU not in names:
        names.append(CPU)
    if CUDA in names:
        ort.preload_dlls()
    return ProviderChoice(names=tuple(names), missing=tuple(missing))


def own_providers(name: str | None) -> tuple[str, ...]:
    """Return the providers for a model whose genai_config.json names ``name``; empty where only the CPU is there."""
    if name is None or name.lower() not in _PROVIDERS:
        return ()
    names = choose_providers(name).names
    return () if names == CPU_ONLY else names
