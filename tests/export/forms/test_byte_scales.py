"""Scales that are bytes: nodes give them again when the model is loaded, and the product is fused as before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto

from export.rewrite import RewriteResult, rewrite
from export.verify.sites import check_site
from stages.errors import GraphError
from stages.inspect.quantized_weights import find_quantized
from stages.quantization.weights.byte_scales import in_bytes, saved_bytes
from stages.records.formats import EmbeddingPlan, EmbeddingTable, PerBlock, WeightForm
from tests.export.builders import exact_weight, relative_difference, run, site_of, spec_of, store_of_each
from tests.reference.dequantize import dequantize
from tests.support.graphs import TinyGraph, onnx_type

K, N = 328, 96
SITE = site_of("y", "x", K, N)
SPEC = spec_of(4, symmetric=False, granularity=PerBlock(block_size=16), scale_dtype="float16")


def rewritten(folder: Path, form: WeightForm, *, byte_scales: bool = True) -> tuple[RewriteResult, np.ndarray]:
    """Return the rewritten MatMul, and the weight [N, K] that it should have."""
    weight = exact_weight(SITE, SPEC, np.random.default_rng(0))
    graph = TinyGraph()
    graph.input("x", onnx_type(np.dtype(np.float32)), ["t", K])
    graph.output("y", onnx_type(np.dtype(np.float32)), ["t", N])
    graph.linear("x", weight.matrix.astype(np.float32), "y")
    store = store_of_each(folder / "weights", weight, form=form)
    store = replace(store, recipe=replace(store.recipe, byte_scales=byte_scales))
    stored = weight.stored
    assert stored.zero_points is not None
    scales = in_bytes(stored.scales).scales.numpy() if byte_scales else stored.scales.float().numpy()
    matrix = dequantize(stored.codes.numpy(), scales, stored.zero_points.numpy(), 16)
    return rewrite(graph.model(), store), matrix


@pytest.mark.parametrize("form", [WeightForm.DQ, WeightForm.MATMUL_NBITS])
def test_the_product_is_that_of_the_rounded_scales_and_is_fused(tmp_path: Path, form: WeightForm) -> None:
    result, matrix = rewritten(tmp_path, form)
    x = np.random.default_rng(1).standard_normal((8, K)).astype(np.float32)
    (found,) = run(result.model, {"x": x}, optimized_file=tmp_path / "optimized.onnx")
    assert relative_difference(found, x.astype(np.float64) @ matrix.T) < 1e-5
    assert [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node] == ["MatMulNBits"]
    assert result.model.graph.initializers["y/MatMul/scales"].dtype is ir.DataType.UINT8


@pytest.mark.parametrize("form", [WeightForm.DQ, WeightForm.MATMUL_NBITS])
def test_what_is_saved_is_checked_and_explained(tmp_path: Path, form: WeightForm) -> None:
    result, _ = rewritten(tmp_path, form)
    ir.save(result.model, tmp_path / "model.onnx", external_data="model.onnx.data")
    model = ir.load(tmp_path / "model.onnx")
    (site,), node = result.sites, next(node for node in model.graph if node.outputs[0].name == "y")
    (error,) = check_site(tmp_path, node, site, (1,))
    assert error < 1e-5
    (stored,) = find_quantized(model).stored
    assert (stored.scales, stored.computed, stored.bits) == ("UINT8", "FLOAT", 4)
    steps = model.graph.initializers[str(site.steps)]
    assert steps.const_value is not None
    steps.const_value = ir.tensor(steps.const_value.numpy() * np.float32(1.01))
    with pytest.raises(GraphError, match=r"'y/MatMul/scales' differs"):
        check_site(tmp_path, node, site, ())


def test_the_forecast_is_what_the_bytes_save(tmp_path: Path) -> None:
    sizes = []
    for byte_scales in (False, True):
        result, _ = rewritten(tmp_path / str(byte_scales), WeightForm.DQ, byte_scales=byte_scales)
        sizes.append(len(ir.to_proto(result.model).SerializeToString()))
    assert saved_bytes(SITE, SPEC) <= sizes[0] - sizes[1] < saved_bytes(SITE, SPEC) + 400


def test_lookups_that_share_them_read_the_same_rows(tmp_path: Path) -> None:
    """The table is lm_head's weight: both read one set of codes, multiples and steps."""
    hidden, vocabulary = 320, 96
    site = site_of("logits", "h", hidden, vocabulary)
    weight = exact_weight(site, SPEC, np.random.default_rng(0))
    numbers = weight.matrix.astype(np.float32)
    graph = TinyGraph()
    graph.input("input_ids", TensorProto.INT64, ["t"])
    graph.constant("logits.weight", numbers)
    graph.node("Transpose", ["logits.weight"], ["rows"], {"perm": [1, 0]})
    graph.node("Gather", ["rows", "input_ids"], ["h"])
    graph.node("MatMul", ["h", "logits.weight"], ["logits"])
    for name, width in (("h", hidden), ("logits", vocabulary)):
        graph.output(name, TensorProto.FLOAT, ["t", width])
    table = EmbeddingTable(
        weight="logits.weight",
        gathers=("h",),
        vocabulary=vocabulary,
        hidden=hidden,
        transposed=True,
        dtype="float32",
    )
    plan = EmbeddingPlan(
        table=table,
        axis=1,
        block_size=16,
        form="gather_block_quantized",
        bits=4,
        symmetric=False,
        scale_dtype="float16",
        shared_with="logits/MatMul",
    )
    store = store_of_each(tmp_path / "weights", weight)
    store = replace(store, recipe=replace(store.recipe, byte_scales=True, embeddings=(plan,)))
    result = rewrite(graph.model(), store)
    tokens = np.array([0, 95, 17])
    h, logits = run(result.model, {"input_ids": tokens})
    stored = weight.stored
    assert stored.zero_points is not None
    scales = in_bytes(stored.scales).scales.numpy()
    rows = dequantize(stored.codes.numpy(), scales, stored.zero_points.numpy(), 16)
    assert relative_difference(h, rows[tokens]) < 1e-6
    assert relative_difference(logits, rows[tokens] @ rows.T) < 1e-2  # at the level that ships
    assert torch.equal(torch.from_numpy(h), torch.from_numpy(rows[tokens].astype(np.float32)))
