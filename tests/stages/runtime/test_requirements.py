"""Check that what a graph needs of ONNX Runtime is told by release, with both ways out and the whole reason."""

from __future__ import annotations

import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto

from stages.errors import GraphError
from stages.runtime.requirements import (
    InstalledRuntime,
    Operator,
    installed_runtime,
    lacks_of,
    require_runtime,
    too_old,
)
from stages.runtime.session import SessionSettings, open_session, runtime_reason
from tests.support.graphs import MICROSOFT, TinyGraph

OLD = InstalledRuntime(
    version="1.22.1",
    newest_opset=22,
    newest_ir_version=10,
    operators={"GroupQueryAttention": Operator(most_inputs=12, attributes=frozenset({"num_heads"}))},
)


def graph(op_type: str = "Identity", inputs: int = 1, **attributes: int) -> ir.Model:
    tiny = TinyGraph()
    names = [tiny.input(f"x{index}", TensorProto.FLOAT, ["n"]) for index in range(inputs)]
    tiny.node(op_type, names, ["y"], attributes, "" if op_type == "Identity" else MICROSOFT)
    tiny.output("y", TensorProto.FLOAT, ["n"])
    return tiny.model()


def version(opset: int = 21, ir_version: int = 10) -> ir.Model:
    model = graph()
    model.opset_imports[""], model.ir_version = opset, ir_version
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            version(opset=24),
            r"needs ONNX Runtime 1\.24 or later: .* 1\.22\.1 lacks opset 24; .* with opset 22 or lower",
        ),
        (version(ir_version=11), r"1\.23 or later: .* lacks IR version 11; .* with IR version 10 or lower"),
        (
            version(26, 13),
            r"1\.25 or later: .* lacks opset 26, IR version 13; .* opset 22 or lower and with IR version",
        ),
        (version(opset=40), r"needs a later ONNX Runtime: .* lacks opset 40"),
        (graph("GatedDeltaNet"), r"1\.30 or later: .* lacks the operator GatedDeltaNet; .* with an onnxruntime-genai"),
        (graph("NoSuchThing"), r"needs a later ONNX Runtime: .* lacks the operator NoSuchThing"),
        (graph("GroupQueryAttention", 16, num_heads=1), r"1\.28 or later: .* lacks GroupQueryAttention with 16 inputs"),
        (graph("GroupQueryAttention", qk_norm_epsilon=1), r"1\.28 or later: .* lacks the attribute qk_norm_epsilon of"),
    ],
)
def test_what_an_old_release_lacks(model: ir.Model, words: str) -> None:
    with pytest.raises(GraphError, match=words):
        raise GraphError(too_old(tuple(lacks_of(model, OLD)), OLD.version))


@pytest.mark.parametrize(
    "model", [version(opset=40), version(ir_version=40), graph("NoSuchThing"), graph("QuickGelu", later=1)]
)
def test_the_installed_release_is_asked_itself_and_its_reason_stands_whole(model: ir.Model) -> None:
    assert list(lacks_of(model, installed_runtime(model)))
    with pytest.raises(
        GraphError, match=rf"^m\.onnx needs a later ONNX Runtime: the installed {ort.__version__} lacks"
    ):
        require_runtime(model, "m.onnx")
    content = ir.to_proto(model).SerializeToString()
    with pytest.raises(Exception) as refused:  # noqa: PT011 onnxruntime raises classes without a common base
        ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    with pytest.raises(GraphError, match=r"upgrade it .* or build the base again") as told:
        open_session(content, SessionSettings())
    assert runtime_reason(refused.value) in str(told.value)
    assert runtime_reason(refused.value)[-60:] == " ".join(str(refused.value).split()).rstrip(".")[-60:]


def test_a_graph_that_opens_lacks_nothing() -> None:
    require_runtime(graph("QuickGelu"), "m.onnx")
