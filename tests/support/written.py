"""Read what commands leave in their folders, which says more than their words do and changes less often."""

from __future__ import annotations

import json
from pathlib import Path


def fused_sites(output: Path, weights: Path | None = None) -> tuple[int | None, int]:
    """Return how many sites ONNX Runtime runs as MatMulNBits (None where it was not tried), and how many there are.

    Args:
        output: Folder of the exported model.
        weights: Folder of its quantized weights, where it is not the one beside ``output``.
    """
    folder = weights or output.with_name(f"{output.name}.weights")
    report = json.loads((folder / "verification.json").read_text(encoding="utf-8"))
    return report["fused"], report["sites"]


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each file in ``folder``."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def cache_times(folder: Path) -> dict[Path, int]:
    """Return when each calibration cache below ``folder`` was written: one that is used again keeps its time."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")}
