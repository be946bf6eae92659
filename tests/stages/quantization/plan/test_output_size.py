from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from stages.model.directory import locate_model
from stages.model.load import load_graph
from stages.quantization.plan.output_size import OutputSize, output_size
from stages.quantization.plan.rules import plan_of
from stages.quantization.targets.formats import FormatChoice
from stages.records.formats import EmbeddingPlan, EmbeddingTable, PerBlock, PerChannel, QuantSpec, WeightForm
from stages.records.sites import ActivationGroup
from tests.stages.quantization.search.problems import site
from tests.support.graphs import TinyGraph

HEAD = site("/lm_head/MatMul", 300, 64)
BODY = site("/model/layers.0/mlp/down_proj/MatMul", 64, 96)
TABLE = EmbeddingTable(
    weight=HEAD.weight, gathers=("looked up",), vocabulary=300, hidden=64, transposed=True, dtype="float32"
)
PLAN = EmbeddingPlan(table=TABLE, axis=1, block_size=32, form="gather_block_quantized")


def _size(form: WeightForm = WeightForm.DQ, embeddings: tuple[EmbeddingPlan, ...] = ()) -> OutputSize:
    return OutputSize(base_bytes=1_000_000, form=form, embeddings=embeddings)


def _total(size: OutputSize, *formats: QuantSpec | None) -> int:
    sites = [HEAD, BODY]
    specs = {each.name: spec for each, spec in zip(sites, formats, strict=True) if spec is not None}
    return size.total_bytes(sites, specs)


def test_a_model_whose_sites_all_stay_keeps_its_size() -> None:
    assert _total(_size(), None, None) == 1_000_000


def test_a_weight_that_somebody_else_reads_stays_beside_the_codes() -> None:
    spec = QuantSpec(bits=4, symmetric=True, granularity=PerBlock(block_size=32), scale_dtype="float32")
    shared = replace(HEAD, weight_shared_with=("looked up",))
    alone, beside = (_size().fixed_bytes([each]) + _size().site_bytes(each, spec) for each in (HEAD, shared))
    assert beside - alone == 300 * 64 * 4
    # The lookup has codes of its own too: nobody reads the numbers.
    tied = _size(embeddings=(PLAN,))
    table = PLAN.format_bytes
    gone = tied.fixed_bytes([shared]) + tied.site_bytes(shared, spec)
    # The table's nodes and attributes.
    assert table <= gone - alone <= table + 1000


def test_a_table_that_lm_head_shares_is_counted_once() -> None:
    spec = QuantSpec(bits=8, symmetric=False, granularity=PerBlock(block_size=32), scale_dtype="float32")
    shared = replace(PLAN, bits=8, symmetric=False, shared_with=HEAD.name)
    apart, one = (_total(_size(embeddings=(plan,)), spec, None) for plan in (PLAN, shared))
    # Each row: 64 codes, 2 scales and 2 zero points.
    assert shared.format_bytes == 300 * (64 + 8 + 2)
    assert apart - one == PLAN.format_bytes


def test_an_embedding_of_its_own_is_replaced_by_its_codes() -> None:
    own = replace(PLAN, table=replace(TABLE, weight="embedding"))
    saved = _size().fixed_bytes([BODY]) - _size(embeddings=(own,)).fixed_bytes([BODY])
    assert saved == pytest.approx(300 * 64 * 4 - own.format_bytes, abs=1000)


@pytest.mark.parametrize(
    ("granularity", "bits", "symmetric", "expected"),
    [
        # 96 inputs in blocks of 64: the second is filled up. 64 rows of 2 x 32 bytes of codes and 2 scales.
        (PerBlock(block_size=64), 4, True, 64 * (64 + 8)),
        # Zero points: two to a byte, each row beginning a new one.
        (PerBlock(block_size=64), 4, False, 64 * (64 + 8 + 1)),
        (PerBlock(block_size=32), 4, False, 64 * (48 + 12 + 2)),
        # A scale per channel is repeated over blocks of 32, the largest that divides 96.
        (PerChannel(), 8, True, 64 * (96 + 12)),
    ],
)
def test_matmul_nbits_fills_up_rows_and_repeats_scales(
    granularity: PerBlock | PerChannel, bits: int, symmetric: bool, expected: int
) -> None:
    spec = QuantSpec(bits=bits, symmetric=symmetric, granularity=granularity, scale_dtype="float32")
    form = _size(WeightForm.MATMUL_NBITS)
    # Nodes, names and an input scale, the same whatever the format.
    around = _size().site_bytes(BODY, spec) - spec.format_bytes(64, 96)
    assert form.site_bytes(BODY, spec) - around == expected


def test_copies_that_no_weight_is_are_counted_once(tmp_path: Path) -> None:
    """A table that lies there twice, and an lm_head that is tied to its embedding by equal bytes, which is none."""
    rng = np.random.default_rng(0)
    mask, table = rng.normal(size=(64, 128)).astype(np.float32), rng.normal(size=(64, 64)).astype(np.float32)
    graph = TinyGraph()
    graph.input("input_ids", TensorProto.INT64, [1, "t"])
    graph.node("Gather", [graph.constant("table", table), "input_ids"], ["h"])
    graph.linear("h", table, "y")
    for name in ("one", "two"):
        graph.node("Neg", [graph.constant(name, mask)], [f"less {name}"])
        graph.output(f"less {name}", TensorProto.FLOAT, [64, 128])
    graph.output("y", TensorProto.FLOAT, [1, "t", 64])
    directory = locate_model(graph.save(tmp_path))
    model = load_graph(directory)
    choice = FormatChoice(
        form=WeightForm.DQ,
        four_bit=PerBlock(block_size=32),
        eight_bit=PerChannel(),
        symmetric=True,
        scale_range="full",
        gather_form="dq",
        gather_block_size=32,
        accuracy_level=None,
    )
    assert output_size(directory, model, choice, (), ()).copied_bytes == mask.nbytes


def test_bits_a_weight_count_scales_as_the_file_holds_them() -> None:
    """Of 20 scales a row, a byte each and one float32 step in place of float16: 16 bytes less."""
    wide = site("wide", 1000, 640)
    spec = QuantSpec(bits=4, symmetric=False, granularity=PerBlock(block_size=32), scale_dtype="float16")
    plan = plan_of([ActivationGroup(activation="x", in_features=640, sites=(wide,), absorber=None)], {"wide": spec}, {})
    floats, in_bytes = (replace(_size(), byte_scales=each).bits_per_weight(plan) for each in (False, True))
    assert floats == 4 + 20 / 32
    assert floats - in_bytes == pytest.approx(8 * 16 / 640, rel=0.05)
