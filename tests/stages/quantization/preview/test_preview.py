"""Compare --dry_run with the run itself: the same sizes and formats, and what is missing is said."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

import genai_quant
from stages.calibration.text import documents
from stages.calibration.text.documents import HubSource
from stages.quantization.weights.store import open_store
from stages.quantization.weights.summary import bits_per_weight
from tests.stages.quantization.preview.configs import quantization


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
    stored = sum(file.stat().st_size for file in config.weights_folder.glob("*.safetensors"))
    assert found.disk.weights <= stored <= found.disk.weights + 2048 * len(found.sites)
    assert (found.disk.calibration, found.disk.output) == (0, found.bytes_after)


def _weights(file: Path) -> int:
    values = ir.load(file).graph.initializers.values()
    return sum(value.const_value.nbytes for value in values if value.const_value.size > 1)


def _files(file: Path) -> int:
    return sum(each.stat().st_size for each in file.parent.glob(f"{file.name}*"))


def test_a_budget_and_missing_weights_still_have_seconds(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.onnx").write_bytes((tiny_model / "model.onnx").read_bytes())
    config = replace(quantization(tmp_path / "base", tmp_path, "awq_gptq"), target_bpw=6.0, block_size=None)
    found = genai_quant.preview(replace(config, dataset="offline"))
    assert found.obstacles
    assert found.search.seconds > 0


def test_a_preview_s_formats_are_those_of_the_run(tiny_model: Path, tiny_cache: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(tiny_cache, tmp_path / "cache")
    config = replace(
        quantization(tiny_model, tmp_path, "rtn_dq"), cache_dir=cache, target_bpw=6.0, block_size=None, verify="off"
    )
    found = genai_quant.preview(config)
    store = open_store(genai_quant.quantize(config).weights)
    made = {report.site: report.format for report in store.reports()}
    assert {site.name: site.format for site in found.sites if site.format != "keep"} == made
    assert found.recipe == store.recipe.summary
    assert found.bits_per_weight == pytest.approx(bits_per_weight(store))
    assert {site.formats for site in found.sites} == {()}


def test_a_budget_without_a_cache_shows_what_is_open(tiny_model: Path, tmp_path: Path) -> None:
    config = replace(quantization(tiny_model, tmp_path, "rtn_dq"), target_bpw=6.0, block_size=None)
    found = genai_quant.preview(replace(config, dataset="offline"))
    assert found.recipe == "rtn_dq --target_bpw 6, not spent yet"
    everything = ("4b128", "4b128z", "4b64", "4b64z", "4b32", "4b32z", "8b128")
    assert {site.formats for site in found.sites} == {everything, (*everything, "keep")}
    (note,) = (note for note in found.notes if "not spent yet" in note)
    assert "it needs the calibration cache" in note
    assert "bits a weight can be reached" in note


def test_the_text_is_that_of_the_run_and_what_the_model_writes_of_it_takes_time(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = HubSource(path=str(tmp_path / "nothing"), config=None, split="train", column="text")
    monkeypatch.setattr(documents, "HUB_SOURCES", {"cnn": nothing})
    config = quantization(tiny_model, tmp_path, "awq_lite")
    notes = " ".join(genai_quant.preview(config).notes)
    assert "it is part of the same run (text: mix)" in notes
    assert "mix takes its place" in notes
    assert "the model writes 22 windows of text itself" in notes
    notes = " ".join(genai_quant.preview(replace(config, dataset="offline")).notes)
    assert "(text: offline)" in notes
    assert "writes" not in notes


def test_a_cache_of_other_text_is_an_obstacle_or_replaced(
    tiny_model: Path, tiny_text: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    config = replace(
        quantization(tiny_model, tmp_path, "awq_lite"),
        cache_dir=tiny_cache,
        dataset=str(tiny_text),
        calib_size=20,
        seq_len=32,
    )
    for overwrite in (False, True):
        same = genai_quant.preview(replace(config, overwrite=overwrite))
        assert (same.obstacles, same.disk.calibration) == ((), 0)
    for option, value in (("dataset", "offline"), ("calib_size", 24), ("seq_len", 48), ("token_weights", "none")):
        other = replace(config, **{option: value})
        (obstacle,) = genai_quant.preview(other).obstacles
        assert "holds another calibration: " in obstacle
        replaced = genai_quant.preview(replace(other, overwrite=True))
        assert replaced.obstacles == ()
        assert replaced.disk.calibration > 0
        assert "there is another calibration in " in " ".join(replaced.notes)


@pytest.mark.parametrize(
    ("options", "places"),
    [
        ({}, {"norm", "linear", "value"}),
        ({"awqlite_disable_fuse_nodes": True}, {"mul"}),
        ({"algo": "rtn_dq"}, {"none"}),
        ({"exclude": "lm_head,layers.0/mlp/up_proj"}, {"norm", "linear", "value", "mul"}),
    ],
)
def test_input_scales_go_where_the_graph_takes_them(
    options: dict[str, object], places: set[str], tiny_model: Path, tmp_path: Path
) -> None:
    config = replace(quantization(tiny_model, tmp_path, "awq_lite"), **options)
    sites = genai_quant.preview(config).sites
    assert {site.input_scale for site in sites if site.bits is not None} == places
    assert all(bool(site.input_scale_why) == (site.input_scale == "mul") for site in sites)
