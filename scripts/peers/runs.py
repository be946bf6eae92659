"""List the competitors' runs: what each quantizer is asked for, and what is done before and after."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnxruntime
from safetensors import safe_open
from safetensors.numpy import save_file

from export.save import copy_side_files, patch_genai_config
from scripts.options import BuilderMethod, PeerConfig
from scripts.peers.checkpoints.runs import checkpoint_peers
from scripts.peers.environment import ensure_environment, pinned_version, python_of
from scripts.peers.llama_cpp.runs import llama_cpp_peers
from scripts.peers.peer import Peer, PeerRequest, block_sizes, calibration_windows, empty, zero_points
from stages.calibration.cache import open_cache
from stages.errors import UserError
from stages.evaluation.bench.runs import Run
from stages.model.directory import ModelDirectory, locate_model
from stages.model.load import fingerprint_model, load_graph
from stages.model.sites import find_groups
from stages.quantization.plan.rules import all_sites
from stages.records.quantities import counted
from stages.runtime.feeds import CausalFeeds
from stages.runtime.genai import runtime_version
from stages.runtime.session import SessionSettings, open_session
from stages.system.atomic import atomic_file

_HERE = Path(__file__).parent
ORT_RUNNER = _HERE / "run_onnxruntime.py"
MODELOPT_RUNNER = _HERE / "run_modelopt.py"
MODELOPT_REQUIREMENTS = _HERE / "modelopt.txt"
_BUILDER_OPTIONS: Mapping[BuilderMethod, str] = MappingProxyType(
    {"int4": "", "int4_mixed": "matmul_mixed_precision=last_matmul:int8,mixed_layers:int8"}
)
"""Those that aren't the name of an algo_config: the builder's own rounding, and the same with INT8 where
k_quant_mixed has it."""
_CALIBRATION = "calibration"
"""What ModelOpt's file of inputs calls the digest of the calibration that they come from."""
_SAME = 1e-2
"""Relative difference up to which weights are the same; those of a 16-bit base are rounded."""


def peers_of(config: PeerConfig) -> list[Peer]:
    """Return all competitors that ``config`` names, each for the sites that it quantizes by default.

    Routers stay unquantized everywhere, as in our models.

    Raises:
        UserError: the base model can't be read, or holds nothing to quantize.
    """
    base = locate_model(config.base)
    sites = all_sites(find_groups(load_graph(base)))
    routers = [site.name for site in sites if site.routes_experts]
    heads = [site.name for site in sites if site.is_lm_head]
    has_source = config.builder_source is not None
    return [
        *(_ort(request, base, routers, config) for request in ort_requests(config)),
        *(_builder(method, base, config) for method in config.builder if has_source),
        *(_modelopt(request, base, [*routers, *heads], config) for request in modelopt_requests(config)),
        *(checkpoint_peers(base, config) if has_source else ()),
        *(llama_cpp_peers(config) if has_source else ()),
    ]


def ort_requests(config: PeerConfig) -> Iterator[PeerRequest]:
    """Yield ONNX Runtime's requests; only its default method has the choice of zero points, the others write them."""
    for size in block_sizes(config):
        for method in config.ort:
            for zero_point in zero_points(config) if method == "default" else (True,):
                yield PeerRequest(method=method, block_size=size, use_zero_point=zero_point)


def modelopt_requests(config: PeerConfig) -> Iterator[PeerRequest]:
    """Yield ModelOpt's requests; rounding and awq_clip know no zero points."""
    for size in block_sizes(config):
        for method in config.modelopt:
            for zero_point in zero_points(config) if method in ("awq_lite", "awq_full") else (False,):
                yield PeerRequest(method=method, block_size=size, use_zero_point=zero_point)


def _ort(request: PeerRequest, base: ModelDirectory, exclude: list[str], config: PeerConfig) -> Peer:
    name = request.name("ort")
    folder = config.output.absolute() / name
    content = json.dumps(_content(request, base, folder, exclude))
    run = Run(
        name=name,
        command=(sys.executable, str(ORT_RUNNER), content),
        model=folder,
        before=partial(empty, folder),
        after=partial(_complete, base, folder),
    )
    kind = {"hqq": ", zero points as float32", "k_quant": ", always with zero points"}.get(request.method, "")
    return Peer(run=run, note=f"onnxruntime {onnxruntime.__version__}{kind}")


def _builder(method: BuilderMethod, base: ModelDirectory, config: PeerConfig) -> Peer:
    """Return a run of the builder: what people get who ask for ``-p int4``, or for one of its other methods too."""
    name = f"builder-{method}"
    folder = config.output.absolute() / name
    options = _BUILDER_OPTIONS.get(method, f"algo_config={method}")
    run = Run(
        name=name,
        command=(
            sys.executable,
            "-m",
            "genai_quant",
            "base-model",
            str(config.builder_source),
            str(folder),
            "--precision=int4",
            *(["--keep_grid"] if config.builder_keep_grid else []),
            "--overwrite",
            *(["--extra_options", options] if options else []),
        ),
        model=folder,
        after=partial(_require_same_checkpoint, base, folder),
    )
    return Peer(run=run, note=f"{runtime_version('--builder_source')}, {options or 'its defaults'}")


