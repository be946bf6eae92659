"""How both stages' times grow with tokens, layers and width: synthetic Llamas that differ in one size alone."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from scripts.base_models.synthetic_llama import LlamaShape, random_llama
from scripts.benchmarks.figures import Axis, GrowthFigure, GrowthPoint
from stages.calibration.run import calibrate
from stages.commands.calibrate_options import CalibrateConfig
from stages.commands.quantize_options import QuantizeConfig
from stages.model.genai_config import GENAI_CONFIG
from stages.quantization.run import open_search
from stages.quantization.search.parallel import solve_groups

_SHAPE = LlamaShape(
    layers=2, hidden=512, intermediate=1024, heads=8, kv_heads=4, head_size=64, vocabulary=1024, context=4096
)
_WINDOWS, _LENGTH = 8, 256


def measure_growth(scratch: Path) -> Iterator[GrowthFigure]:
    """Twice and four times the tokens, the layers, the width."""
    steps = (1, 2, 4)
    sizes: dict[Axis, list[tuple[int, LlamaShape, int]]] = {
        "tokens": [(_WINDOWS * _LENGTH * step, _SHAPE, _WINDOWS * step) for step in steps],
        "layers": [(_SHAPE.layers * step, replace(_SHAPE, layers=_SHAPE.layers * step), _WINDOWS) for step in steps],
        "inputs of a layer (K)": [(_SHAPE.hidden * step, _wider(step), _WINDOWS) for step in steps],
    }
    for axis, of_axis in sizes.items():
        points = [_measure(shape, windows, size, scratch / f"{axis[:6]}-{size}") for size, shape, windows in of_axis]
        yield GrowthFigure(axis=axis, points=tuple(points))


def _wider(step: int) -> LlamaShape:
    return replace(
        _SHAPE,
        hidden=_SHAPE.hidden * step,
        intermediate=_SHAPE.intermediate * step,
        heads=_SHAPE.heads * step,
        kv_heads=_SHAPE.kv_heads * step,
    )


def _measure(shape: LlamaShape, windows: int, size: int, folder: Path) -> GrowthPoint:
    base = folder / "base"
    base.mkdir(parents=True)
    ir.save(random_llama(shape, ir.DataType.FLOAT, seed=0), base / "model.onnx", external_data="model.onnx.data")
    (base / GENAI_CONFIG).write_text(json.dumps(shape.genai_config()), encoding="utf-8")
    cache = folder / "cache"
    config = CalibrateConfig(
        onnx_path=base, use_random_calib=True, calib_size=windows, seq_len=_LENGTH, cache_dir=cache
    )
    started = time.perf_counter()
    calibrate(config)
    calibrate_seconds = time.perf_counter() - started
    search = open_search(
        QuantizeConfig(onnx_path=base, output_path=folder / "int4", cache_dir=cache, algo="awq_full", block_size=32)
    )
    started = time.perf_counter()
    for _ in solve_groups(search.solver, search.groups):
        pass
    return GrowthPoint(size=size, calibrate_seconds=calibrate_seconds, search_seconds=time.perf_counter() - started)
