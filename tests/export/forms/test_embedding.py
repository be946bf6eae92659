"""Lookups of quantized tables: exact in ONNX Runtime, whatever the shape, type, axis and form; others untouched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from export.forms.embedding import table_outcomes
from export.rewrite import rewrite
from stages.errors import GraphError, OptionError
from tests.export.builders import relative_difference, run
from tests.support.embeddings import FORMS, dequantized, lookup_graph, plan_of, random_table, rounded, table_store
from tests.support.graphs import TinyGraph
from tests.support.pairwise import pairwise

# One product, rounded once to float32 or float16.
TOLERANCE = {"float32": 1e-7, "float16": 5e-4}
TOKENS = {"input_ids": np.array([[0, 36, 5, 17], [16, 15, 5, 0]])}


@pytest.mark.parametrize(
    ("stored_as", "dtype", "width"),
    pairwise(FORMS, list(TOLERANCE), [(64, 32), (40, 32), (41, 16), (48, 256)]),
)
def test_rows_are_the_stored_numbers(
    tmp_path: Path, stored_as: tuple[str, int, int], dtype: str, width: tuple[int, int]
) -> None:
    (form, axis, bits), (hidden, block_size) = stored_as, width
    plan = plan_of(37, hidden, dtype=dtype, axis=axis, block_size=block_size, form=form, bits=bits)
    table = random_table(plan)
    stored = rounded(plan, table)
    result = rewrite(lookup_graph(plan, table).model(), table_store(tmp_path / "weights", plan, stored))
    expected = dequantized(plan, stored)[TOKENS["input_ids"]]
    (found,) = run(result.model, TOKENS)
    assert found.dtype == np.dtype(dtype)
    assert relative_difference(found, expected) < TOLERANCE[dtype]
    assert "table" not in result.model.graph.initializers


@pytest.mark.parametrize("form", ["gather_block_quantized", "dq"])
def test_narrow_scales_of_a_table_are_widened(tmp_path: Path, form: str) -> None:
    plan = plan_of(37, 64, block_size=32, form=form, bits=8, scale_dtype="float16")
    table = random_table(plan)
    stored = rounded(plan, table)
    assert plan.format_bytes == 37 * 64 + 37 * 2 * 2
    result = rewrite(lookup_graph(plan, table).model(), table_store(tmp_path / "weights", plan, stored))
    assert result.model.graph.initializers["h/Gather/scales"].dtype is ir.DataType.FLOAT16
    (found,) = run(result.model, TOKENS)
    assert found.dtype == np.float32
    assert relative_difference(found, dequantized(plan, stored)[TOKENS["input_ids"]]) < TOLERANCE["float32"]
    # 2^-8 of the largest number of a block is rounding, and the scale's own is no part of it.
    assert relative_difference(found, table[TOKENS["input_ids"]]) < 0.005


@pytest.mark.parametrize(("bits", "dtype", "said"), [(4, ir.DataType.INT4, {}), (8, ir.DataType.UINT8, {"bits": 8})])
def test_block_quantized_has_exactly_the_attributes_of_its_operator(
    tmp_path: Path, bits: int, dtype: ir.DataType, said: dict[str, int]
) -> None:
    plan = plan_of(37, 64, block_size=32, bits=bits)
    table = random_table(plan)
    graph = lookup_graph(plan, table)
    model = graph.model()
    del model.graph.opset_imports["com.microsoft"]
    result = rewrite(model, table_store(tmp_path / "weights", plan, rounded(plan, table)))
    (node,) = result.model.graph
    assert (node.domain, node.op_type, node.name) == ("com.microsoft", "GatherBlockQuantized", "h/Gather")
    attributes = {name: attribute.as_int() for name, attribute in node.attributes.items()}
    assert attributes == {"gather_axis": 0, "quantize_axis": 1, "block_size": 32, **said}
    codes, tokens, scales = node.inputs
    assert codes is not None
    assert tokens is not None
    assert scales is not None
    assert (codes.dtype, codes.shape, codes.name) == (dtype, ir.Shape((37, 64)), "h/Gather/codes")
    assert tokens.name == "input_ids"
    assert (scales.dtype, scales.shape) == (ir.DataType.FLOAT, ir.Shape((37, 2)))
    assert result.model.graph.opset_imports["com.microsoft"] == 1
    assert relative_difference(run(result.model, TOKENS)[0], table[TOKENS["input_ids"]]) < 0.15


@pytest.mark.parametrize("form", ["gather_block_quantized", "dq"])
def test_all_lookups_of_a_table_share_its_codes(tmp_path: Path, form: str) -> None:
    plan = plan_of(37, 32, gathers=("h", "second"), form=form)
    table = random_table(plan)
    stored = rounded(plan, table)
    result = rewrite(lookup_graph(plan, table).model(), table_store(tmp_path / "weights", plan, stored))
    assert len(result.model.graph.initializers) == 2
    assert sum(node.op_type == "DequantizeLinear" for node in result.model.graph) == (form == "dq")
    for found in run(result.model, TOKENS):
        assert relative_difference(found, dequantized(plan, stored)[TOKENS["input_ids"]]) < TOLERANCE["float32"]


def tied_graph(plan_transposed: bool, table: np.ndarray) -> TinyGraph:
    """Build the lookup, and logits of the rows by the same table: with the Transpose on either side."""
    plan = plan_of(*table.shape, transposed=plan_transposed)
    graph = lookup_graph(plan, table)
    head = "table" if plan_transposed else graph.node("Transpose", ["table"], ["swapped"], {"perm": [1, 0]})
    graph.node("MatMul", ["h", head], ["logits"])
    graph.output("logits", 1, ["batch", "length", table.shape[0]])
    return graph


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", ["gather_block_quantized", "dq"])
def test_a_tied_head_keeps_the_original_numbers(tmp_path: Path, transposed: bool, form: str) -> None:
    plan = plan_of(37, 40, transposed=transposed, form=form)
    table = random_table(plan)
    stored = rounded(plan, table)
    model = tied_graph(transposed, table).model()
    before = ir.to_proto(model).SerializeToString()
    result = rewrite(model, table_store(tmp_path / "weights", plan, stored))
    assert ir.to_proto(model).SerializeToString() == before
    rows, logits = run(result.model, TOKENS)
    expected = dequantized(plan, stored)[TOKENS["input_ids"]]
    assert relative_difference(rows, expected) < TOLERANCE["float32"]
    # Sums of 40 products in float32.
    assert relative_difference(logits, expected @ table.T.astype(np.float64)) < 1e-6
    (outcome,) = table_outcomes(result.model, result.tables)
    assert outcome.still_read_by == ("logits/MatMul",)
    assert (outcome.bytes_before, outcome.bytes_after) == (37 * 40 * 4, 37 * 20 + 37 * 3 * 4)


def test_a_table_that_nobody_else_reads_is_gone(tmp_path: Path) -> None:
    plan = plan_of(37, 40, transposed=True)
    table = random_table(plan)
    model = lookup_graph(plan, table).model()
    result = rewrite(model, table_store(tmp_path / "weights", plan, rounded(plan, table)))
    assert [node.op_type for node in result.model.graph] == ["GatherBlockQuantized"]
    assert table_outcomes(result.model, result.tables)[0].still_read_by == ()


def test_a_lookup_of_another_table_is_refused(tmp_path: Path) -> None:
    plan = plan_of(37, 32)
    table = random_table(plan)
    store = table_store(tmp_path / "weights", plan, rounded(plan, table))
    model = lookup_graph(plan_of(37, 32, transposed=True), table).model()
    with pytest.raises(GraphError, match="does not look tokens up in 'table'"):
        rewrite(model, store)
    graph = lookup_graph(plan, table)
    graph.nodes[0].op_type = "GatherElements"
    with pytest.raises(GraphError, match="GatherElements 'h/Gather'"):
        rewrite(graph.model(), store)


def test_an_unfinished_table_is_refused_and_a_finished_one_is_read_late(tmp_path: Path) -> None:
    plan = plan_of(37, 32)
    table = random_table(plan)
    store = table_store(tmp_path / "weights", plan, rounded(plan, table))
    result = rewrite(lookup_graph(plan, table).model(), store)
    store.table_file(0).path.unlink()
    for name in ("h/Gather/codes", "h/Gather/scales"):
        tensor = result.model.graph.initializers[name].const_value
        assert tensor is not None
        with pytest.raises(OptionError, match="missing"):
            tensor.tobytes()
    with pytest.raises(OptionError, match=r"lacks the quantized embedding embedding\.0000\.table\.safetensors"):
        rewrite(lookup_graph(plan, table).model(), store)
