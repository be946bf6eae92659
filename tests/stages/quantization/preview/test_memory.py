"""Compare the forecast of memory with runs: the same partitions, and no less than a search takes."""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

import genai_quant
from stages.quantization.preview.memory import export_memory, search_memory
from stages.quantization.preview.table import Preview
from tests.stages.quantization.preview.configs import calibration, quantization
from tests.stages.quantization.search.problems import random_layer, solver_of, spec

HIGH_WATER = Path("/proc/self/clear_refs")


def parts(found: Preview) -> int:
    """Return the partitions that stage one runs the model in."""
    (calibrate,) = (memory for memory in found.memory if memory.stage == "calibrate")
    several = re.search(r"in (\d+) parts", calibrate.holds)
    return 1 if several is None else int(several[1])


@pytest.mark.parametrize("limit", ["1GB", "300kB", "150kB"])
def test_partitions_are_those_of_the_run(limit: str, tiny_model: Path, tmp_path: Path) -> None:
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


@pytest.mark.skipif(not HIGH_WATER.exists(), reason="the kernel tells no peak of memory")
@pytest.mark.parametrize("widths", [(512, 512), (4096,)])
def test_a_search_takes_no_more_memory_than_predicted(widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.quantization.search.gptq.stacks._STACKED_ON_CPU", 1 << 19)
    monkeypatch.setattr("stages.quantization.search.choices._CPU_ELEMENTS", 1 << 19)
    problem = random_layer(0, in_features=512, widths=widths).problem
    solver = solver_of(problem, "awq_gptq")
    solver = replace(solver, options=replace(solver.options, column_chunk=1024))
    solver.solve(problem.group)  # libraries keep a few megabytes for themselves from their first use on
    before = _peak()
    solver.solve(problem.group)
    used = _peak(reset=False) - before
    predicted = search_memory([problem.group], solver.specs, torch.device("cpu"), held=0).bytes
    assert predicted / 10 < used <= predicted


def test_a_large_site_takes_little_more_than_its_weights() -> None:
    sizes = [1 << 20, 1 << 24, 1 << 27, 1 << 29]
    sites = [replace(random_layer(0).problem.group.sites[0], out_features=size // 48) for size in sizes]
    groups = [replace(random_layer(0).problem.group, sites=(site,)) for site in sites]
    specs = {sites[0].name: spec()}
    small, full, large, larger = (search_memory([each], specs, torch.device("cpu"), held=0).bytes for each in groups)
    assert full / small == pytest.approx(16, rel=0.01)
    assert (larger - large) / (sizes[3] - sizes[2]) == pytest.approx(8, rel=0.01)


def _peak(*, reset: bool = True) -> int:
    """Return the most bytes that this process held since the last reset."""
    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed would be used again, and not be seen
        HIGH_WATER.write_text("5")
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak) * 1024


def test_checking_an_output_takes_more_the_larger_its_largest_site_is() -> None:
    groups = [random_layer(0, in_features=64, widths=widths).problem.group for widths in ((64,), (64, 64), (4096,))]
    specs = {site.name: spec() for group in groups for site in group.sites}
    small, two, large = (export_memory([group], specs, held=1000).bytes for group in groups)
    assert 1000 < small < two < large
    assert (large - 1000) / (small - 1000) == pytest.approx(64)
    five = random_layer(0, in_features=64, widths=(64, 64, 64, 64, 64)).problem.group
    specs = {site.name: spec() for site in five.sites}
    assert export_memory([five], specs, held=1000).bytes == 1000 + 4 * (small - 1000), "four are checked at once"
