"""Verification notices what would spoil a model, and reports what is only slow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import export.verify
from export.rewrite import RewriteResult, rewrite
from export.save import save_model
from export.verify import VerifyReport, verify
from stages.errors import GraphError
from stages.records import PerBlock, QuantSpec, WeightForm
from tests.export.builders import spec_of
from tests.export.exports import TinyExport, quiet, tiny_export


def saved(
    folder: Path, *, spec: QuantSpec | None = None, form: WeightForm = WeightForm.DQ
) -> tuple[TinyExport, RewriteResult, Path]:
    tiny = tiny_export(folder, spec=spec, form=form)
    result = rewrite(ir.load(tiny.base.onnx_file), tiny.store)
    tiny.output.mkdir()
    save_model(result.model, tiny.output, "model.onnx", quiet())
    return tiny, result, tiny.output / "model.onnx"


def check(parts: tuple[TinyExport, RewriteResult, Path], level: str = "full") -> VerifyReport:
    tiny, result, path = parts
    return verify(path, result.sites, tiny.base, level, quiet())


def flip(path: Path, tensor: str, byte: int = 0) -> None:
    """Flip the lowest bit of one byte of a saved tensor."""
    value = ir.load(path).graph.initializers[tensor].const_value
    assert isinstance(value, ir.ExternalTensor)
    data = path.with_name("model.onnx.data")
    content = bytearray(data.read_bytes())
    content[(value.offset or 0) + byte] ^= 1
    data.write_bytes(content)


@pytest.mark.parametrize("part", ["codes", "scales", "zero_points"])
@pytest.mark.parametrize("site", ["up", "down"])
def test_one_wrong_bit_is_noticed(tmp_path: Path, part: str, site: str) -> None:
    parts = saved(tmp_path, spec=spec_of(8, symmetric=False))
    check(parts, "quick")
    flip(parts[2], f"{site}/MatMul/{part}", byte=17)
    with pytest.raises(GraphError, match=f"'{site}/MatMul/{part}' differs"):
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
        verify(path, without, tiny.base, "quick", quiet())


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


def test_quick_leaves_the_products_out(tmp_path: Path) -> None:
    report = check(saved(tmp_path), "quick")
    assert report.fused == 2
    assert report.worst_exact is None


def test_a_runtime_that_computes_something_else_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = saved(tmp_path)
    measure = export.verify.measure_site

    def off(*arguments: object) -> object:
        return replace(measure(*arguments), exact=float("nan"))

    monkeypatch.setattr(export.verify, "measure_site", off)
    with pytest.raises(GraphError, match="away from its own numbers"):
        check(parts)


def test_a_model_that_the_runtime_refuses_fails(tmp_path: Path) -> None:
    tiny, result, path = saved(tmp_path)
    model = ir.load(path)
    node = next(node for node in model.graph if node.op_type == "Sigmoid")
    node.op_type = "NoSuchOperator"
    ir.save(model, path)
    with pytest.raises(GraphError, match="NoSuchOperator"):
        verify(path, result.sites, tiny.base, "quick", quiet())


def test_bfloat16_is_checked_but_not_run(tmp_path: Path) -> None:
    import ml_dtypes
    import torch

    from stages.records import QuantizedWeight
    from tests.export.builders import ExactWeight, group_of, site_of, store_of
    from tests.graphs import TinyGraph

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
    graph.input("x", 16, ["t", 64])
    graph.output("y", 16, ["t", 96])
    graph.linear("x", weight.matrix, "y")
    model = graph.model()
    bfloat16 = ir.tensor(weight.matrix.astype(ml_dtypes.bfloat16), name="y.weight")
    model.graph.initializers["y.weight"].const_value = bfloat16
    result = rewrite(model, store_of(tmp_path / "weights", [(group_of([weight]), [weight])]))
    save_model(result.model, tmp_path, "model.onnx", quiet())
    base = tiny_export(tmp_path / "other").base
    report = verify(tmp_path / "model.onnx", result.sites, base, "full", quiet())
    assert (report.fused, report.worst_exact) == (None, None)
    assert "bfloat16" in report.skipped[0]
    flip(tmp_path / "model.onnx", "y/MatMul/scales")
    with pytest.raises(GraphError, match="differs"):
        verify(tmp_path / "model.onnx", result.sites, base, "full", quiet())
