"""Quantized embedding tables made from random numbers, and a graph that only looks tokens up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from onnx import TensorProto

from stages.quantization.search.embedding import quantize_table
from stages.quantization.weights.bitpack import unpack
from stages.quantization.weights.store import QuantizedStore, create_or_resume_store
from stages.records.formats import EmbeddingPlan, EmbeddingTable, WeightForm
from stages.records.results import ExportRecipe, QuantizedTable
from tests.support.graphs import TinyGraph, onnx_type

FORMS = (
    ("gather_block_quantized", 0, 4),
    ("gather_block_quantized", 1, 4),
    ("gather_block_quantized", 1, 8),
    ("dq", 0, 8),
    ("dq", 1, 4),
)
"""Operator, axis and bits of tables that ONNX Runtime looks up; not INT8 of axis 0 by GatherBlockQuantized."""


def plan_of(vocabulary: int, hidden: int, *, dtype: str = "float32", **changes: object) -> EmbeddingPlan:
    """Return a plan for initializer "table", which Gather "h" reads: axis 1, blocks of 16, GatherBlockQuantized."""
    in_table = {key: changes.pop(key) for key in ("transposed", "gathers", "weight") if key in changes}
    fields: dict[str, object] = {"weight": "table", "gathers": ("h",), "transposed": False}
    table = EmbeddingTable(vocabulary=vocabulary, hidden=hidden, dtype=dtype, **(fields | in_table))
    options: dict[str, object] = {"axis": 1, "block_size": 16, "form": "gather_block_quantized"}
    return EmbeddingPlan(table=table, **(options | changes))


def random_table(plan: EmbeddingPlan, seed: int = 0) -> np.ndarray:
    numbers = np.random.default_rng(seed).standard_normal(plan.table.shape) / 8
    return numbers.astype(plan.table.dtype)


def rounded(plan: EmbeddingPlan, table: np.ndarray) -> QuantizedTable:
    return quantize_table(plan, lambda rows: torch.from_numpy(table[rows].astype(np.float32)))


def dequantized(plan: EmbeddingPlan, stored: QuantizedTable) -> np.ndarray:
    """Return code * scale in float64."""
    codes = unpack(stored.packed.numpy(), plan.table.shape, plan.bits).astype(np.float64)
    rows, columns = plan.table.shape
    scales = stored.scales.double().numpy()
    return codes * np.repeat(scales, plan.block_size, axis=plan.axis)[:rows, :columns]


def table_store(folder: Path, plan: EmbeddingPlan, stored: QuantizedTable) -> QuantizedStore:
    """Return a finished store that holds only one table."""
    recipe = ExportRecipe(
        model_fingerprint="tiny",
        weight_form=WeightForm.DQ,
        fold_input_scales=True,
        groups=(),
        kept=(),
        search="test",
        summary="test",
        embeddings=(plan,),
    )
    store = create_or_resume_store(folder, recipe, overwrite=False)
    store.table_file(0).write(stored)
    return store


def lookup_graph(plan: EmbeddingPlan, table: np.ndarray) -> TinyGraph:
    """Return a graph with input_ids -> Gather -> h for every Gather of the plan."""
    graph = TinyGraph()
    graph.input("input_ids", TensorProto.INT64, ["batch", "length"])
    data = graph.constant("table", np.ascontiguousarray(table.T) if plan.table.transposed else table)
    if plan.table.transposed:
        data = graph.node("Transpose", [data], ["swapped"], {"perm": [1, 0]})
    for output in plan.table.gathers:
        graph.node("Gather", [data, "input_ids"], [output])
        graph.output(output, onnx_type(table.dtype), ["batch", "length", plan.table.hidden])
    return graph
