"""Compare the forecast of seconds with a search's: the same order, and in proportion to the groups."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch

import genai_quant
from stages.calibration.capture import TextShape
from stages.model.directory import locate_model
from stages.model.load import parse_graph
from stages.quantization.plan.plan import plan_model
from stages.quantization.preview import seconds as search_time
from stages.quantization.run import open_search
from stages.quantization.search.parallel import solve_groups
from stages.quantization.search.solver import search_cost
from tests.stages.quantization.preview.configs import quantization
from tests.stages.quantization.search.problems import random_layer


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


TEXT = TextShape(calibration_windows=1, held_out_windows=1, seq_len=32, batch_size=1)


@pytest.mark.parametrize(("algo", "text"), [("awq_lite", TEXT), ("signround", TEXT), ("rtn_dq", None)])
def test_a_large_group_takes_the_time_of_a_smaller_one_scaled(
    algo: str, text: TextShape | None, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By ``search_cost`` of what signround starts from; where weights are only rounded, by their number."""
    config, directory = quantization(tiny_model, tmp_path, algo), locate_model(tiny_model)
    searched = "awq_gptq" if algo == "signround" else algo
    plan = plan_model(config, parse_graph(directory), directory)
    large, small = (
        replace(random_layer(0, in_features=inputs, widths=(inputs,)).problem.group, activation=f"{inputs}")
        for inputs in (1024, 64)
    )
    small = replace(small, sites=(replace(small.sites[0], name="small"),))
    spec = next(iter(plan.sites.specs.values()))
    sites = replace(plan.sites, groups=(small, large), specs={"small": spec, large.sites[0].name: spec})
    ticks = count()
    for clock in ("perf_counter", "process_time"):  # all that is timed takes the same
        monkeypatch.setattr(time, clock, lambda: float(next(ticks)))
    limit = search_cost(large, searched) / 8
    monkeypatch.setattr(search_time, "_TIMED", limit)
    cut = search_time._shrunk(large, searched, limit)
    assert limit / 2 < search_cost(cut, searched) <= limit
    weights = cut.in_features * cut.sites[0].out_features
    times = search_cost(large, searched) / search_cost(cut, searched) if text else 1024 * 1024 / weights
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    found = search_time.search_seconds(config, replace(plan, sites=sites), text, torch.device("cpu"))
    assert found[large.sites[0].name] == pytest.approx(times * found["small"])
