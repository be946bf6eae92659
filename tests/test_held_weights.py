"""Bytes that a weight takes while a graph runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from stages.base_graph import load_graph
from stages.graph.sites import find_groups
from stages.held_weights import held_bytes
from stages.model_directory import locate_model
from stages.pieces import cut_into_pieces
from stages.session import CPU, CPU_ONLY, CUDA

GPU = (CUDA, CPU)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_the_cpu_alone_holds_16_bit_weights_as_float32(dtype: type) -> None:
    weight = ir.tensor(np.zeros((3, 5), dtype))
    assert held_bytes(weight, CPU_ONLY) == 3 * 5 * 4
    assert held_bytes(weight, GPU) == 3 * 5 * 2


@pytest.mark.parametrize("providers", [CPU_ONLY, GPU])
def test_float32_and_codes_lie_as_they_are_stored(providers: tuple[str, ...]) -> None:
    assert held_bytes(ir.tensor(np.zeros((3, 5), np.float32)), providers) == 3 * 5 * 4
    assert held_bytes(ir.tensor(np.zeros((3, 5), np.int8)), providers) == 3 * 5


def test_a_float16_model_is_cut_finer_for_the_cpu(tiny_model_dml: Path) -> None:
    model = load_graph(locate_model(tiny_model_dml))
    wanted = [group.activation for group in find_groups(model)]
    whole = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    cpu, gpu = (
        list(cut_into_pieces(model, wanted=wanted, limit=whole, weight_bytes=partial(held_bytes, providers=providers)))
        for providers in (CPU_ONLY, GPU)
    )
    assert len(gpu) == 1
    assert len(cpu) > 1
