"""The table that a search ends with."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from stages.quantization.weights.store import create_or_resume_store
from stages.quantization.weights.summary import quantization_table, ranges
from stages.records.formats import WeightForm
from stages.records.results import ExportRecipe, SiteReport, SolvedGroup
from stages.records.sites import ActivationGroup, MatMulSite, WeightLayout

_IN, _OUT = 64, 32


def test_runs_of_layers_are_drawn_together():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges([3]) == "3"
    assert ranges([]) == ""


@pytest.mark.parametrize("layers", ["/model/layers.", "/model/layers/"])
def test_layers_of_a_mixed_kind_are_named_and_uniform_kinds_are_not(layers, tmp_path):
    store = _store(tmp_path / "w", {0: "8ch", 1: "4b32", 2: "4b32", 3: "8ch"}, layers)
    text = _printed(store)
    assert "2 x mlp/down_proj 8ch" in text
    assert "2 x mlp/down_proj 4b32" in text
    assert "4 x mlp/up_proj 4b32" in text
    assert "8ch: mlp/down_proj of layers 0, 3" in text
    assert "4b32: mlp/down_proj of layers 1-2" in text
    assert "mlp/up_proj of layers" not in text


def test_the_title_gives_the_bits_that_the_bytes_come_to(tmp_path):
    store = _store(tmp_path / "w", {0: "8ch", 1: "4b32"})
    mean_bytes = sum(report.bytes for report in store.reports()) / len(store.reports())
    assert f"{8 * mean_bytes / (_IN * _OUT):.3f} bits a weight" in _printed(store)


def test_experts_that_no_token_reached_are_named_layer_by_layer(tmp_path):
    tokens = {(0, 0): 7, (0, 1): 0, (0, 2): 0, (1, 0): 40, (1, 1): 0, (1, 2): 5}
    sites = {
        f"/model/layers.{layer}/moe/experts.{expert}/{kind}": seen
        for (layer, expert), seen in tokens.items()
        for kind in ("gate_up_proj", "down_proj")
    }
    text = _printed(_store_of_experts(tmp_path / "w", sites))
    assert "least 0, median 2, most 40" in text
    assert "experts that no calibration token reached: layers.0/moe 1-2; layers.1/moe 1; calibrate" in text
    text = _printed(_store_of_experts(tmp_path / "all", dict.fromkeys(sites, 3)))
    assert "least 3, median 3, most 3" in text
    assert "no calibration token reached" not in text


def test_of_many_layers_with_unseen_experts_the_first_are_named(tmp_path):
    sites = {f"/model/layers.{layer}/moe/experts.9/down_proj": 0 for layer in range(20)}
    text = _printed(_store_of_experts(tmp_path / "w", sites))
    assert "layers.11/moe 9 and of 8 more layers" in text


def _store_of_experts(folder, tokens):
    groups = tuple(
        ActivationGroup(
            activation=f"{name}.in", in_features=_IN, sites=(_site(name),), absorber=None, unfoldable_because="made up"
        )
        for name in tokens
    )
    store = _empty_store(folder, groups)
    for index, (name, seen) in enumerate(tokens.items()):
        report = SiteReport(site=name, algorithm="gptq", format="4b32", bytes=1280, tokens=seen)
        store.write(index, SolvedGroup(group=groups[index], weights=(), reports=(report,)))
    return store


def _printed(store):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(quantization_table(store, 1.0))
    return " ".join(console.export_text().split())


def _store(folder, formats, layers="/model/layers."):
    groups = tuple(
        ActivationGroup(
            activation=f"{layer}.{kind}.in",
            in_features=_IN,
            sites=(_site(f"{layers}{layer}/mlp/{kind}/MatMul"),),
            absorber=None,
            unfoldable_because="made up",
        )
        for layer in formats
        for kind in ("up_proj", "down_proj")
    )
    store = _empty_store(folder, groups)
    for index, group in enumerate(groups):
        layer = int(group.activation[0])
        form = formats[layer] if "down_proj" in group.activation else "4b32"
        report = SiteReport(
            site=group.sites[0].name, algorithm="rtn", format=form, bytes=2176 if form == "8ch" else 1280
        )
        store.write(index, SolvedGroup(group=group, weights=(), reports=(report,)))
    return store


def _empty_store(folder, groups):
    recipe = ExportRecipe(
        model_fingerprint="f",
        weight_form=WeightForm.DQ,
        fold_input_scales=True,
        groups=groups,
        kept=(),
        search="s",
        summary="rtn_dq INT4 block 32",
    )
    return create_or_resume_store(folder, recipe, overwrite=False)


def _site(name):
    return MatMulSite(
        name=name,
        op_type="MatMul",
        weight=f"{name}.w",
        activation=f"{name}.in",
        output=f"{name}.out",
        in_features=_IN,
        out_features=_OUT,
        layout=WeightLayout.K_BY_N,
        dtype="float32",
    )
