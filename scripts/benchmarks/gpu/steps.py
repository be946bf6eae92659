"""The steps of the GPU check: each adds what it found to the figures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file

import genai_quant
from export.run import QuantizedModel
from export.verify.fusion import nodes_run_as_matmulnbits
from scripts.benchmarks.gpu.figures import FusionFigure, GpuCheck, Placement, StepFigure, WholeFigure
from scripts.benchmarks.gpu.models import TINY_SHAPE, Sizes, make_base
from scripts.benchmarks.search import measure_search
from scripts.options import LargePrecision
from stages.commands.calibrate_options import CalibrateConfig
from stages.commands.progress import progress_bar
from stages.commands.quantize_options import QuantizeConfig
from stages.evaluation.speed import measure_speed
from stages.evaluation.speed_round import SpeedRequest
from stages.model.directory import locate_model
from stages.model.load import load_graph
from stages.model.sites import find_groups, find_sites
from stages.runtime.providers import choose_providers
from stages.runtime.tap import open_value_tap
from stages.system.threads import usable_threads

_POLL = 0.02
_EPS = "cuda,cpu"
_PRECISIONS: tuple[LargePrecision, ...] = ("fp16", "fp32")

Change = Callable[[QuantizeConfig], QuantizeConfig]
_FORMATS: tuple[tuple[str, Change], ...] = (
    ("", lambda config: config),
    ("--lm_head none", lambda config: replace(config, lm_head="none")),
    ("--lm_head 4", lambda config: replace(config, lm_head="4")),
    ("--use_zero_point", lambda config: replace(config, use_zero_point=True)),
    ("--block_size 16", lambda config: replace(config, block_size=16)),
    ("--block_size 64", lambda config: replace(config, block_size=64)),
    ("--weight_operator dq", lambda config: replace(config, weight_operator="dq")),
)
"""What the target chooses by itself, then with an option that changes its choice of formats or operators."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Where the models of a run lie, and how large they are."""

    folder: Path
    sizes: Sizes

    @property
    def provider(self) -> str | None:
        return "cuda" if torch.cuda.is_available() else None

    @property
    def layers(self) -> Path:
        return self.folder / "layers"

    @property
    def whole(self) -> Path:
        return self.folder / "whole"


@contextmanager
def _device_peak() -> Iterator[list[int]]:
    """Give the block a list that holds, behind it, the most memory of the GPU that it took; nothing on the CPU."""
    peak: list[int] = []
    if not torch.cuda.is_available():
        yield peak
        return
    free, over = torch.cuda.mem_get_info()[0], threading.Event()
    least = [free]

    def watch() -> None:
        while not over.wait(_POLL):
            least[0] = min(least[0], torch.cuda.mem_get_info()[0])

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()
        peak.append(free - least[0])


def _timed(found: GpuCheck, name: str, work: Callable[[], object]) -> GpuCheck:
    """Return ``found`` with the seconds and memory of ``work``."""
    started = time.perf_counter()
    with _device_peak() as peak:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    step = StepFigure(name=name, seconds=time.perf_counter() - started, device_peak_bytes=next(iter(peak), None))
    return replace(found, steps=(*found.steps, step))


def place(found: GpuCheck, room: Room) -> GpuCheck:
    """Run a tiny base with its activations bound to the device."""
    directory = locate_model(make_base(TINY_SHAPE, room.folder / "placed", "fp16"))
    model, choice = load_graph(directory), choose_providers(_EPS)
    activations = tuple(group.activation for group in find_groups(model))
    with open_value_tap(model, directory, activations, choice, {}) as tap:
        devices = {value.device.type for _, value in tap.run(np.zeros((1, 8), np.int64))}
    placement = Placement(
        provider=tap.providers.names[0], outputs=", ".join(sorted(devices)), missing=tap.providers.missing
    )
    return replace(found, placement=placement)


def fuse(found: GpuCheck, room: Room) -> GpuCheck:
    """Count the sites that run as MatMulNBits on the provider, for every format that the target chooses."""
    for precision in _PRECISIONS:
        base = make_base(TINY_SHAPE, room.folder / f"fused-{precision}", precision, room.provider)
        for place, (options, change) in enumerate(_FORMATS):
            output = room.folder / f"fused-{precision}-{place}"
            config = QuantizeConfig(onnx_path=base, output_path=output, algo="rtn_dq", target="cuda", verify="off")
            found = replace(found, fusion=(*found.fusion, _fused(change(config), precision, options)))
    return found


def _fused(config: QuantizeConfig, precision: str, options: str) -> FusionFigure:
    made = _quantized(config)
    base = locate_model(config.onnx_path)
    names = {site.name for site in find_sites(load_graph(base))} & {site.site for site in made.search.sites}
    outputs = {node.outputs[0].name for node in load_graph(base).graph if node.name in names and node.outputs[0].name}
    run = nodes_run_as_matmulnbits(made.onnx_file, frozenset(outputs), base, choose_providers(_EPS).names)
    formats = ", ".join(sorted({site.format for site in made.search.sites}))
    return FusionFigure(precision=precision, options=options, formats=formats, sites=len(names), fused=len(names & run))


