"""Measure decoding speed of the base model and of every model of a comparison, all at the runtime's accuracy level."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from scripts.options import PeerConfig
from stages.commands.progress import Progress
from stages.commands.tables import Column, DataTable
from stages.evaluation.bench.runs import EvaluationText
from stages.evaluation.records import SpeedTest
from stages.evaluation.speed import measure_speed
from stages.evaluation.speed_round import SpeedRequest
from stages.model.directory import ModelDirectory, locate_model
from stages.records.quantities import counted
from stages.system.hardware import granted_threads, physical_cores

_PROMPT_TOKENS, _NEW_TOKENS = 128, 64
_RUNTIME_LEVEL = 4
"""What ONNX Runtime takes for DequantizeLinear, and onnxruntime-genai's builder writes for the CPU."""


def measure_speeds(
    config: PeerConfig, ours: Sequence[Path], peers: Sequence[Path], text: EvaluationText, progress: Progress
) -> SpeedTest:
    """Run the base and all models alternately, each round in a process of its own.

    Competitors' MatMulNBits nodes were written at level 1 to be evaluated like all others; here they get the level at
    which they would be shipped.

    Args:
        config: names the base model and the number of rounds.
        ours: folders of our models, run as they are.
        peers: folders of the competitors' models.
        text: the prompt is its beginning.
        progress: shows how many rounds are done.

    Raises:
        UserError: a model can't be run by onnxruntime-genai here.
    """
    request = SpeedRequest(
        prompt=tuple(text.base.windows.reshape(-1)[:_PROMPT_TOKENS].tolist()),
        new_tokens=_NEW_TOKENS,
        threads=granted_threads() or physical_cores(),
    )
    # In the output folder, which has room for models.
    with tempfile.TemporaryDirectory(dir=config.output, prefix=".speed-", ignore_cleanup_errors=True) as scratch:
        shipped = [ship(locate_model(folder), Path(scratch) / folder.name) for folder in peers]
        models = [locate_model(config.base), *(locate_model(folder) for folder in ours), *shipped]
        return measure_speed(models, request, config.speed_rounds, progress)


def ship(model: ModelDirectory, folder: Path) -> ModelDirectory:
    """Return ``model`` with its MatMulNBits nodes at the runtime's accuracy level.

    Args:
        model: stays as it is, and is returned where it has no such nodes.
        folder: where the copy goes.
    """
    graph = ir.load(model.onnx_file)
    nodes = [node for node in graph.graph.all_nodes() if node.op_type == "MatMulNBits"]
    if not nodes:
        return model
    shutil.copytree(model.folder, folder)
    for node in nodes:
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", _RUNTIME_LEVEL)
    ir.save(graph, folder / model.onnx_file.name)
    return locate_model(folder)


def speed_table(speed: SpeedTest) -> DataTable:
    """Return one row a model: tokens a second while decoding, median and range, and its accuracy level."""
    title = (
        f"decoding in {speed.runtime}, {counted(speed.threads, 'thread')}, on {speed.machine}: {speed.new_tokens} "
        f"tokens behind {speed.prompt_tokens}, median of {counted(speed.rounds, 'round')}"
    )
    columns = (
        Column(heading="model"),
        Column(heading="tokens/s", is_number=True),
        Column(heading="slowest to fastest", is_number=True),
        Column(heading="accuracy level"),
    )
    rows = tuple(
        (
            model.model,
            f"{model.decode.median:.1f}",
            f"{model.decode.slowest:.1f} to {model.decode.fastest:.1f}",
            model.accuracy_level,
        )
        for model in speed.models
    )
    return DataTable(title=title, columns=columns, rows=rows)
