"""``--refine`` through the whole command, on a model that onnxruntime-genai's builder wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import stages.quantization.blocks.tuner
import stages.quantization.search.solver
import stages.runtime.blocks.converters.layers
from stages.quantization.weights.store import open_store
from stages.runtime.blocks.cut import cut_block
from stages.runtime.blocks.module import BlockModule
from tests.pipelines.test_block_tuning import _calibrated, _quantize, _report
from tests.pipelines.test_both_stages import _logits
from tests.stages.runtime.blocks.blocks import CPU, open_model
from tests.support.commands import Commands
from tests.support.written import fused_sites

_TOKENS = np.arange(40).reshape(1, 40) * 7 % 300
_SEARCH = ("--algo", "gptq", "--block_size", 16)


@pytest.fixture(scope="module")
def cache(tiny_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _calibrated(tiny_model, tiny_text, tmp_path_factory.mktemp("refined"))


def test_what_a_site_reads_is_what_onnx_runtime_gives_it(tiny_model: Path) -> None:
    opened = open_model(tiny_model)
    block = opened.blocks[1]
    graph = cut_block(opened.model, block)
    activations = tuple(dict.fromkeys(site.activation for site in block.sites))
    values = opened.tap((block.stream_in, *activations, *graph.shared), _TOKENS)
    module, weights = BlockModule(graph, CPU), opened.weights(block)
    for site in block.sites:
        read = module.read(values[block.stream_in], weights, values, site.name)
        # Both in float32, along different orders of summation.
        torch.testing.assert_close(read, values[site.activation], rtol=1e-3, atol=1e-4)


def test_a_block_runs_no_further_than_the_site_that_is_read(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_model(tiny_model)
    block = opened.blocks[0]
    graph = cut_block(opened.model, block)
    values = opened.tap((block.stream_in, *graph.shared), _TOKENS)
    module, weights = BlockModule(graph, CPU), opened.weights(block)
    products: list[Tensor] = []

    def counted(hidden: Tensor, weight: Tensor) -> Tensor:
        products.append(weight)
        return torch.nn.functional.linear(hidden, weight)

    monkeypatch.setattr(stages.runtime.blocks.converters.layers, "linear", counted)
    for count, site in enumerate(block.sites):
        products.clear()
        module.read(values[block.stream_in], weights, values, site.name)
        assert len(products) <= count
        assert all(weight is not weights[site.name] for weight in products)
    products.clear()
    module(values[block.stream_in], weights, values)
    assert len(products) == len(block.sites)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        (),
        pytest.param(("--use_zero_point",), marks=pytest.mark.thorough),
        pytest.param(("--awqlite_disable_fuse_nodes",), marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_refined_models_run_fused_and_their_blocks_are_nearer_to_the_base(
    arguments: tuple[str, ...], tiny_model: Path, cache: Path, tmp_path: Path, commands: Commands
) -> None:
    plain, refined = tmp_path / "plain", tmp_path / "refined"
    search = ("--algo", "awq_gptq", "--block_size", 16, "--accuracy_level", 1, *arguments)
    for output, more in ((plain, ()), (refined, ("--refine",))):
        code, printed = _quantize(commands, tiny_model, cache, output, *search, *more)
        assert code == 0, printed
    assert "awq_gptq refined INT4" in printed
    assert fused_sites(refined) == (10, 10)
    inside = [line for line in _report(refined) if "layers" in line["site"]]
    assert all(line["algorithm"] == "refine" for line in inside)
    assert all(line["block_loss"] <= line["block_loss_start"] for line in inside)
    assert any(line["block_loss"] < line["block_loss_start"] for line in inside)
    base = _logits(tiny_model, _TOKENS)
    before, behind = (np.linalg.norm(_logits(folder, _TOKENS) - base) for folder in (plain, refined))
    # Random weights answer to errors at random; the held-out windows' loss above is what must fall.
    assert behind < 1.1 * before


@pytest.mark.thorough
@pytest.mark.slow
def test_signround_goes_on_from_the_refined_weights(
    tiny_model: Path, cache: Path, tmp_path: Path, commands: Commands
) -> None:
    options = ("--algo", "signround", "--signround_start", "gptq", "--signround_iters", 10, "--block_size", 16)
    code, printed = _quantize(commands, tiny_model, cache, tmp_path / "both", *options, "--refine")
    assert code == 0, printed
    assert "signround from gptq refined" in printed
    code, printed = _quantize(commands, tiny_model, cache, tmp_path / "first", *_SEARCH, "--refine")
    assert code == 0, printed
    refined = {line["site"]: line for line in _report(tmp_path / "first")}
    tuned = [line for line in _report(tmp_path / "both") if "layers.0" in line["site"]]
    # Before the first layer both streams are the same, so tuning there starts with the loss that refining ended with.
    assert all(line["block_loss_start"] == pytest.approx(refined[line["site"]]["block_loss"]) for line in tuned)
    left = {path.name for path in (tmp_path / "both.weights").iterdir() if path.is_dir()}
    assert left == {"report"}


@pytest.mark.slow
def test_a_stopped_run_goes_on_where_it_was(
    tiny_model: Path, cache: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, printed = _quantize(commands, tiny_model, cache, tmp_path / "whole", *_SEARCH, "--refine")
    assert code == 0, printed
    calls: list[int] = []
    original = stages.quantization.blocks.tuner.RefineStep.__call__

    def stopped(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(stages.quantization.blocks.tuner.RefineStep, "__call__", stopped)
        code, _ = _quantize(commands, tiny_model, cache, tmp_path / "stopped", *_SEARCH, "--refine")
    assert code != 0
    code, printed = _quantize(commands, tiny_model, cache, tmp_path / "stopped", *_SEARCH, "--refine")
    assert code == 0, printed
    for index in range(len(open_store(tmp_path / "whole.weights").recipe.groups)):
        first, second = (open_store(tmp_path / f"{name}.weights").read_group(index) for name in ("whole", "stopped"))
        for one, other in zip(first.weights, second.weights, strict=True):
            assert torch.equal(one.codes, other.codes)
            assert torch.equal(one.scales, other.scales)


@pytest.mark.slow
def test_a_run_stopped_in_its_second_step_does_not_search_again(
    tiny_model: Path, cache: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (
        "--algo",
        "signround",
        "--signround_start",
        "gptq",
        "--signround_iters",
        2,
        "--block_size",
        16,
        "--refine",
    )

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages.quantization.blocks.tuner.SignRoundStep, "__call__", stopped)
        code, _ = _quantize(commands, tiny_model, cache, tmp_path / "out", *options)
    assert code != 0

    def searched_again(*_: object) -> None:
        raise AssertionError("the search was finished")

    with monkeypatch.context() as patch:
        patch.setattr(stages.quantization.search.solver.GroupSolver, "pose", searched_again)
        patch.setattr(stages.quantization.blocks.tuner.RefineStep, "__call__", searched_again)
        code, printed = _quantize(commands, tiny_model, cache, tmp_path / "out", *options)
    assert code == 0, printed
    assert [path.name for path in (tmp_path / "out.weights").iterdir() if path.is_dir()] == ["report"]
