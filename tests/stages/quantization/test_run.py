"""Prepare, search and discard on a builder-made model."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stages.commands.quantize_options import QuantizeConfig
from stages.errors import CacheMismatch, SolveError, UserError
from stages.model.directory import locate_model
from stages.model.sites import find_groups
from stages.quantization.plan.plan_file import read_plan
from stages.quantization.plan.rules import all_sites
from stages.quantization.run import (
    Prepared,
    discard_if_bad_input,
    open_search,
    prepare,
    round_embeddings,
    search_weights,
)
from stages.quantization.search.parallel import solve_groups
from stages.system.distributed import Processes

ALONE = Processes(state=None)


@pytest.fixture
def config(tiny_model: Path, tiny_cache: Path, tmp_path: Path) -> QuantizeConfig:
    cache = Path(shutil.copytree(tiny_cache, tmp_path / "cache"))
    return QuantizeConfig(
        onnx_path=tiny_model, output_path=tmp_path / "out", cache_dir=cache, algo="rtn_dq", target="any", device="cpu"
    )


def _prepared(config: QuantizeConfig) -> Prepared:
    return prepare(config, locate_model(config.onnx_path), ALONE)


def test_an_algorithm_without_statistics_needs_no_cache(config: QuantizeConfig, tmp_path: Path) -> None:
    assert _prepared(replace(config, cache_dir=tmp_path / "none")).cache is None
    with pytest.raises(CacheMismatch, match="calibrate first"):
        _prepared(replace(config, cache_dir=tmp_path / "none", algo="gptq"))


def test_a_budget_is_allocated_and_its_plan_lies_in_the_store(config: QuantizeConfig) -> None:
    prepared = _prepared(replace(config, target_bpw=6.0))
    assert prepared.plan.left_open is None
    specs = prepared.plan.sites.specs
    planned = read_plan(prepared.store.folder / "plan.toml", all_sites(find_groups(prepared.model)))
    assert {name: planned[name].format for name in specs} == {name: spec.label for name, spec in specs.items()}


def test_only_what_is_missing_is_searched(config: QuantizeConfig) -> None:
    prepared = _prepared(config)
    search_weights(config, prepared, ALONE)
    files = sorted(prepared.store.folder.glob("*.safetensors"))
    assert len(files) == len(prepared.store.recipe.groups)
    times = {file: file.stat().st_mtime_ns for file in files}
    lost = prepared.store.group_file(1)
    (before,) = prepared.store.read_group(1).weights
    lost.unlink()
    search_weights(config, prepared, ALONE)
    assert {file for file, time in times.items() if file.stat().st_mtime_ns != time} == {lost}
    (after,) = prepared.store.read_group(1).weights
    assert torch.equal(after.codes, before.codes)


def test_embeddings_are_rounded_once(config: QuantizeConfig) -> None:
    prepared = _prepared(replace(config, gather_quantize_axis=1))
    round_embeddings(prepared.model, prepared.store, torch.device("cpu"))
    file = prepared.store.table_file(0)
    assert file.is_finished()
    before = file.path.stat().st_mtime_ns
    round_embeddings(prepared.model, prepared.store, torch.device("cpu"))
    assert file.path.stat().st_mtime_ns == before


def test_an_opened_search_makes_the_weights_of_the_run_and_writes_nothing(config: QuantizeConfig) -> None:
    search = open_search(config)
    solved = [group for _, group in sorted(solve_groups(search.solver, search.groups), key=lambda found: found[0])]
    assert not config.weights_folder.exists()
    prepared = _prepared(config)
    search_weights(config, prepared, ALONE)
    for index, group in enumerate(solved):
        stored = prepared.store.read_group(index)
        for one, other in zip(group.weights, stored.weights, strict=True):
            assert torch.equal(one.codes, other.codes)
            assert torch.equal(one.scales, other.scales)


@pytest.mark.parametrize(
    ("error", "finished", "owner", "stays"),
    [
        (UserError("no room"), False, True, False),
        (UserError("no room"), True, True, True),
        (SolveError("not finite"), True, True, False),
        (CacheMismatch("damaged"), True, True, False),
        (SolveError("not finite"), False, False, True),
    ],
)
def test_a_store_that_this_run_began_goes_where_it_is_empty_or_rests_on_bad_numbers(
    error: UserError, finished: bool, owner: bool, stays: bool, config: QuantizeConfig
) -> None:
    prepared = _prepared(config)

    def fail() -> None:
        with discard_if_bad_input(prepared.store, owner=owner):
            if finished:
                search_weights(config, prepared, ALONE)
            raise error

    with pytest.raises(UserError, match=str(error)):
        fail()
    assert prepared.store.folder.exists() == stays


def test_a_store_that_an_earlier_run_filled_stays(config: QuantizeConfig) -> None:
    prepared = _prepared(config)
    search_weights(config, prepared, ALONE)
    with pytest.raises(SolveError), discard_if_bad_input(prepared.store, owner=True):
        raise SolveError("not finite")
    assert prepared.store.is_complete()
