"""QMoE with stored codes gives what MoE with the dequantized weights gives, expert by expert and mixed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from export.forms.dequantize_linear import dequantized
from export.forms.matmul_nbits import implied_zero_point
from export.forms.qmoe import packed_rows, unpacked_rows
from export.rewrite import rewrite
from stages.quantization.weights.store import QuantizedStore
from stages.records.formats import Granularity, PerBlock, PerChannel, QuantSpec
from tests.support.mixtures import EXPERTS, HIDDEN, KINDS, mixture, rounded_store, run_mixture, the_layer
from tests.support.pairwise import pairwise


def with_stored_numbers(model: ir.Model, kind: str, store: QuantizedStore) -> ir.Model:
    """The MoE node in float32 with the weights that the codes mean: the CPU's float16 one knows no softmax over all."""
    changed = mixture(KINDS[kind]).model()
    for name, value in changed.graph.initializers.items():
        stored = model.graph.initializers[name].const_value
        assert stored is not None
        value.const_value = ir.tensor(stored.numpy().astype(np.float32), name=name)
    for index, group in enumerate(the_layer(model).groups):
        (site,) = group.sites
        value = changed.graph.initializers[site.weight]
        assert value.const_value is not None
        assert site.expert is not None
        table = value.const_value.numpy().copy()
        table[site.expert.index] = dequantized(store.read(index, site), None).numpy()
        value.const_value = ir.tensor(table, name=site.weight)
    return changed


def spec(bits: int, granularity: Granularity, dtype: str, *, zero_points: bool) -> QuantSpec:
    return QuantSpec(
        bits=4 if bits == 4 else 8,
        symmetric=not zero_points,
        granularity=granularity,
        scale_dtype="float16" if dtype == "float16" else "float32",
    )


@pytest.mark.parametrize(
    ("kind", "bits", "block", "zero_points", "dtype"),
    pairwise(list(KINDS), [4, 8], [16, 0], [False, True], ["float32", "float16"]),
)
def test_qmoe_gives_what_the_stored_numbers_give(
    kind: str, bits: int, block: int, zero_points: bool, dtype: str, tmp_path: Path
) -> None:
    model = mixture(KINDS[kind], np.float16 if dtype == "float16" else np.float32).model()
    granularity = PerBlock(block_size=block) if block else PerChannel()
    store = rounded_store(tmp_path / "weights", model, spec(bits, granularity, dtype, zero_points=zero_points))
    written = rewrite(model, store, 1).model
    assert [node.op_type for node in written.graph if node.domain] == ["QMoE"]
    assert not {"gate_up.weight", "down.weight"} & set(written.graph.initializers)
    rng = np.random.default_rng(7)
    x = rng.standard_normal((30, HIDDEN)).astype(dtype)
    scores = rng.standard_normal((30, EXPERTS)).astype(dtype)
    scores[:EXPERTS] = 100 * np.eye(EXPERTS)
    wanted = run_mixture(with_stored_numbers(model, kind, store), x.astype(np.float32), scores.astype(np.float32))
    found = run_mixture(written, x, scores).astype(np.float64)
    # 8-bit blocks have no kernel but with int8 activations.
    tolerance = 0.03 if bits == 8 and block else {"float32": 2e-6, "float16": 4e-3}[dtype]
    assert np.abs(found - wanted).max() < tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("small", ["gate_up.weight", "down.weight"])
def test_scales_are_wide_in_the_whole_node_where_one_experts_numbers_are_too_small(small: str, tmp_path: Path) -> None:
    model = mixture().model()
    table = model.graph.initializers[small].const_value
    assert table is not None
    numbers = table.numpy().copy()
    numbers[1] *= 1e-4
    model.graph.initializers[small].const_value = ir.tensor(numbers, name=small)
    narrow = spec(4, PerBlock(block_size=16), "float16", zero_points=True)
    store = rounded_store(tmp_path / "weights", model, narrow)
    kinds = [store.spec(index, group.sites[0]).scale_dtype for index, group in enumerate(store.recipe.groups)]
    assert sorted(kinds) == ["float16"] * (2 * EXPERTS - 1) + ["float32"]
    written = rewrite(model, store, 1).model
    scales = [value for name, value in written.graph.initializers.items() if name.endswith("/scales")]
    assert [value.dtype for value in scales] == [ir.DataType.FLOAT] * 2
    x, scores = np.ones((EXPERTS, HIDDEN), np.float32), 100 * np.eye(EXPERTS, dtype=np.float32)
    wanted = run_mixture(with_stored_numbers(model, "gpt-oss", store), x, scores)
    assert np.abs(run_mixture(written, x, scores) - wanted).max() < 2e-6 * np.abs(wanted).max()


def test_the_level_is_written_where_the_release_takes_one(tmp_path: Path) -> None:
    model = mixture().model()
    four_bit = spec(4, PerBlock(block_size=16), "float32", zero_points=True)
    for takes_level, asked, wanted in ((True, None, 4), (True, 1, 1), (False, 1, None)):
        store = rounded_store(tmp_path / f"{takes_level}{asked}", model, four_bit, takes_level=takes_level)
        (node,) = rewrite(model, store, asked).model.graph
        found = node.attributes.get("accuracy_level")
        assert (None if found is None else found.as_int()) == wanted


def test_codes_are_called_raw_where_the_target_would_take_them_for_packed(tmp_path: Path) -> None:
    model = mixture(KINDS["gpt-oss"], np.float16).model()
    four_bit = spec(4, PerBlock(block_size=16), "float16", zero_points=False)
    x, scores = np.ones((3, HIDDEN), np.float16), np.eye(3, EXPERTS, dtype=np.float16)
    outputs = []
    for raw in (False, True):
        store = rounded_store(tmp_path / f"{raw}", model, four_bit, says_raw=raw)
        written = rewrite(model, store, 1).model
        said = written.graph[-1].attributes.get("weights_prepacked")
        assert (None if said is None else said.as_int()) == (0 if raw else None)
        outputs.append(run_mixture(written, x, scores))
    assert np.array_equal(*outputs), "the CPU reads raw codes whatever the attribute says"


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_lie_as_in_what_the_builder_writes_raw_for_cuda_and_webgpu(bits: int) -> None:
    from onnxruntime_genai.models.quantization.cuda_quantizer import CudaQuantizer

    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    packed, scales = CudaQuantizer.matmulnbits_blockwise_quantize(weight, bits, 32)
    form = spec(bits, PerBlock(block_size=32), "float32", zero_points=False)
    codes = torch.from_numpy(unpacked_rows(packed.numpy(), 64, form)) - implied_zero_point(form)
    read = codes * scales.repeat_interleave(32, dim=1)
    assert float((read - weight).abs().max()) < float(scales.abs().max())
    assert np.array_equal(packed_rows((codes + implied_zero_point(form)).to(torch.uint8), form), packed.numpy())
