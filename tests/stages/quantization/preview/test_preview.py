"""Compare --dry_run with the run itself: the same pieces and sizes, enough memory, seconds of the same order."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import onnx_ir as ir
import psutil
import pytest
import torch

import genai_quant
from genai_quant import CalibrateConfig, QuantizeConfig
from stages.calibration.capture import TextShape
from stages.model.directory import locate_model
from stages.model.load import parse_graph
from stages.quantization.plan.plan import plan_model
from stages.quantization.preview import seconds as search_time
from stages.quantization.preview.memory import search_memory
from stages.quantization.preview.table import Preview
from stages.quantization.run import open_search
from stages.quantization.search.parallel import solve_groups
from stages.quantization.search.solver import search_cost
from tests.stages.quantization.search.problems import random_layer, solver_of

HIGH_WATER = Path("/proc/self/clear_refs")


def calibration(model: Path, folder: Path) -> CalibrateConfig:
    """Return a calibration on 11 windows of 32 tokens, one more held out."""
    return CalibrateConfig(
        onnx_path=model,
        use_random_calib=True,
        calib_size=12,
        seq_len=32,
        batch_size=5,
        calibration_eps="cpu",
        device="cpu",
        cache_dir=folder / "cache",
    )


def quantization(model: Path, folder: Path, algo: str) -> QuantizeConfig:
    return QuantizeConfig(
        onnx_path=model,
        output_path=folder / "int4",
        cache_dir=folder / "cache",
        algo=algo,
        block_size=16,
        device="cpu",
    )


def parts(found: Preview) -> int:
    """Return the pieces that stage one runs the model in."""
    (calibrate,) = (memory for memory in found.memory if memory.stage == "calibrate")
    several = re.search(r"in (\d+) parts", calibrate.holds)
    return 1 if several is None else int(several[1])


@pytest.mark.parametrize("limit", ["1GB", "300kB", "150kB"])
def test_pieces_are_those_of_the_run(limit: str, tiny_model: Path, tmp_path: Path) -> None:
    wanted = replace(calibration(tiny_model, tmp_path), max_memory=limit)
    found = genai_quant.preview(quantization(tiny_model, tmp_path, "awq_lite"), wanted)
    made = genai_quant.calibrate(wanted).made
    assert made is not None
    assert parts(found) == made.partitions
    assert (made.partitions > 1) == (limit != "1GB")


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look like the first of two processes on this machine."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    state = SimpleNamespace(num_processes=2, process_index=0, is_main_process=True)
    monkeypatch.setattr("accelerate.PartialState", lambda **_: state)


@pytest.mark.usefixtures("two_processes")
def test_processes_share_the_free_memory_and_the_statistics(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, wanted = quantization(tiny_model, tmp_path, "awq_lite"), calibration(tiny_model, tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=800_000))
    by_default = parts(genai_quant.preview(config, wanted))
    limited = replace(wanted, max_memory="240kB")
    assert by_default == parts(genai_quant.preview(config, limited))  # 0.6 of a half
    monkeypatch.delenv("WORLD_SIZE")
    assert by_default < parts(genai_quant.preview(config, limited))


def test_the_free_memory_of_cuda_counts(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, wanted = quantization(tiny_model, tmp_path, "awq_lite"), calibration(tiny_model, tmp_path)
    limited = parts(genai_quant.preview(config, replace(wanted, max_memory="300kB")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (500_000, 1_000_000))
    assert parts(genai_quant.preview(config, replace(wanted, device="auto"))) == limited > 1


@pytest.mark.parametrize("form", ["dq", "matmul_nbits"])
@pytest.mark.parametrize("zero_point", [True, False])
def test_sizes_are_those_of_the_files(form: str, *, zero_point: bool, tiny_model: Path, tmp_path: Path) -> None:
    config = replace(
        quantization(tiny_model, tmp_path, "rtn_dq"), weight_operator=form, use_zero_point=zero_point, verify="off"
    )
    found = genai_quant.preview(config)
    model = genai_quant.quantize(config)
    saved = sum(site.bytes_before - site.bytes_after for site in found.sites)
    base = tiny_model / "model.onnx"
    assert _weights(base) - _weights(model.onnx_file) == saved
    assert found.bytes_before == _files(base)
    # Nodes and names are counted generously: up to 1 kB a site.
    assert _files(model.onnx_file) <= found.bytes_after <= _files(model.onnx_file) + 1024 * len(found.sites)


def _weights(file: Path) -> int:
    values = ir.load(file).graph.initializers.values()
    return sum(value.const_value.nbytes for value in values if value.const_value.size > 1)


def _files(file: Path) -> int:
    return sum(each.stat().st_size for each in file.parent.glob(f"{file.name}*"))


@pytest.mark.skipif(not HIGH_WATER.exists(), reason="the kernel tells no peak of memory")
def test_a_search_takes_no_more_memory_than_foretold() -> None:
    problem = random_layer(0, in_features=512, widths=(512, 512)).problem
    solver = solver_of(problem, "awq_gptq")
    solver = replace(solver, options=replace(solver.options, column_chunk=1024))
    before = _peak()
    solver.solve(problem.group)
    used = _peak(reset=False) - before
    foretold = search_memory([problem.group], torch.device("cpu"), held=0).bytes
    assert foretold / 10 < used <= foretold


def _peak(*, reset: bool = True) -> int:
    """Return the most bytes that this process held since the last reset."""
    if reset:
        HIGH_WATER.write_text("5")
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak) * 1024


@pytest.mark.parametrize("algo", ["awq_lite", "awq_gptq"])
def test_seconds_are_of_the_order_of_the_search(algo: str, tiny_model: Path, tiny_cache: Path, tmp_path: Path) -> None:
    config = replace(quantization(tiny_model, tmp_path, algo), cache_dir=tiny_cache)
    found = genai_quant.preview(config)
    search = open_search(config)
    started = time.perf_counter()
    assert len(list(solve_groups(search.solver, search.groups))) == found.search.groups
    taken = time.perf_counter() - started
    assert taken / 10 < found.search.seconds < taken * 10
    assert sum(site.seconds for site in found.sites) == pytest.approx(found.search.seconds)
    assert {site.seconds > 0 for site in found.sites if site.bits is not None} == {True}


@pytest.mark.parametrize(
    ("text", "times"),
    [(TextShape(calibration_windows=1, held_out_windows=1, seq_len=32, batch_size=1), 8), (None, 4)],
    ids=["statistics", "none"],
)
def test_a_large_group_takes_the_time_of_a_smaller_one_scaled(
    text: TextShape | None, times: int, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half the inputs and outputs have a quarter of the weights, and an eighth of ``search_cost``."""
    config, directory = quantization(tiny_model, tmp_path, "awq_lite" if text else "rtn_dq"), locate_model(tiny_model)
    plan = plan_model(config, parse_graph(directory), directory)
    large, small = (
        replace(random_layer(0, in_features=inputs, widths=(inputs,)).problem.group, activation=f"{inputs}")
        for inputs in (1024, 64)
    )
    small = replace(small, sites=(replace(small.sites[0], name="small"),))
    spec = next(iter(plan.sites.specs.values()))
    sites = replace(plan.sites, groups=(small, large), specs={"small": spec, large.sites[0].name: spec})
    ticks = count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))  # all that is timed takes the same
    monkeypatch.setattr(search_time, "_TIMED", search_cost(large) / 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    found = search_time.search_seconds(config, replace(plan, sites=sites), text, torch.device("cpu"))
    assert found[large.sites[0].name] == pytest.approx(times * found["small"])


def test_a_budget_and_missing_weights_still_have_seconds(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.onnx").write_bytes((tiny_model / "model.onnx").read_bytes())
    config = replace(quantization(tmp_path / "base", tmp_path, "awq_gptq"), target_bpw=6.0, block_size=None)
    found = genai_quant.preview(config)
    assert found.obstacles
    assert found.search.seconds > 0
