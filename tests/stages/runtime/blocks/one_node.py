"""One node in both runtimes: ONNX Runtime's kernel, and the torch module that it becomes in a cut graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

from stages.runtime.blocks.converters.onnx2torch import import_onnx2torch
from stages.runtime.blocks.converters.register import register_converters
from stages.runtime.blocks.cut import domain_in_cut

MICROSOFT = "com.microsoft"
_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "int32": TensorProto.INT32}


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@dataclass(frozen=True)
class OneNode:
    """A node whose inputs are all graph inputs; None leaves one out.

    ``outputs`` are the names of the outputs that are compared; ``further`` those that ONNX Runtime insists on;
    ``left_out`` the inputs that a cut leaves out.
    """

    operator: str
    inputs: Mapping[str, np.ndarray | None]
    attributes: Mapping[str, float | int | str | list[int]] = field(default_factory=dict)
    domain: str = MICROSOFT
    opset: int = 21
    outputs: tuple[str, ...] = ("y",)
    further: tuple[str, ...] = ()
    left_out: frozenset[str] = frozenset()

    def run_onnxruntime(self) -> list[np.ndarray]:
        session = ort.InferenceSession(
            self._model(self.domain, frozenset(), self.further).SerializeToString(), providers=["CPUExecutionProvider"]
        )
        return session.run(list(self.outputs), self._given(frozenset()))

    def run_torch(self) -> list[torch.Tensor]:
        register_converters()
        node = ir.Node(self.domain, self.operator, [])
        module = import_onnx2torch().convert(self._model(domain_in_cut(node), self.left_out, ()))
        made = module(*(torch.from_numpy(array) for array in self._given(self.left_out).values()))
        return list(made) if len(self.outputs) > 1 else [made]

    def _given(self, left_out: frozenset[str]) -> dict[str, np.ndarray]:
        return {name: array for name, array in self.inputs.items() if array is not None and name not in left_out}

    def _model(self, domain: str, left_out: frozenset[str], further: tuple[str, ...]):
        given = self._given(left_out)
        names = [name if name in given else "" for name in self.inputs]
        while names and not names[-1]:
            names.pop()
        outputs = [*self.outputs, *further]
        node = helper.make_node(self.operator, names, outputs, domain=domain, **self.attributes)
        graph = helper.make_graph(
            [node],
            "one",
            [helper.make_tensor_value_info(n, _TYPES[str(a.dtype)], a.shape) for n, a in given.items()],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        )
        opsets = [helper.make_opsetid("", self.opset)]
        if domain not in ("", "ai.onnx"):
            opsets.append(helper.make_opsetid(domain, 1))
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def assert_same(node: OneNode) -> None:
    """Assert that both runtimes agree to float32's rounding.

    1e-5 of the largest value: dot products of at most some dozens of terms, each side summing in its own order and with
    its own exp and tanh, differ by some dozen units in the last place (6e-8 each).
    """
    for expected, found in zip(node.run_onnxruntime(), node.run_torch(), strict=True):
        assert found.shape == expected.shape
        assert np.abs(found.numpy() - expected).max() <= 1e-5 * np.abs(expected).max()
        assert np.abs(expected).max() > 0
