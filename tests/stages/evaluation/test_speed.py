"""Speed rounds: what is measured, of which process, and which accuracy level a model's files set."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from stages.commands.progress import Progress
from stages.errors import UserError
from stages.evaluation import speed
from stages.evaluation.speed import describe_accuracy_level, measure_speed
from stages.evaluation.speed_round import Round, SpeedRequest
from stages.model.directory import ModelDirectory, locate_model
from stages.system.measured_process import Cost
from tests.support.commands import Commands

REQUEST = SpeedRequest(prompt=(0, 5, 9, 12, 7, 7, 30, 2), new_tokens=5, threads=1)
QUIET = Progress(Console(quiet=True))


def test_models_run_in_processes_of_their_own(tiny_model: Path) -> None:
    found = measure_speed([locate_model(tiny_model)], REQUEST, 1, QUIET)
    (model,) = found.models
    assert (found.threads, found.rounds, found.prompt_tokens, found.new_tokens) == (1, 1, 8, 5)
    assert found.runtime.startswith("onnxruntime-genai 0.")
    assert model.model == tiny_model.name
    assert model.prompt.median > 0
    assert model.decode.median > 0
    assert model.load_seconds > 0
    # Python, the runtime and a tiny model; torch would take 200 MB more.
    assert model.peak_bytes is not None
    assert 20e6 < model.peak_bytes < 250e6


def test_models_take_turns_and_the_median_counts(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = locate_model(tiny_model)
    asked: list[ModelDirectory] = []
    rounds = iter(
        [
            (Round(load=1.0, prompt=0.5, decode=2.0), Cost(seconds=9.0, peak_bytes=100)),
            (Round(load=0.1, prompt=0.1, decode=0.1), Cost(seconds=9.0, peak_bytes=7)),
            (Round(load=3.0, prompt=2.0, decode=4.0), Cost(seconds=9.0, peak_bytes=300)),
            (Round(load=0.1, prompt=0.1, decode=0.1), Cost(seconds=9.0, peak_bytes=None)),
            (Round(load=2.0, prompt=1.0, decode=1.0), Cost(seconds=9.0, peak_bytes=200)),
            (Round(load=0.1, prompt=0.1, decode=0.1), Cost(seconds=9.0, peak_bytes=None)),
        ]
    )

    def run_round(model: ModelDirectory, request: SpeedRequest, scratch: Path) -> tuple[Round, Cost]:
        asked.append(model)
        return next(rounds)

    monkeypatch.setattr(speed, "_run_round", run_round)
    twin = locate_model(tiny_model)
    first, second = measure_speed([base, twin], REQUEST, 3, QUIET).models
    assert asked == [base, twin] * 3
    # 8 prompt tokens in 1 s (0.5 to 2); 4 tokens after the first in 2 s (1 to 4).
    assert (first.prompt.median, first.prompt.slowest, first.prompt.fastest) == (8, 4, 16)
    assert (first.decode.median, first.decode.slowest, first.decode.fastest) == (2, 1, 4)
    assert first.load_seconds == 2
    assert (first.peak_bytes, second.peak_bytes) == (300, 7)


def test_a_model_that_cannot_run_is_one_sentence(tiny_model: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    (broken / "model.onnx").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"^--speed \S*broken can't be run by onnxruntime-genai here"):
        measure_speed([locate_model(broken)], REQUEST, 1, QUIET)


def test_the_accuracy_level_is_that_of_the_model(commands: Commands, tiny_model: Path, tmp_path: Path) -> None:
    assert describe_accuracy_level(locate_model(tiny_model)) == "none (nothing is quantized)"
    common = ["--onnx_path", tiny_model, "--algo", "rtn_dq", "--block_size", 32]
    variants = {
        "silent": ([], "4 (ONNX Runtime's default on the CPU)"),
        "exact": (["--accuracy_level", 1], "1 (by its genai_config.json)"),
        "nodes": (["--accuracy_level", 1, "--weight_operator", "matmul_nbits"], "1 (by its MatMulNBits nodes)"),
    }
    for name, (options, words) in variants.items():
        code, printed = commands.quantize(*common, "--output_path", tmp_path / name, *options)
        assert code == 0, printed
        assert describe_accuracy_level(locate_model(tmp_path / name)) == words
    assert "session_options" in json.loads((tmp_path / "exact" / "genai_config.json").read_text())["model"]["decoder"]
