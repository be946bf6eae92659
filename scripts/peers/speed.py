"""Measure the speed of the base model and of every model of a comparison, each at the accuracy level that it ships."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from scripts.options import PeerConfig
from stages.commands.progress import Progress
from stages.evaluation.bench.runs import EvaluationText
from stages.evaluation.records import SpeedTest
from stages.evaluation.speed import measure_speed
from stages.evaluation.speed_round import SpeedRequest
from stages.model.directory import locate_model
from stages.system.hardware import granted_threads, physical_cores

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
        threads=granted_threads() or physical_cores(),
    )
    folders = [locate_model(folder) for folder in (config.base, *models)]
    return measure_speed(folders, request, config.speed_rounds, progress)


def speed_table(speed: SpeedTest) -> Table:
    """Return one row a model: tokens a second of prompt and decoding, median and range, and its accuracy level."""
    title = (
        f"speed in {speed.runtime}, {speed.threads} threads, on {speed.machine}: {speed.new_tokens} tokens behind "
        f"{speed.prompt_tokens}, median of {speed.rounds} rounds"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("model", "prompt tokens/s", "decoding tokens/s", "slowest to fastest", "accuracy level"):
        table.add_column(heading)
    for model in speed.models:
        rate = model.decode
        spread = f"{rate.slowest:.1f} to {rate.fastest:.1f}"
        table.add_row(model.model, f"{model.prompt.median:.1f}", f"{rate.median:.1f}", spread, model.accuracy_level)
    return table
