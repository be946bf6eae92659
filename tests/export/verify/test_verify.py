"""Verification notices what would spoil a model, and reports what is only slow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto

import export.verify.sites
import export.verify.while_written
from export.forms.dequantize_linear import RewrittenSite
from export.rewrite import RewriteResult, rewrite
from export.save import save_model
from export.verify.isolated import run_isolated
from export.verify.verify import verify
from export.verify.while_written import SiteChecks, VerifyLevel
from stages.errors import GraphError
from stages.model.directory import ModelDirectory
from stages.records.formats import PerBlock, PerChannel, QuantSpec, WeightForm
from stages.records.results import QuantizedWeight, VerifyReport
from tests.export.builders import ExactWeight, group_of, site_of, spec_of, store_of
from tests.export.exports import TinyExport, tiny_export
from tests.support.graphs import TinyGraph


def saved(
    folder: Path, *, spec: QuantSpec | None = None, form: WeightForm = WeightForm.DQ
) -> tuple[TinyExport, RewriteResult, Path]:
    tiny = tiny_export(folder, spec=spec, form=form)
    result = rewrite(ir.load(tiny.base.onnx_file), tiny.store)
    tiny.output.mkdir()
    save_model(result.model, tiny.output, "model.onnx")
    return tiny, result, tiny.output / "model.onnx"


def check(parts: tuple[TinyExport, RewriteResult, Path], level: VerifyLevel = "full") -> VerifyReport:
    tiny, result, path = parts
    return check_sites(path, result.sites, tiny, level)


def check_sites(
    path: Path, sites: tuple[RewrittenSite, ...], tiny: TinyExport, level: VerifyLevel = "quick"
) -> VerifyReport:
    with SiteChecks(path, sites, level) as checks:
        return verify(checks, tiny.base)


def flip(path: Path, tensor: str, byte: int = 0) -> None:
    """Flip the lowest bit of one byte of a saved tensor."""
    value = ir.load(path).graph.initializers[tensor].const_value
    if not isinstance(value, ir.ExternalTensor):
        flip_inside(path, tensor, byte)
        return
    data = path.with_name("model.onnx.data")
    content = bytearray(data.read_bytes())
    content[(value.offset or 0) + byte] ^= 1
    data.write_bytes(content)


def flip_inside(path: Path, tensor: str, byte: int) -> None:
    """Flip a bit of a tensor so small that it lies in the .onnx file."""
    model = onnx.load(path, load_external_data=False)
    stored = next(initializer for initializer in model.graph.initializer if initializer.name == tensor)
    content = bytearray(stored.raw_data)
    content[byte] ^= 1
    stored.raw_data = bytes(content)
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("part", ["codes", "scales", "zero_points"])
@pytest.mark.parametrize("site", ["up", "down"])
@pytest.mark.parametrize(
    ("form", "bits"), [(WeightForm.DQ, 8), (WeightForm.MATMUL_NBITS, 8), (WeightForm.MATMUL_NBITS, 4)]
)
def test_one_wrong_bit_is_noticed(tmp_path: Path, form: WeightForm, bits: int, part: str, site: str) -> None:
    parts = saved(tmp_path, spec=spec_of(bits, symmetric=False), form=form)
    check(parts, "quick")
    flip(parts[2], f"{site}/MatMul/{part}", byte=17)
    with pytest.raises(GraphError, match=f"'{site}/MatMul/{part}' differs"):
        check(parts, "quick")


@pytest.mark.parametrize("byte", [0, 200])
def test_one_wrong_bit_of_a_repeated_channel_scale_is_noticed(tmp_path: Path, byte: int) -> None:
    parts = saved(tmp_path, spec=spec_of(8, granularity=PerChannel()), form=WeightForm.MATMUL_NBITS)
    assert check(parts).fused == 2
    flip(parts[2], "down/MatMul/scales", byte)
    with pytest.raises(GraphError, match="'down/MatMul/scales' differs"):
        check(parts, "quick")


def test_one_wrong_bit_of_a_float_weight_is_noticed(tmp_path: Path) -> None:
    parts = saved(tmp_path, form=WeightForm.QDQ)
    check(parts, "quick")
    flip(parts[2], "up/MatMul/weight", byte=4001)
    with pytest.raises(GraphError, match="'up/MatMul/weight' differs"):
        check(parts, "quick")


def test_a_truncated_data_file_is_noticed(tmp_path: Path) -> None:
    parts = saved(tmp_path)
    data = parts[2].with_name("model.onnx.data")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(GraphError, match="not whole"):
        check(parts, "quick")


def test_bytes_of_no_tensor_are_noticed(tmp_path: Path) -> None:
    parts = saved(tmp_path)
    with parts[2].with_name("model.onnx.data").open("ab") as file:
        file.write(b"left over")
    with pytest.raises(GraphError, match="9 bytes behind"):
        check(parts, "quick")


def test_a_lost_row_divisor_is_noticed(tmp_path: Path) -> None:
    tiny, result, path = saved(tmp_path)
    without = tuple(replace(site, source=replace(site.source, row_divisor=None)) for site in result.sites)
    with pytest.raises(GraphError, match="'up/MatMul/scales' differs"):
        check_sites(path, without, tiny)


def test_a_block_size_that_is_not_fused_is_reported_and_still_right(tmp_path: Path) -> None:
    report = check(saved(tmp_path, spec=spec_of(4, granularity=PerBlock(block_size=8))))
    assert (report.sites, report.fused) == (2, 0)
    assert [unfused.site for unfused in report.unfused] == ["up/MatMul", "down/MatMul"]
    assert all("block size 8" in unfused.reason for unfused in report.unfused)
    assert report.worst_exact is not None
    assert report.worst_exact.exact < 1e-5


def test_the_default_level_is_measured_apart_and_is_coarser(tmp_path: Path) -> None:
    report = check(saved(tmp_path, spec=spec_of(4, granularity=PerBlock(block_size=32))))
    assert report.worst_exact is not None
    assert report.worst_default is not None
    # int8 activations lose about half a percent; float32 ones nothing.
    assert report.worst_exact.exact < 1e-5
    assert report.worst_default.default < 0.1


@pytest.mark.parametrize("form", list(WeightForm))
def test_float16_products_stay_within_their_rounding(tmp_path: Path, form: WeightForm) -> None:
    report = check(saved(tmp_path, spec=spec_of(4, scale_dtype="float16"), form=form))
    assert report.fused == (0 if form is WeightForm.DQ_COLUMN_MAJOR else 2)
    assert all("column-major" in unfused.reason for unfused in report.unfused)
    assert report.worst_exact is not None
    assert 0 < report.worst_exact.exact < 2e-3


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("form", [WeightForm.DQ, WeightForm.DQ_COLUMN_MAJOR, WeightForm.MATMUL_NBITS])
def test_products_in_parts_are_those_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: WeightForm, symmetric: bool
) -> None:
    parts = saved(tmp_path, spec=spec_of(8, symmetric=symmetric), form=form)
    whole = check(parts)
    monkeypatch.setattr(export.verify.sites, "_LARGEST_WIDENED", 1 << 10)
    assert check(parts) == whole
    monkeypatch.setattr(export.verify.sites, "run_isolated", wrongly_run)
    with pytest.raises(GraphError, match="away from its own numbers"):
        check(parts)


def wrongly_run(model: ir.Model, *arguments: Any) -> np.ndarray:
    found = run_isolated(model, *arguments)
    found[0, -1] *= 1.01
    return found


def test_quick_leaves_the_products_out(tmp_path: Path) -> None:
    report = check(saved(tmp_path), "quick")
    assert report.fused == 2
    assert report.worst_exact is None


def test_a_runtime_that_computes_something_else_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = saved(tmp_path)
    check_site = export.verify.while_written.check_site

    def off(*arguments: Any) -> tuple[float, ...]:
        return float("nan"), *check_site(*arguments)[1:]

    monkeypatch.setattr(export.verify.while_written, "check_site", off)
    with pytest.raises(GraphError, match="away from its own numbers"):
        check(parts)


def test_a_model_that_the_runtime_refuses_fails(tmp_path: Path) -> None:
    tiny, result, path = saved(tmp_path)
    model = ir.load(path)
    node = next(node for node in model.graph if node.op_type == "Sigmoid")
    node.op_type = "NoSuchOperator"
    ir.save(model, path)
    with pytest.raises(GraphError, match="NoSuchOperator"):
        check_sites(path, result.sites, tiny)


def bfloat16_export(folder: Path, form: WeightForm) -> tuple[TinyExport, RewriteResult, Path]:
    """input_ids -> embedding x -> quantized y, all bfloat16, as a file; ``base`` only says how to feed it."""
    rng = np.random.default_rng(0)
    spec = spec_of(4, scale_dtype="bfloat16")
    stored = QuantizedWeight(
        site=site_of("y", "x", 64, 96, dtype="bfloat16"),
        spec=spec,
        codes=torch.from_numpy(rng.integers(-8, 8, (96, 64)).astype(np.int8)),
        scales=torch.rand(96, 4).to(torch.bfloat16),
    )
    weight = ExactWeight(stored=stored, matrix=np.zeros((64, 96), np.float32))
    graph = TinyGraph()
    graph.input("input_ids", TensorProto.INT64, ["batch", "length"])
    graph.output("y", TensorProto.BFLOAT16, ["batch", "length", 96])
    table = graph.constant("table", rng.standard_normal((32, 64)).astype(np.float32))
    graph.linear(graph.node("Gather", [table, "input_ids"], ["x"]), weight.matrix, "y")
    model = graph.model()
    for name, matrix in {"y.weight": weight.matrix, "table": rng.standard_normal((32, 64))}.items():
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(matrix.astype(ml_dtypes.bfloat16), name=name)
        value.type = ir.TensorType(ir.DataType.BFLOAT16)
    store = store_of(folder / "weights", [(group_of([weight]), [weight])], form=form)
    result = rewrite(model, store)
    output = folder / "quantized"
    output.mkdir()
    save_model(result.model, output, "model.onnx")
    path = output / "model.onnx"
    base = ModelDirectory(folder=output, onnx_file=path, has_genai_config=False)
    return TinyExport(base=base, store=store, output=output), result, path


@pytest.mark.parametrize("form", list(WeightForm))
def test_bfloat16_runs_widened_and_only_the_operator_itself_counts_as_fused(tmp_path: Path, form: WeightForm) -> None:
    parts = bfloat16_export(tmp_path, form)
    report = check(parts)
    assert report.widened
    assert report.worst_exact is not None
    # Float32 arithmetic on bfloat16 numbers; only the float form rounds its weight to 9 bits and back.
    assert report.worst_exact.exact < (1e-2 if form is WeightForm.QDQ else 1e-5)
    assert report.fused == (1 if form is WeightForm.MATMUL_NBITS else 0)
    assert all("bfloat16" in unfused.reason for unfused in report.unfused)
    assert sorted(file.name for file in parts[2].parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    flip(parts[2], "y/MatMul/scales")
    with pytest.raises(GraphError, match="differs"):
        check(parts, "quick")
