"""Hand-made sites, weights whose numbers are known exactly, stores of them, and ONNX Runtime to run the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from export.rewrite import RewriteResult, rewrite
from stages.quantization.weights.store import QuantizedStore, create_or_resume_store
from stages.records.formats import Granularity, PerBlock, QuantSpec, WeightForm
from stages.records.results import ExportRecipe, QuantizedWeight, SolvedGroup
from stages.records.sites import ActivationGroup, MatMulSite, WeightLayout
from tests.reference.dequantize import dequantize
from tests.support.graphs import TinyGraph, onnx_type

TOLERANCE = 1e-5


def spec_of(
    bits: int = 8,
    *,
    symmetric: bool = True,
    granularity: Granularity | None = None,
    scale_dtype: str = "float32",
) -> QuantSpec:
    return QuantSpec(
        bits=bits,
        symmetric=symmetric,
        granularity=granularity or PerBlock(block_size=16),
        scale_dtype=scale_dtype,
    )


def site_of(output: str, activation: str, in_features: int, out_features: int, **changes: object) -> MatMulSite:
    """Return the site that TinyGraph.linear makes: node "<output>/MatMul", weight "<output>.weight"."""
    fields: dict[str, object] = {
        "name": f"{output}/MatMul",
        "op_type": "MatMul",
        "weight": f"{output}.weight",
        "activation": activation,
        "output": output,
        "in_features": in_features,
        "out_features": out_features,
        "layout": WeightLayout.K_BY_N,
        "dtype": "float32",
    }
    return MatMulSite(**(fields | changes))


@dataclass(frozen=True, kw_only=True)
class ExactWeight:
    """Stored numbers, and the floating-point weight [K, N] that they stand for: dequantized and without input scale."""

    stored: QuantizedWeight
    matrix: np.ndarray


def exact_weight(
    site: MatMulSite, spec: QuantSpec, rng: np.random.Generator, input_scale: np.ndarray | None = None
) -> ExactWeight:
    shape = (site.out_features, spec.num_blocks(site.in_features))
    codes = rng.integers(spec.code_min, spec.code_max + 1, (site.out_features, site.in_features))
    scale_type = {"float32": np.float32, "float16": np.float16}[spec.scale_dtype]
    scales = (rng.uniform(0.5, 1.5, shape) / 2 ** (spec.bits - 1)).astype(scale_type)
    zero_points = None if spec.symmetric else rng.integers(0, spec.code_max + 1, shape).astype(np.uint8)
    matrix = dequantize(codes, scales, zero_points, spec.block_size(site.in_features))
    if input_scale is not None:
        matrix = matrix / input_scale  # as it was before the search multiplied it
    info = np.finfo(scale_type)
    matrix = matrix.clip(info.min, info.max)
    stored = QuantizedWeight(
        site=site,
        spec=spec,
        codes=torch.from_numpy(codes).to(spec.code_dtype),
        scales=torch.from_numpy(scales),
        zero_points=None if zero_points is None else torch.from_numpy(zero_points),
        input_scale=None if input_scale is None else torch.from_numpy(input_scale.astype(np.float32)),
    )
    return ExactWeight(stored=stored, matrix=matrix.T.astype(scale_type))


def group_of(weights: Sequence[ExactWeight], **changes: object) -> ActivationGroup:
    """Return the group of these weights' sites; ``absorber`` and ``unfoldable_because`` may be given."""
    sites = tuple(weight.stored.site for weight in weights)
    fields: dict[str, object] = {
        "activation": sites[0].activation,
        "in_features": sites[0].in_features,
        "sites": sites,
        "absorber": None,
        "unfoldable_because": "it was made so by the test",
    }
    return ActivationGroup(**(fields | changes))


