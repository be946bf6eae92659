"""Measure the speed of the base model and of every model of a comparison, each at the accuracy level that it ships."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scripts.options import PeerConfig
from stages.commands.progress import Progress
from stages.commands.tables import Column, DataTable
from stages.evaluation.bench.runs import EvaluationText
from stages.evaluation.records import SpeedTest
from stages.evaluation.speed import measure_speed
from stages.evaluation.speed_round import SpeedRequest
from stages.model.directory import locate_model
from stages.records.quantities import counted
from stages.system.threads import usable_threads

_PROMPT_TOKENS, _NEW_TOKENS = 128, 64


def measure_speeds(config: PeerConfig, models: Sequence[Path], text: EvaluationText, progress: Progress) -> SpeedTest:
    """Run the base and all models alternately, each round in a process of its own.

    Args:
        config: names the base model and the number of rounds.
        models: the folders of the others.
        text: the prompt is its beginning.
        progress: shows how many rounds are done.

    Raises:
        UserError: a model can't be run by onnxruntime-genai here.
    """
    request = SpeedRequest(
        prompt=tuple(text.base.windows.reshape(-1)[:_PROMPT_TOKENS].tolist()),
        new_tokens=_NEW_TOKENS,
        threads=usable_threads(),
    )
    folders = [locate_model(folder) for folder in (config.base, *models)]
    return measure_speed(folders, request, config.speed_rounds, progress)


def speed_table(speed: SpeedTest) -> DataTable:
    """Return one row a model: tokens a second of prompt and decoding, and its accuracy level."""
    title = (
        f"speed in {speed.runtime}, {counted(speed.threads, 'thread')}, on {speed.machine}: {speed.new_tokens} "
        f"tokens behind {speed.prompt_tokens}, median of {counted(speed.rounds, 'round')}"
    )
    columns = (
        Column(heading="model"),
        Column(heading="prompt tokens/s", is_number=True),
        Column(heading="decoding tokens/s", is_number=True),
        Column(heading="slowest to fastest", is_number=True),
        Column(heading="accuracy level"),
    )
    rows = tuple(
        (
            model.model,
            f"{model.prompt.median:.0f}",
            f"{model.decode.median:.1f}",
            f"{model.decode.slowest:.1f} to {model.decode.fastest:.1f}",
            model.accuracy_level,
        )
        for model in speed.models
    )
    return DataTable(title=title, columns=columns, rows=rows)
