"""``--algo signround`` through the whole command, on models that onnxruntime-genai's builder wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stages.quantization.blocks.tuner
from stages.calibration.cache import open_cache
from stages.model.directory import locate_model
from stages.model.load import fingerprint_model
from stages.quantization.weights.store import open_store
from stages.records.results import QuantizedWeight
from tests.pipelines.test_both_stages import _generate, _logits
from tests.support.commands import Commands
from tests.support.families import FAMILIES, save_random_model
from tests.support.tiny_models import build_genai_model
from tests.support.written import fused_sites

_TUNING = (
    "--algo",
    "signround",
    "--signround_start",
    "awq_full",
    "--signround_iters",
    40,
    "--signround_batch_size",
    8,
    "--block_size",
    16,
)

_BRIEFLY = (*_TUNING, "--signround_start", "awq_lite", "--signround_iters", 6)


@pytest.fixture(scope="module")
def cache(tiny_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _calibrated(tiny_model, tiny_text, tmp_path_factory.mktemp("caches"))


def _calibrated(model: Path, text: Path, folder: Path) -> Path:
    from stages.calibration.run import calibrate
    from stages.commands.calibrate_options import CalibrateConfig

    cache = folder / "cache"
    options = {"dataset": str(text), "calib_size": 64, "seq_len": 64, "batch_size": 8, "cache_dir": cache}
    calibrate(CalibrateConfig(onnx_path=model, **options))
    return cache


def _quantize(commands: Commands, model: Path, cache: Path, output: Path, *arguments: object) -> tuple[int, str]:
    code, printed = commands.quantize("--onnx_path", model, "--cache_dir", cache, "--output_path", output, *arguments)
    return code, " ".join(printed.split())  # captions are wrapped at their table's width


def _weights(output: Path) -> list[QuantizedWeight]:
    store = open_store(output.with_name(f"{output.name}.weights"))
    return [weight for index in range(len(store.recipe.groups)) for weight in store.read_group(index).weights]


def _report(output: Path) -> list[dict[str, Any]]:
    lines = (output.with_name(f"{output.name}.weights") / "report.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [(), pytest.param(("--use_zero_point", "--lm_head", "8"), marks=pytest.mark.thorough)], ids=str
)
def test_tuned_models_run_fused_and_are_nearer_to_the_base(
    arguments: tuple[str, ...], tiny_model: Path, cache: Path, tmp_path: Path, commands: Commands
) -> None:
    start, tuned = tmp_path / "start", tmp_path / "tuned"
    code, printed = _quantize(commands, tiny_model, cache, start, "--algo", "awq_full", "--block_size", 16, *arguments)
    assert code == 0, printed
    code, printed = _quantize(commands, tiny_model, cache, tuned, *_TUNING, "--accuracy_level", 1, *arguments)
    assert code == 0, printed
    sites = 11 if "--lm_head" in arguments else 10
    assert fused_sites(tuned) == (sites, sites)
    assert "of 2 layers improved; error of a layer's output on held-out text" in printed
    assert not (tmp_path / "tuned.weights" / "earlier").exists()
    for line in _report(tuned):
        in_block = "layers" in line["site"]
        assert line["algorithm"] == ("signround" if in_block else "awq_full")
        assert not in_block or line["block_loss"] <= line["block_loss_start"]
    # Text of the kind that was tuned on: what a random model does to other tokens, tuning leaves to chance.
    _, held_out = open_cache(cache, fingerprint_model(locate_model(tiny_model))).read_tokens()
    base = _logits(tiny_model, held_out)
    before, behind = (np.linalg.norm(_logits(folder, held_out) - base) for folder in (start, tuned))
    assert behind < before
    assert len(_generate(tuned)) == 24


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_block_that_it_was_at(
    tiny_model: Path, cache: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, printed = _quantize(commands, tiny_model, cache, tmp_path / "whole", *_BRIEFLY)
    assert code == 0, printed
    calls: list[int] = []
    original = stages.quantization.blocks.tuner.tune_block

    def stopped(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(stages.quantization.blocks.tuner, "tune_block", stopped)
    code, printed = _quantize(commands, tiny_model, cache, tmp_path / "two", *_BRIEFLY)
    assert code == 130
    store = open_store(tmp_path / "two.weights")
    finished = [store.recipe.groups[index].sites[0].name for index in range(8) if store.is_finished(index)]
    assert len(finished) == 4
    assert all("layers.0" in name for name in finished)
    code, printed = _quantize(commands, tiny_model, cache, tmp_path / "two", *_BRIEFLY)
    assert code == 0, printed
    assert len(calls) == 3
    for found, expected in zip(_weights(tmp_path / "two"), _weights(tmp_path / "whole"), strict=True):
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.scales, expected.scales)


@pytest.mark.thorough
@pytest.mark.slow
def test_a_finished_run_is_not_tuned_again(
    tiny_model: Path, cache: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _quantize(commands, tiny_model, cache, tmp_path / "out", *_TUNING, "--verify", "off")[0] == 0
    monkeypatch.setattr(stages.quantization.blocks.tuner, "tune_block", _never)
    code, printed = _quantize(commands, tiny_model, cache, tmp_path / "out", *_TUNING, "--overwrite")
    assert code == 0, printed
    code, printed = _quantize(
        commands, tiny_model, cache, tmp_path / "other", *_TUNING, "--signround_lr", 0.1,
        "--weights_path", tmp_path / "out.weights",
    )  # fmt: skip
    assert code == 2
    assert "holds weights of another run (signround from awq_full" in printed


def _never(*_arguments: object) -> None:
    raise AssertionError("tuned again")


@pytest.mark.slow
@pytest.mark.parametrize("start", ["rtn_dq", pytest.param("awq_gptq", marks=pytest.mark.thorough)])
def test_it_begins_with_any_algorithm(
    start: str, tiny_model: Path, cache: Path, tmp_path: Path, commands: Commands
) -> None:
    code, printed = _quantize(
        commands, tiny_model, cache, tmp_path / "out", *_TUNING, "--signround_start", start, "--verify", "off"
    )
    assert code == 0, printed
    assert f"signround from {start} INT4 block 16" in printed
    assert all(line["block_loss"] <= line["block_loss_start"] for line in _report(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.parametrize("precision", [pytest.param("dml", marks=pytest.mark.thorough), "bf16"])
def test_narrow_models(
    precision: str, request: pytest.FixtureRequest, tiny_text: Path, tmp_path: Path, commands: Commands
) -> None:
    """float16 with positions as an input, and bfloat16, which the CPU runs as float32 only."""
    model: Path = request.getfixturevalue(f"tiny_model_{precision}")
    cache = _calibrated(model, tiny_text, tmp_path)
    code, printed = _quantize(commands, model, cache, tmp_path / "out", *_TUNING)
    assert code == 0, printed
    losses = [(line["block_loss"], line["block_loss_start"]) for line in _report(tmp_path / "out")]
    assert all(kept <= start for kept, start in losses)
    assert any(kept < start for kept, start in losses)
    assert all(weight.scales.dtype.itemsize == 2 for weight in _weights(tmp_path / "out"))


@pytest.mark.thorough
def test_blocks_with_experts_are_tuned_and_error_feedback_leaves_the_experts(
    tiny_tokenizer: Path, tiny_text: Path, tmp_path: Path, commands: Commands
) -> None:
    family = next(family for family in FAMILIES if family.name == "gpt-oss")
    save_random_model(family.config(), family.width, tmp_path / "hf", tiny_tokenizer)
    build_genai_model(tmp_path / "hf", tmp_path / "base")
    cache = _calibrated(tmp_path / "base", tiny_text, tmp_path)
    quick = ("--signround_iters", 10, "--signround_batch_size", 8, "--signround_start", "awq_lite", "--block_size", 16)
    steps = (
        "--target",
        "cpu",
        "--refine",
        "--algo",
        "signround",
        "--distill",
        16,
        "--dataset",
        tiny_text,
        "--seq_len",
        64,
        "--calib_size",
        64,
    )
    code, printed = _quantize(commands, tmp_path / "base", cache, tmp_path / "out", *quick, *steps)
    assert code == 0, printed
    assert "--refine corrects the MatMuls; experts of MoE nodes stay as they were searched" in printed
    reports = [json.loads(line) for line in (tmp_path / "out.weights" / "report.jsonl").read_text().splitlines()]
    assert all("distill" in report["algorithm"] for report in reports if "layers." in report["site"])
    assert any("/experts." in report["site"] for report in reports)


@pytest.mark.parametrize(
    ("option", "value"), [("--signround_iters", 0), ("--signround_lr", 0), ("--signround_batch_size", 0)]
)
def test_options_out_of_range_are_named(
    option: str, value: int, tiny_model: Path, tmp_path: Path, commands: Commands
) -> None:
    code, printed = _quantize(commands, tiny_model, tmp_path / "none", tmp_path / "out", option, value)
    assert code == 2
    assert option in printed