def _modelopt(request: PeerRequest, base: ModelDirectory, exclude: list[str], config: PeerConfig) -> Peer:
    name = request.name("modelopt")
    folder = config.output.absolute() / name
    feeds = config.output.absolute() / f"modelopt-feeds-{config.modelopt_windows}.safetensors"
    environment = config.modelopt_environment_path
    searches = request.method in ("awq_lite", "awq_full")
    # With awqlite_fuse_nodes its search ends in an AttributeError on machines without CuPy.
    options = {"awqlite_fuse_nodes": False} if searches else {}
    options |= {"enable_fast_path_using_high_sysram": True} if searches and config.modelopt_fast_path else {}
    content = json.dumps({**_content(request, base, folder, exclude), "feeds": str(feeds), "options": options})

    def prepare() -> None:
        ensure_environment(environment, MODELOPT_REQUIREMENTS)
        calibration = open_cache(config.cache_path, fingerprint_model(base)).manifest.key.digest()
        if not _comes_from(feeds, calibration):
            _write_feeds(base, config, feeds, calibration)
        empty(folder)

    run = Run(
        name=name,
        command=(str(python_of(environment)), str(MODELOPT_RUNNER), content),
        model=folder,
        before=prepare,
        after=partial(_complete, base, folder),
    )
    version = pinned_version(MODELOPT_REQUIREMENTS, "nvidia-modelopt")
    calibrated = "" if request.method == "rtn_dq" else f", {counted(config.modelopt_windows, 'window')}"
    unfused = ", its Mul nodes unfolded" if searches else ""
    fast = ", activations kept in memory" if searches and config.modelopt_fast_path else ""
    return Peer(run=run, note=f"nvidia-modelopt {version}{calibrated}{unfused}{fast}, lm_head in floating point")


def _content(request: PeerRequest, base: ModelDirectory, folder: Path, exclude: list[str]) -> dict[str, object]:
    return {
        "base": str(base.onnx_file),
        "output": str(folder / base.onnx_name),
        "method": request.method,
        "block_size": request.block_size,
        "use_zero_point": request.use_zero_point,
        "exclude": exclude,
    }


def _complete(base: ModelDirectory, folder: Path) -> None:
    """Put what the competitors leave out beside their graph: genai_config.json, the tokenizer, all other side files."""
    copy_side_files(base, load_graph(base), folder, base.onnx_name)
    if base.has_genai_config:
        patch_genai_config(folder, base.onnx_name, {}, base.component)


def _require_same_checkpoint(base: ModelDirectory, folder: Path) -> None:
    """Raise UserError where a float tensor that both models hold differs: then they were built from other weights."""
    expected, built = load_graph(base).graph.initializers, load_graph(locate_model(folder)).graph.initializers
    for name in expected.keys() & built.keys():
        one, other = expected[name].const_value, built[name].const_value
        if one is None or other is None or one.shape != other.shape or not one.dtype.is_floating_point():
            continue
        weights = one.numpy().astype(np.float32)
        difference = np.linalg.norm(weights - other.numpy().astype(np.float32))
        if difference > _SAME * np.linalg.norm(weights):
            raise UserError(
                f"--builder_source holds other weights than --base ({name} differs); pass the source that the base was "
                "built from, and --builder_keep_grid if it was built with --keep_grid."
            )


def _comes_from(feeds: Path, calibration: str) -> bool:
    if not feeds.is_file():
        return False
    with safe_open(feeds, "np") as file:
        return (file.metadata() or {}).get(_CALIBRATION) == calibration


def _write_feeds(base: ModelDirectory, config: PeerConfig, file: Path, calibration: str) -> None:
    """Write the model's inputs for the first windows of our own calibration cache.

    Args:
        base: the model.
        config: says where the cache lies, and how many windows are wanted.
        file: where they go.
        calibration: digest of the cache's key.

    Raises:
        UserError: there is no cache of this model, it holds fewer windows, or numpy can't hold an input's type.
    """
    windows = calibration_windows(base, config)
    wanted = config.modelopt_windows
    if len(windows) < wanted:
        raise UserError(
            f"--modelopt_windows {wanted}: {config.cache_path} holds only {len(windows)} calibration windows; "
            "pass at most as many, or calibrate on more."
        )
    session = open_session(base.onnx_file, SessionSettings())
    feeds = CausalFeeds.of(session, base)
    arrays: dict[str, np.ndarray] = {}
    for index, window in enumerate(windows[:wanted]):
        for name, value in feeds(window[None]).items():
            if not isinstance(value, np.ndarray):
                raise UserError(f"ModelOpt can't be given the bfloat16 input {name}; compare on an fp16 or fp32 base.")
            arrays[f"{index}:{name}"] = value
    with atomic_file(file) as partial:
        save_file(arrays, partial, metadata={_CALIBRATION: calibration})
