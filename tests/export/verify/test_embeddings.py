"""A saved embedding that differs from its numbers, on disk or in the runtime, is noticed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import export.verify.embeddings
from export.forms.embedding import RewrittenTable
from export.rewrite import rewrite
from export.save import save_model
from export.verify.embeddings import check_stored_table, measure_table
from stages.errors import GraphError
from tests.export.verify.test_verify import flip
from tests.support.embeddings import FORMS, lookup_graph, plan_of, random_table, rounded, table_store
from tests.support.pairwise import pairwise


def saved(folder: Path, **changes: object) -> tuple[Path, RewrittenTable]:
    plan = plan_of(37, 41, **changes)
    table = random_table(plan)
    store = table_store(folder / "weights", plan, rounded(plan, table))
    result = rewrite(lookup_graph(plan, table).model(), store)
    save_model(result.model, folder, "model.onnx")
    return folder / "model.onnx", result.tables[0]


def lookup(path: Path) -> ir.Node:
    return next(node for node in ir.load(path).graph if node.op_type.startswith("Gather"))


@pytest.mark.parametrize(("stored_as", "dtype"), pairwise(FORMS, ["float32", "float16"]))
def test_a_good_table_passes_and_its_error_is_rounding(
    tmp_path: Path, stored_as: tuple[str, int, int], dtype: str
) -> None:
    form, axis, bits = stored_as
    path, table = saved(tmp_path, form=form, axis=axis, dtype=dtype, bits=bits)
    check_stored_table(lookup(path), table)
    error = measure_table(tmp_path, lookup(path), table)
    assert error.table == "table"
    assert 0 < error.error < {"float32": 1e-7, "float16": 5e-4}[dtype]


@pytest.mark.parametrize(("part", "bits"), [("codes", 4), ("codes", 8), ("scales", 4)])
def test_one_wrong_bit_is_noticed(tmp_path: Path, part: str, bits: int) -> None:
    path, table = saved(tmp_path, bits=bits)
    flip(path, f"h/Gather/{part}", byte=17)
    with pytest.raises(GraphError, match=f"'h/Gather/{part}' differs from the quantized embedding 'table'"):
        check_stored_table(lookup(path), table)


@pytest.mark.parametrize("attribute", ["block_size", "quantize_axis"])
def test_a_lookup_that_means_something_else_is_noticed(tmp_path: Path, attribute: str) -> None:
    path, table = saved(tmp_path)
    other = {"block_size": 32, "quantize_axis": 0}[attribute]
    node = lookup(path)
    node.attributes[attribute] = ir.AttrInt64(attribute, other)
    with pytest.raises(GraphError):
        measure_table(tmp_path, node, table)


def test_a_runtime_that_looks_up_something_else_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, table = saved(tmp_path)
    reference = export.verify.embeddings._reference

    def off(*arguments: object) -> np.ndarray:
        rows = reference(*arguments).copy()
        rows[-1, -1] += 1e-4
        return rows

    monkeypatch.setattr(export.verify.embeddings, "_reference", off)
    with pytest.raises(GraphError, match=r"'table' gives rows .* away from its own numbers"):
        measure_table(tmp_path, lookup(path), table)


def test_the_reference_reads_the_plan_it_is_given(tmp_path: Path) -> None:
    path, table = saved(tmp_path)
    wrong = replace(table, plan=replace(table.plan, block_size=32))
    with pytest.raises(GraphError, match="away from its own numbers"):
        measure_table(tmp_path, lookup(path), wrong)
