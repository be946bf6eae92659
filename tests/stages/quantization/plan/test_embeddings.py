"""Which tables share lm_head's weight, in which format, and what says why not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from stages.errors import OptionError
from stages.model.sites import find_embeddings, find_sites
from stages.quantization.plan.embeddings import (
    SharedTables,
    Sharing,
    TableFormat,
    plan_embeddings,
    require_tables,
    share_tables,
)
from stages.quantization.targets.formats import OpenFormats
from stages.records.formats import PerBlock, PerChannel, QuantSpec, WeightForm
from tests.support.graphs import TinyGraph

WANTED = Sharing(
    option="auto",
    form=WeightForm.DQ,
    symmetric=True,
    eight_bit_symmetric=True,
    head_bits=None,
    four_bit=PerBlock(block_size=32),
    skipped={},
    given={},
)
FORMAT = TableFormat(bits=8, axis=1, block_size=128, form="gather_block_quantized")


def tied_model(hidden: int = 96, *, tied: bool = True) -> ir.Model:
    table = np.random.default_rng(0).standard_normal((30, hidden), np.float32)
    graph = TinyGraph()
    graph.input("input_ids", TensorProto.INT64, ["t"])
    rows = graph.node("Gather", [graph.constant("table", table), "input_ids"], ["rows"])
    head = table.T if tied else table.T + 1
    graph.output(graph.linear(rows, np.ascontiguousarray(head), "logits"), TensorProto.FLOAT, ["t", 30])
    return graph.model()


def share(model: ir.Model, wanted: Sharing = WANTED, table_format: TableFormat = FORMAT) -> SharedTables:
    plans = plan_embeddings(find_embeddings(model), table_format)
    return share_tables(model, plans, find_sites(model), wanted)


@pytest.mark.parametrize(
    ("hidden", "block_size", "found"), [(96, 128, 32), (128, 128, 128), (128, 64, 64), (80, 32, 16)]
)
def test_both_get_the_tables_format_in_the_largest_blocks_that_divide_a_row(
    hidden: int, block_size: int, found: int
) -> None:
    model = tied_model(hidden)
    shared = share(model, replace(WANTED, eight_bit_symmetric=False), replace(FORMAT, block_size=block_size))
    granularity = PerBlock(block_size=found)
    spec = QuantSpec(bits=8, symmetric=False, granularity=granularity, scale_dtype="float32")
    assert shared.specs == {"logits/MatMul": spec}
    (plan,) = shared.joined(plan_embeddings(find_embeddings(model), FORMAT))
    assert (plan.spec, plan.shared_with, plan.own_bytes) == (spec, "logits/MatMul", 0)
    assert [line.chosen for line in shared.explanations] == [f"yes, 8b{found}z"]


@pytest.mark.parametrize(
    ("wanted", "table_format", "words"),
    [
        ({"skipped": {"logits/MatMul": "--lm_head none"}}, {}, r"stays as it is \(--lm_head none\)"),
        ({"runtime_cannot": "ONNX Runtime 1.22 reads no such table"}, {}, "ONNX Runtime 1.22 reads no such table"),
        ({"form": WeightForm.QDQ}, {}, "in the form qdq are not for MatMulNBits"),
        ({"form": WeightForm.DQ_COLUMN_MAJOR}, {}, "in the form dq_column_major are not"),
        ({}, {"form": "dq"}, "only GatherBlockQuantized over blocks of one token"),
        ({}, {"axis": 0, "bits": 4}, "only GatherBlockQuantized over blocks of one token"),
        ({"head_bits": 4, "table_bits": 8}, {}, r"lm_head is INT4 and the embedding INT8 \(--lm_head, --embedding\)"),
        ({"given": {"logits/MatMul": PerChannel()}}, {}, "blocks of 8ch don't divide rows of 96"),
        ({"given": {"logits/MatMul": PerBlock(block_size=64)}}, {}, "blocks of 8b64 don't divide rows of 96"),
        (
            {"given": {"logits/MatMul": PerBlock(block_size=32)}, "table_bits": 4},
            {"bits": 4},
            r"lm_head is INT8 and the embedding INT4 \(--plan, --embedding\)",
        ),
    ],
)
def test_a_tied_table_that_stays_apart_says_why(
    wanted: dict[str, Any], table_format: dict[str, Any], words: str
) -> None:
    given = wanted.get("given", {})
    specs = {
        name: QuantSpec(bits=8, symmetric=True, granularity=each, scale_dtype="float32") for name, each in given.items()
    }
    asked = replace(WANTED, **(wanted | {"given": specs}))
    model, form = tied_model(), replace(FORMAT, **table_format)
    shared = share(model, asked, form)
    assert not shared.specs
    (line,) = shared.explanations
    assert (line.option, line.chosen) == ("--share_embedding", "no")
    with pytest.raises(OptionError, match=f"--share_embedding on: .*{words}"):
        share(model, replace(asked, option="on"), form)


@pytest.mark.parametrize("asked", ["head_bits", "table_bits"])
@pytest.mark.parametrize(("bits", "size"), [(4, 32), (8, 128)])
def test_what_is_asked_for_one_is_both_ones(asked: str, bits: int, size: int) -> None:
    (spec,) = share(tied_model(128), replace(WANTED, **{asked: bits})).specs.values()
    assert (spec.bits, spec.granularity) == (bits, PerBlock(block_size=size))


def test_a_budget_has_every_block_that_divides_a_row_to_choose_from() -> None:
    blocks = tuple(PerBlock(block_size=size) for size in (128, 64, 32))
    formats = OpenFormats(four_bit=blocks, zero_points=(False, True), eight_bit=PerBlock(block_size=128))
    wanted = replace(WANTED, open=formats)
    shared = share(tied_model(192), wanted)
    labels = ["4b64", "4b64z", "4b32", "4b32z", "8b64"]
    assert [spec.label for spec in shared.open["logits/MatMul"]] == labels
    assert shared.specs["logits/MatMul"].label == "8b64"
    (line,) = shared.explanations
    assert (line.chosen, "the budget chooses" in line.why) == ("yes", True)
    assert not share(tied_model(192), replace(wanted, table_bits=4)).open


def test_a_row_that_no_block_divides_stays_apart() -> None:
    with pytest.raises(OptionError, match="no block size divides rows of 41 numbers"):
        share(tied_model(41), replace(WANTED, option="on"))


def test_an_untied_table_is_no_surprise_unless_sharing_was_asked_for() -> None:
    model = tied_model(tied=False)
    assert share(model) == SharedTables(specs={}, heads={})
    with pytest.raises(OptionError, match="'table' holds other numbers than every lm_head"):
        share(model, replace(WANTED, option="on"))


def test_off_shares_nothing_and_on_needs_a_quantized_embedding() -> None:
    assert not share(tied_model(), replace(WANTED, option="off")).explanations
    with pytest.raises(OptionError, match="no embedding is quantized; add --embedding 8"):
        share_tables(tied_model(), (), (), replace(WANTED, option="on"))


def test_no_operator_looks_int8_up_whose_scales_several_tokens_share() -> None:
    tables = find_embeddings(tied_model())
    with pytest.raises(OptionError, match=r"--gather_quantize_axis 0 .* leave one of them out"):
        plan_embeddings(tables, replace(FORMAT, axis=0))
    assert plan_embeddings(tables, replace(FORMAT, axis=0, form="dq"))
    assert plan_embeddings(tables, replace(FORMAT, axis=0, bits=4))


def test_a_model_without_embedding_is_refused() -> None:
    with pytest.raises(OptionError, match="--embedding: no Gather of the model"):
        require_tables(())