def search(found: GpuCheck, room: Room) -> GpuCheck:
    """Calibrate a few layers of the large model, and search one group of each shape."""
    sizes = room.sizes
    base = make_base(sizes.layers_of, room.layers, "fp16", room.provider)
    seconds = []
    for windows in (sizes.few_windows, sizes.windows):
        config = _calibration(base, windows, sizes, "none")
        name = f"statistics of {windows} windows, {sizes.layers_of.layers} layers"
        found = _timed(found, name, lambda config=config: genai_quant.calibrate(config))  # type: ignore[misc]
        seconds.append(found.steps[-1].seconds)
    with torch.no_grad():
        layers = tuple(measure_search(_quantization(base, room.folder / "unused")))
    *inside, head = layers
    times, parts = sizes.layers / sizes.layers_of.layers, sizes.head_parts
    grows = max(seconds[1] - seconds[0], 0.0) * sizes.windows / (sizes.windows - sizes.few_windows)
    wholes = (
        WholeFigure(
            name=f"statistics of {sizes.windows} windows, {sizes.layers} layers",
            seconds=max(seconds[0] - grows * sizes.few_windows / sizes.windows, 0.0) + times * grows,
            aim=sizes.statistics_aim,
            how=f"{times:.0f} times what {sizes.layers_of.layers} layers took, and the time to begin once",
        ),
        WholeFigure(
            name=f"search by awq_gptq, {sizes.layers} layers and lm_head",
            seconds=sizes.layers * sum(layer.seconds for layer in inside) + parts * head.seconds,
            aim=sizes.search_aim,
            how=f"{sizes.layers} times one group of each shape, {parts} times a part of lm_head",
        ),
    )
    return replace(found, layers=layers, wholes=(*found.wholes, *wholes))


def repeat(found: GpuCheck, room: Room) -> GpuCheck:
    """Search the layers twice as a command does, and compare the bits."""
    made: list[QuantizedModel] = []
    for name in ("one", "two"):
        config = _quantization(room.layers, room.folder / name)
        found = _timed(found, f"search and export, run {name}", lambda: made.append(_quantized(config)))  # noqa: B023
    one, two = (_tensors(model.weights) for model in made)
    same = one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    return replace(found, same_bits=same)


def _tensors(weights: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in weights.glob("*.safetensors") for name, tensor in load_file(file).items()}


def refine(found: GpuCheck, room: Room) -> GpuCheck:
    """Correct the layers by ``--refine``, which searches them first."""
    sizes, made = room.sizes, list[QuantizedModel]()
    plain = _quantized(_quantization(room.layers, room.folder / "one"))  # finished: read again
    config = replace(_quantization(room.layers, room.folder / "refined"), refine=True)
    found = _timed(found, "search, --refine and export", lambda: made.append(_quantized(config)))
    times = sizes.layers / sizes.layers_of.layers
    whole = WholeFigure(
        name=f"--refine, {sizes.layers} layers",
        seconds=times * max(made[0].search.seconds - plain.search.seconds, 0.0),
        aim=None,
        how=f"{times:.0f} times what it added to the search of {sizes.layers_of.layers} layers",
    )
    return replace(found, wholes=(*found.wholes, whole))


def run_whole(found: GpuCheck, room: Room) -> GpuCheck:
    """Calibrate and quantize a whole model with the default options of its runtime."""
    base = make_base(room.sizes.whole, room.whole, "fp16", room.provider)
    calibration = _calibration(base, room.sizes.whole_windows, room.sizes, "auto")
    name = f"whole model: statistics of {room.sizes.whole_windows} windows, tokens weighed"
    found = _timed(found, name, lambda: genai_quant.calibrate(calibration))
    config = _quantization(base, room.folder / "whole-int4")
    return _timed(found, "whole model: awq_gptq and export", lambda: _quantized(config))


def decode(found: GpuCheck, room: Room) -> GpuCheck:
    """Decode with the whole model's base and its INT4 model."""
    sizes = room.sizes
    request = SpeedRequest(
        prompt=tuple(range(2, 2 + sizes.prompt)),
        new_tokens=sizes.new_tokens,
        threads=usable_threads(),
    )
    models = [locate_model(folder) for folder in (room.whole, room.folder / "whole-int4")]
    with progress_bar() as progress:
        return replace(found, speed=measure_speed(models, request, sizes.rounds, progress))


def _calibration(base: Path, windows: int, sizes: Sizes, token_weights: Literal["auto", "none"]) -> CalibrateConfig:
    return CalibrateConfig(
        onnx_path=base,
        cache_dir=base.with_name(f"{base.name}.calibration"),
        use_random_calib=True,
        calib_size=windows,
        seq_len=sizes.seq_len,
        calibration_eps=_EPS,
        token_weights=token_weights,
        overwrite=True,
    )


def _quantized(config: QuantizeConfig) -> QuantizedModel:
    made = genai_quant.quantize(config)
    assert made is not None, "this is the only process"
    return made


def _quantization(base: Path, output: Path) -> QuantizeConfig:
    return QuantizeConfig(
        onnx_path=base,
        output_path=output,
        cache_dir=base.with_name(f"{base.name}.calibration"),
        algo="awq_gptq",
        target="cuda",
        verify="off",
    )