def store_of(
    folder: Path,
    groups: Sequence[tuple[ActivationGroup, Sequence[ExactWeight]]],
    *,
    form: WeightForm = WeightForm.DQ,
    fold: bool = True,
    fingerprint: str = "tiny",
) -> QuantizedStore:
    """Write a finished store into ``folder``."""
    recipe = ExportRecipe(
        model_fingerprint=fingerprint,
        weight_form=form,
        fold_input_scales=fold,
        groups=tuple(group for group, _ in groups),
        kept=(),
        search="test",
        summary="test",
    )
    store = create_or_resume_store(folder, recipe, overwrite=False)
    for index, (group, weights) in enumerate(groups):
        solved = SolvedGroup(group=group, weights=tuple(weight.stored for weight in weights), reports=())
        store.write(index, solved)
    return store


def store_of_each(folder: Path, *weights: ExactWeight, form: WeightForm = WeightForm.DQ) -> QuantizedStore:
    """Return a finished store in which each weight is a group of its own that nothing absorbs."""
    return store_of(folder, [(group_of([weight]), [weight]) for weight in weights], form=form)


def check_rewrite(
    model: ir.Model, store: QuantizedStore, feeds: dict[str, np.ndarray], *, ignored: Sequence[str] = ()
) -> RewriteResult:
    """Rewrite, require that every output stays as it was, and return the result.

    The stores of these tests hold numbers that stand for the base's weights exactly: before and after may differ by
    float32 rounding in sums of at most 96 products, and by that of dividing by a scale and multiplying with it again.

    Args:
        model: The base, which must hold the matrices of the store's exact weights.
        store: What is written in place of them.
        feeds: Inputs of both models.
        ignored: Outputs that may change: caches of scaled values.
    """
    result = rewrite(model, store)
    for output, before, after in zip(model.graph.outputs, run(model, feeds), run(result.model, feeds), strict=True):
        if output.name not in ignored:
            assert relative_difference(after, before) < TOLERANCE, output.name
    return result


def input_scale(rng: np.random.Generator, in_features: int) -> np.ndarray:
    """Draw positive numbers around 1, as AWQ's are."""
    return np.exp(0.5 * rng.standard_normal(in_features)).astype(np.float32)


def run(
    model: ir.Model, feeds: dict[str, np.ndarray], *, optimize: bool = True, optimized_file: Path | None = None
) -> list[np.ndarray]:
    """Return all outputs at accuracy level 1: float32 products, so that the numbers can be compared."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized_file is not None:
        options.optimized_model_filepath = str(optimized_file)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def relative_difference(found: np.ndarray, expected: np.ndarray) -> float:
    expected = expected.astype(np.float64)
    return float(np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max())


def quantized_matmul(
    folder: Path,
    shape: tuple[int, int],
    bits: int,
    symmetric: bool,
    blocks: Granularity,
    dtype: str,
    form: WeightForm,
    *,
    scale_dtype: str = "",
) -> tuple[ir.Model, np.ndarray, np.ndarray]:
    """Return a model of one quantized MatMul, an input for it, and the float64 output."""
    rng = np.random.default_rng(0)
    site = site_of("y", "x", *shape, dtype=dtype)
    spec = spec_of(bits, symmetric=symmetric, granularity=blocks, scale_dtype=scale_dtype or dtype)
    weight = exact_weight(site, spec, rng)
    graph = TinyGraph()
    graph.input("x", onnx_type(dtype), ["t", shape[0]])
    graph.output("y", onnx_type(dtype), ["t", shape[1]])
    graph.linear("x", weight.matrix, "y")
    store = store_of_each(folder / "weights", weight, form=form)
    x = rng.standard_normal((8, shape[0])).astype(dtype)
    stored = weight.stored
    zero_points = None if stored.zero_points is None else stored.zero_points.numpy()
    rows = dequantize(stored.codes.numpy(), stored.scales.numpy(), zero_points, spec.block_size(shape[0]))
    return rewrite(graph.model(), store).model, x, x.astype(np.float64) @ rows.T
