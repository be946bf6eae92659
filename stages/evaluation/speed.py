"""Measure speed and memory in onnxruntime-genai; models run alternately, each round in a process of its own."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import onnx_ir as ir

from stages.commands.progress import Progress
from stages.errors import UserError
from stages.evaluation.records import ModelSpeed, Rate, SpeedTest
from stages.evaluation.speed_round import OPTION, REQUESTS, ROUNDS, Round, SpeedRequest
from stages.model.directory import DECODER, ModelDirectory
from stages.model.genai_config import component_entries, read_genai_config
from stages.runtime.genai import runtime_version
from stages.runtime.session import ACCURACY_LEVEL, SessionSettings
from stages.system.hardware import describe_machine
from stages.system.measured_process import Cost, run_measured

_DEFAULT_LEVEL = "4 (ONNX Runtime's default on the CPU)"


def measure_speed(
    models: Sequence[ModelDirectory], request: SpeedRequest, rounds: int, progress: Progress
) -> SpeedTest:
    """Run every model once in each round and summarize all rounds.

    Args:
        models: the base first.
        request: the prompt and settings, the same for all.
        rounds: how often each model runs.
        progress: shows how many rounds are done.

    Raises:
        UserError: onnxruntime-genai isn't installed, or a model can't be run by it here.
    """
    runtime = runtime_version(OPTION)
    found: list[list[tuple[Round, Cost]]] = [[] for _ in models]
    task = progress.add_task("speed", total=rounds * len(models), unit="rounds")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        for _ in range(rounds):
            for model, measured in zip(models, found, strict=True):
                measured.append(_run_round(model, request, Path(scratch)))
                progress.advance(task)
    progress.remove_task(task)
    return SpeedTest(
        machine=describe_machine(),
        runtime=runtime,
        threads=request.threads,
        rounds=rounds,
        prompt_tokens=len(request.prompt),
        new_tokens=request.new_tokens,
        models=tuple(_summarize(model, measured, request) for model, measured in zip(models, found, strict=True)),
    )


def _run_round(model: ModelDirectory, request: SpeedRequest, scratch: Path) -> tuple[Round, Cost]:
    asked, answered = scratch / "request.json", scratch / "round.json"
    asked.write_bytes(REQUESTS.dump_json(request))
    command = (sys.executable, "-m", "stages.evaluation.speed_round", str(model.folder), str(asked), str(answered))
    try:
        cost = run_measured(command, scratch / "log")
    except UserError as error:
        said = str(error)  # the process names the option and the folder itself where it knows what is wrong
        raise UserError(said if said.startswith(OPTION) else f"{OPTION} {model.folder}: {said}") from error
    return ROUNDS.validate_json(answered.read_bytes()), cost


def _summarize(model: ModelDirectory, measured: Sequence[tuple[Round, Cost]], request: SpeedRequest) -> ModelSpeed:
    peaks = [cost.peak_bytes for _, cost in measured if cost.peak_bytes is not None]
    return ModelSpeed(
        model=model.folder.name,
        prompt=_rate(len(request.prompt), [run.prompt for run, _ in measured]),
        decode=_rate(request.new_tokens - 1, [run.decode for run, _ in measured]),
        load_seconds=median(run.load for run, _ in measured),
        peak_bytes=max(peaks, default=None),
        accuracy_level=describe_accuracy_level(model),
    )


def _rate(tokens: int, seconds: Sequence[float]) -> Rate:
    rates = [tokens / value for value in seconds]
    return Rate(median=median(rates), slowest=min(rates), fastest=max(rates))


def describe_accuracy_level(model: ModelDirectory, forced: int | None = None) -> str:
    """Return the accuracy level that the runtime uses for a model's quantized MatMuls, and what sets it.

    Args:
        model: the model.
        forced: a level that a session is opened with; None: what the model's files say holds.
    """
    nodes = list(ir.load(model.onnx_file).graph.all_nodes())
    levels = sorted({node.attributes.get_int("accuracy_level", 0) for node in nodes if node.op_type == "MatMulNBits"})
    if levels:
        return f"{', '.join(map(str, levels))} (by its MatMulNBits nodes)"
    if not any(node.op_type == "DequantizeLinear" for node in nodes):
        return "none (nothing is quantized)"
    if forced is not None:
        return f"{forced} (by --accuracy_level)"
    level = _shipped_level(model)
    return _DEFAULT_LEVEL if level is None else f"{level} (by its genai_config.json)"


def with_shipped_level(settings: SessionSettings, model: ModelDirectory) -> SessionSettings:
    """Return ``settings`` for ``model``: where they force no accuracy level, with the one that its files set."""
    return settings if settings.accuracy_level is not None else replace(settings, accuracy_level=_shipped_level(model))


def _shipped_level(model: ModelDirectory) -> int | None:
    """Return the accuracy level that a model's genai_config.json sets for sessions, or None where it sets none."""
    if not model.has_genai_config:
        return None
    content = read_genai_config(model.folder)
    entries = [component_entries(content).get(model.component, ({}, ""))[0], content.get("model", {}).get(DECODER, {})]
    # A component without options of its own takes the decoder's.
    options: Mapping[str, object] = next((each["session_options"] for each in entries if "session_options" in each), {})
    level = options.get(ACCURACY_LEVEL)
    return int(str(level)) if str(level).isdigit() else None
