"""List the runs of Olive and AutoRound: each quantizes the base's checkpoint, and its weights go into our graph."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from scripts.options import AutoRoundRecipe, PeerConfig
from scripts.peers.environment import ensure_environment, pinned_version, python_of
from scripts.peers.peer import (
    Peer,
    PeerRequest,
    block_sizes,
    calibration_windows,
    float_checkpoint,
    make_float_checkpoint,
    zero_points,
)
from stages.commands.quantize_options import Embedding, QuantizeConfig
from stages.evaluation.bench.runs import Run
from stages.model.directory import ModelDirectory, locate_model
from stages.model.load import load_graph
from stages.quantization.plan.plan import plan_model
from stages.quantize import quantize

_HERE = Path(__file__).parent
OLIVE_RUNNER = _HERE / "run_olive.py"
AUTOROUND_RUNNER = _HERE / "run_autoround.py"
CHECKPOINT_REQUIREMENTS = _HERE / "checkpoints.txt"
_PACKAGES = {"olive": "olive-ai", "autoround": "auto-round"}
_WORDS: Mapping[int | None, Embedding] = MappingProxyType({4: "4", 8: "8", None: "none"})
_WINDOWS = "calibration-windows.npy"
_RECIPES: Mapping[AutoRoundRecipe, dict[str, float]] = MappingProxyType(
    {"default": {}, "light": {"iters": 50, "lr": 5e-3}, "best": {"iters": 1000}}
)
"""What AutoRound's command line calls so; all of them take 8 windows at a time."""


def checkpoint_peers(base: ModelDirectory, config: PeerConfig) -> Iterator[Peer]:
    """Yield the runs of Olive and AutoRound in every format that was asked for."""
    for size in block_sizes(config):
        for zero_point in zero_points(config):
            for method in config.olive:
                request = PeerRequest(method=method, block_size=size, use_zero_point=zero_point)
                yield _peer("olive", OLIVE_RUNNER, request, base, config)
            for recipe in config.autoround:
                request = PeerRequest(method=recipe, block_size=size, use_zero_point=zero_point)
                yield _peer("autoround", AUTOROUND_RUNNER, request, base, config, {"options": _RECIPES[recipe]})


def _peer(
    library: str,
    runner: Path,
    request: PeerRequest,
    base: ModelDirectory,
    config: PeerConfig,
    extra: Mapping[str, Any] = MappingProxyType({}),
) -> Peer:
    """Return the run of one quantizer.

    Args:
        library: what the row is called after.
        runner: the script that quantizes a checkpoint.
        request: the method and format.
        base: the base model.
        config: where everything lies.
        extra: what ``runner`` is told besides.
    """
    name = request.name(library)
    folder = config.output.absolute() / name
    quantized = folder.with_name(f"{name}.checkpoint")
    windows = folder.with_name(_WINDOWS)
    content = {
        "checkpoint": str(float_checkpoint(config)),
        "output": str(quantized),
        "windows": str(windows),
        "block_size": request.block_size,
        "use_zero_point": request.use_zero_point,
        **extra,
    }

    def prepare() -> None:
        ensure_environment(config.checkpoint_environment_path, CHECKPOINT_REQUIREMENTS)
        make_float_checkpoint(config)
        np.save(windows, calibration_windows(base, config))
        shutil.rmtree(quantized, ignore_errors=True)

    run = Run(
        name=name,
        command=(str(python_of(config.checkpoint_environment_path)), str(runner), json.dumps(content)),
        model=folder,
        before=prepare,
        after=partial(write_graph, quantized, _our_formats(request, base, folder)),
    )
    package = _PACKAGES[library]
    version = pinned_version(CHECKPOINT_REQUIREMENTS, package)
    return Peer(
        run=run, note=f"{package} {version}, all windows; lm_head and embedding rounded, in our default formats"
    )


def write_graph(folder: Path, config: QuantizeConfig) -> None:
    """Write the model ``config.output_path`` with the weights of the checkpoint in ``folder``.

    What the checkpoint leaves in floating point, lm_head and the embedding, gets the format that ``config`` gives it,
    so that rows of a table differ in the decoder's weights and nothing else.

    Raises:
        UserError: the checkpoint can't be read, or isn't the base's.
    """
    directory = locate_model(config.onnx_path)
    choice = plan_model(config, load_graph(directory), directory).choice
    quantize(
        replace(
            config,
            checkpoint=folder,
            lm_head=choice.lm_head or "none",
            embedding=_WORDS[choice.embedding_bits],
            block_size=None,
            use_zero_point=None,
        )
    )


def _our_formats(request: PeerRequest, base: ModelDirectory, folder: Path) -> QuantizeConfig:
    """Return the options that give lm_head and the embedding, which both tools leave alone, the formats of our rows."""
    return QuantizeConfig(
        onnx_path=base.onnx_file,
        output_path=folder,
        weights_path=folder.with_name(f"{folder.name}.weights"),
        algo="rtn_dq",
        block_size=request.block_size,
        use_zero_point=request.use_zero_point,
        overwrite=True,
    )
