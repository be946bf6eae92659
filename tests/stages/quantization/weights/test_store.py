"""The folder of quantized weights: exact round trip, resumable, never mixed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stages.errors import CacheMismatch, OptionError, UserError
from stages.quantization.weights.store import create_or_resume_store, open_store
from stages.records.formats import PerBlock, PerChannel, QuantSpec, WeightForm
from stages.records.results import ExportRecipe, QuantizedWeight, SiteReport, SolvedGroup
from stages.records.sites import ActivationGroup, HeadSharing, LinearAbsorber, ValueAbsorber
from tests.stages.quantization.search.problems import site
from tests.support.embeddings import plan_of
from tests.support.full_disk import full_after

GROUPS = (
    ActivationGroup(
        activation="x",
        in_features=8,
        sites=(site("/layers.0/q_proj/MatMul", 4, 8), site("/layers.0/k_proj/MatMul", 2, 8)),
        absorber=ValueAbsorber(
            site="v", first_channel=3, heads=HeadSharing(kv_heads=1, group_size=2, head_size=4), bias="b"
        ),
    ),
    ActivationGroup(
        activation="y",
        in_features=8,
        sites=(site("/layers.0/down_proj/MatMul", 4, 8),),
        absorber=LinearAbsorber(site="up"),
    ),
)
RECIPE = ExportRecipe(
    model_fingerprint="m",
    weight_form=WeightForm.DQ,
    fold_input_scales=True,
    groups=GROUPS,
    kept=(("lm_head", "--exclude lm_head"),),
    search="s",
    summary="awq_full INT4 block 4",
)
SPECS = (
    QuantSpec(bits=4, symmetric=False, granularity=PerBlock(block_size=4), scale_dtype="float16"),
    QuantSpec(bits=8, symmetric=True, granularity=PerChannel(), scale_dtype="bfloat16"),
)


def _solved() -> SolvedGroup:
    shared = torch.rand(8) + 0.5
    weights = tuple(
        QuantizedWeight(
            site=member,
            spec=spec,
            codes=torch.randint(0, 15, (member.out_features, 8)).to(spec.code_dtype),
            scales=torch.rand(member.out_features, spec.num_blocks(8)).to(getattr(torch, spec.scale_dtype)),
            zero_points=None if spec.symmetric else torch.randint(0, 15, (member.out_features, 2), dtype=torch.uint8),
            input_scale=shared,
        )
        for member, spec in zip(GROUPS[0].sites, SPECS, strict=True)
    )
    reports = tuple(
        SiteReport(site=member.name, algorithm="awq_full", format="4b4", bytes=9, loss=0.25)
        for member in GROUPS[0].sites
    )
    return SolvedGroup(group=GROUPS[0], weights=weights, reports=reports)


def test_weights_reports_and_recipe_come_back_exactly(tmp_path: Path) -> None:
    solved = _solved()
    create_or_resume_store(tmp_path / "w", RECIPE, overwrite=False).write(0, solved)
    store = open_store(tmp_path / "w")
    assert store.recipe == RECIPE
    assert store.reports() == list(solved.reports)
    for weight in solved.weights:
        read = store.read(0, weight.site)
        assert read.spec == weight.spec
        for name in ("codes", "scales", "zero_points", "input_scale"):
            saved, loaded = getattr(weight, name), getattr(read, name)
            if saved is None:
                assert loaded is None
            else:
                assert saved.dtype == loaded.dtype
                assert torch.equal(saved, loaded)


def test_reports_tell_the_bytes_of_scales_that_become_bytes_however_often_they_are_written(tmp_path: Path) -> None:
    wide = site("/layers.0/q_proj/MatMul", 1000, 640)
    spec = QuantSpec(bits=4, symmetric=False, granularity=PerBlock(block_size=32), scale_dtype="float16")
    group = ActivationGroup(activation="x", in_features=640, sites=(wide,), absorber=None)
    weight = QuantizedWeight(
        site=wide,
        spec=spec,
        codes=torch.zeros(1000, 640, dtype=torch.uint8),
        scales=torch.ones(1000, 20, dtype=torch.float16),
        zero_points=torch.zeros(1000, 20, dtype=torch.uint8),
    )
    report = SiteReport(site=wide.name, algorithm="gptq", format="4b32z", bytes=spec.format_bytes(1000, 640))
    store = create_or_resume_store(tmp_path / "w", replace(RECIPE, groups=(group,), byte_scales=True), overwrite=False)
    store.write(0, SolvedGroup(group=group, weights=(weight,), reports=(report,)))
    store.write(0, store.read_group(0))
    (found,) = store.reports()
    # A byte for each scale in place of two, and four for each row.
    assert 1000 * (320 + 10 + 20 + 4) <= found.bytes < report.bytes - 15_000


def test_a_search_that_was_stopped_counts_the_seconds_of_all_its_runs(tmp_path: Path) -> None:
    store = create_or_resume_store(tmp_path / "w", RECIPE, overwrite=False)
    solved = _solved()
    store.write(0, replace(solved, reports=tuple(replace(report, seconds=2.0) for report in solved.reports)))
    assert store.seconds() == 2.0 * len(solved.reports), "weights of earlier versions have only their sites' seconds"
    store.add_seconds(1.5)
    store.add_seconds(2.0)
    assert open_store(store.folder).seconds() == 3.5


def test_files_are_named_after_their_first_site_and_the_report_has_a_line_a_site(tmp_path: Path) -> None:
    store = create_or_resume_store(tmp_path / "w", RECIPE, overwrite=False)
    store.write(0, _solved())
    assert (tmp_path / "w" / "0000.layers.0.q_proj.MatMul.safetensors").is_file()
    assert len(store.write_report().read_text().splitlines()) == 2


def test_embeddings_have_files_of_their_own_and_belong_to_the_recipe(tmp_path: Path) -> None:
    plan = plan_of(8, 16, weight="/model.embed/weight")
    recipe = replace(RECIPE, embeddings=(plan,))
    store = create_or_resume_store(tmp_path / "w", recipe, overwrite=False)
    assert store.table_file(0).path.name == "embedding.0000.model.embed.weight.safetensors"
    assert open_store(tmp_path / "w").recipe == recipe
    for other in (RECIPE, replace(recipe, embeddings=(replace(plan, block_size=32),))):
        with pytest.raises(CacheMismatch):
            create_or_resume_store(tmp_path / "w", other, overwrite=False)


def test_a_table_of_an_earlier_version_is_int4_of_its_own(tmp_path: Path) -> None:
    plan = plan_of(10, 8, block_size=16)
    create_or_resume_store(tmp_path, replace(RECIPE, embeddings=(plan,)), overwrite=False)
    path = tmp_path / "recipe.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for name in ("bits", "symmetric", "scale_range", "shared_with"):
        del content["embeddings"][0][name]
    path.write_text(json.dumps(content), encoding="utf-8")
    assert open_store(tmp_path).recipe.embeddings == (plan,)


def test_a_table_that_lm_head_shares_is_there_with_its_group(tmp_path: Path) -> None:
    head = RECIPE.groups[0].sites[0].name
    shared = plan_of(10, 8, bits=8, shared_with=head)
    store = create_or_resume_store(tmp_path / "one", replace(RECIPE, embeddings=(shared,)), overwrite=False)
    assert not store.has_table(0)
    store.group_file(0).touch()
    assert store.has_table(0)
    create_or_resume_store(
        tmp_path / "two", replace(RECIPE, embeddings=(replace(shared, shared_with="gone"),)), overwrite=False
    )
    with pytest.raises(OptionError, match="'table' is shared with 'gone', which isn't there"):
        open_store(tmp_path / "two")


def test_one_tensor_or_the_format_is_read_without_the_rest(tmp_path: Path) -> None:
    solved = _solved()
    store = create_or_resume_store(tmp_path / "w", RECIPE, overwrite=False)
    store.write(0, solved)
    first, second = solved.weights
    assert store.spec(0, first.site) == first.spec
    assert torch.equal(store.tensor(0, first.site, "zero_points"), first.zero_points)
    assert store.tensor(0, second.site, "zero_points") is None


def test_a_file_without_a_sites_format_is_refused(tmp_path: Path) -> None:
    store = create_or_resume_store(tmp_path / "w", RECIPE, overwrite=False)
    solved = _solved()
    store.write(0, replace(solved, weights=solved.weights[:1]))
    with pytest.raises(
        OptionError, match=r"its specs don't name '/layers.0/k_proj/MatMul'.*run stages\.quantize again"
    ):
        store.read(0, GROUPS[0].sites[1])


def test_overwrite_removes_only_folders_that_hold_nothing_else(tmp_path: Path) -> None:
    create_or_resume_store(tmp_path / "w", RECIPE, overwrite=False)
    (tmp_path / "w" / "precious.txt").write_text("data")
    with pytest.raises(UserError, match=r"precious\.txt beside quantized weights"):
        create_or_resume_store(tmp_path / "w", replace(RECIPE, search="other"), overwrite=True)
    assert (tmp_path / "w" / "precious.txt").read_text() == "data"


def test_the_same_recipe_resumes_another_is_refused(tmp_path: Path) -> None:
    create_or_resume_store(tmp_path / "w", RECIPE, overwrite=False).write(0, _solved())
    again = create_or_resume_store(tmp_path / "w", RECIPE, overwrite=False)
    assert (again.is_finished(0), again.is_finished(1)) == (True, False)
    other = replace(RECIPE, search="other")
    with pytest.raises(CacheMismatch, match="awq_full INT4 block 4"):
        create_or_resume_store(tmp_path / "w", other, overwrite=False)
    assert not create_or_resume_store(tmp_path / "w", other, overwrite=True).is_finished(0)


def test_a_folder_of_something_else_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    with pytest.raises(UserError, match="not empty"):
        create_or_resume_store(tmp_path, RECIPE, overwrite=True)
    assert (tmp_path / "precious").read_text() == "data"


def test_missing_and_damaged_files_say_what_to_do(tmp_path: Path) -> None:
    store = create_or_resume_store(tmp_path / "w", RECIPE, overwrite=False)
    with pytest.raises(OptionError, match=r"run stages\.quantize again"):
        store.read(0, GROUPS[0].sites[0])
    store.write(0, _solved())
    store.group_file(0).write_bytes(store.group_file(0).read_bytes()[:100])
    with pytest.raises(OptionError, match="damaged"):
        store.read(0, GROUPS[0].sites[0])
    (tmp_path / "w" / "recipe.json").write_text("{}")
    with pytest.raises(OptionError, match=r"recipe\.json can't be read"):
        open_store(tmp_path / "w")


def test_a_full_disk_is_a_message_and_leaves_no_half_group(tmp_path: Path) -> None:
    store = create_or_resume_store(tmp_path / "w", RECIPE, overwrite=False)
    with full_after(100), pytest.raises(UserError, match=r"File too large.*free space there, or .*--weights_path"):
        store.write(0, _solved())
    assert not store.is_finished(0)
    assert [path.name for path in store.folder.iterdir()] == ["recipe.json"]
