"""A saved expert that differs from its numbers, on disk or in the runtime, is noticed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

import export.verify.experts
from export.forms.qmoe import RewrittenExperts
from export.rewrite import rewrite
from export.save import read_initializer, save_model
from export.verify.experts import check_stored_experts, measure_experts
from stages.errors import GraphError
from stages.records.formats import PerBlock, QuantSpec
from tests.export.verify.test_verify import flip
from tests.support.mixtures import EXPERTS, KINDS, mixture, rounded_store

FOUR_BIT = QuantSpec(bits=4, symmetric=False, granularity=PerBlock(block_size=16), scale_dtype="float32")


def saved(
    folder: Path, spec: QuantSpec = FOUR_BIT, kind: str = "gpt-oss", dtype: type[np.floating] = np.float32
) -> tuple[Path, RewrittenExperts]:
    model = mixture(KINDS[kind], dtype).model()
    result = rewrite(model, rounded_store(folder / "weights", model, spec))
    save_model(result.model, folder, "model.onnx")
    return folder / "model.onnx", result.experts[0]


def the_node(path: Path) -> ir.Node:
    return next(node for node in ir.load(path).graph if node.op_type == "QMoE")


@pytest.mark.parametrize("kind", ["gpt-oss", "relu over all"])
def test_good_experts_pass_and_their_error_is_rounding(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, experts = saved(tmp_path, kind=kind)
    check_stored_experts(the_node(path), experts)
    read = Counter[str]()

    def counted(node: ir.Node, name: str) -> np.ndarray:
        read[name] += 1
        return read_initializer(node, name)

    monkeypatch.setattr(export.verify.experts, "read_initializer", counted)
    error = measure_experts(tmp_path, the_node(path), experts)
    assert set(read.values()) == {1}
    assert error.experts == EXPERTS
    assert 0 < error.error < 2e-6


def test_experts_in_bfloat16_are_checked_as_float32(tmp_path: Path) -> None:
    sixteen = QuantSpec(bits=4, symmetric=True, granularity=PerBlock(block_size=16), scale_dtype="bfloat16")
    path, experts = saved(tmp_path, sixteen, dtype=ml_dtypes.bfloat16)
    check_stored_experts(the_node(path), experts)
    assert 0 < measure_experts(tmp_path, the_node(path), experts).error < 2e-6


@pytest.mark.parametrize("part", ["codes", "scales", "zero_points"])
def test_one_wrong_bit_is_noticed(tmp_path: Path, part: str) -> None:
    path, experts = saved(tmp_path)
    flip(path, f"down.weight/{part}", byte=40)
    with pytest.raises(GraphError, match=f"'down.weight/{part.replace(part, 'codes')}' differs"):
        check_stored_experts(the_node(path), experts)


def test_scales_that_lost_their_sign_are_noticed(tmp_path: Path) -> None:
    symmetric = QuantSpec(bits=4, symmetric=True, granularity=PerBlock(block_size=16), scale_dtype="float32")
    path, experts = saved(tmp_path, symmetric)
    node = the_node(path)
    assert node.graph is not None
    scales = node.inputs[6]
    assert scales is not None
    assert scales.const_value is not None
    numbers = scales.const_value.numpy().copy()
    numbers[3] *= -1
    scales.const_value = ir.tensor(numbers, name=scales.name)
    with pytest.raises(GraphError, match=r"y/experts\.3/down_proj"):
        check_stored_experts(node, experts)


def test_a_node_that_means_something_else_is_noticed(tmp_path: Path) -> None:
    path, experts = saved(tmp_path)
    node = the_node(path)
    node.attributes["activation_beta"] = ir.AttrFloat32("activation_beta", 0.5)
    with pytest.raises(GraphError, match=r"Expert \d of 'y/MoE' gives outputs"):
        measure_experts(tmp_path, node, experts)


def test_a_moe_node_that_stayed_is_noticed(tmp_path: Path) -> None:
    path, experts = saved(tmp_path)
    node = the_node(path)
    node.op_type = "MoE"
    with pytest.raises(GraphError, match="saved as MoE, not as QMoE"):
        check_stored_experts(node, experts)
