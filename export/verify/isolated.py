"""Cut one node out of a saved graph, with all that makes its weight, as a model that runs by itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
from jaxtyping import Float, Float64

from stages.runtime.cpu.runnable import runnable_graph
from stages.runtime.providers import CPU_ONLY
from stages.runtime.session import SessionSettings, open_session

_IR_VERSION = 10
_OPSET = 21
"""The operators here are the same in later ones, which the installed ONNX Runtime may not know."""


@dataclass(frozen=True, slots=True)
class IsolatedModel:
    """A model in the making; its initializers still point into the saved data file."""

    _values: dict[str, ir.Value] = field(default_factory=dict)
    _nodes: list[ir.Node] = field(default_factory=list)

    def copy(self, value: ir.Value) -> ir.Value:
        """Copy a constant value and the nodes that make it; return the copy."""
        name = str(value.name)
        if name not in self._values:
            self._values[name] = copied = ir.Value(
                name=name, shape=value.shape, type=value.type, const_value=value.const_value
            )
            maker = value.producer()
            if maker is not None:
                inputs = [None if source is None else self.copy(source) for source in maker.inputs]
                attributes = list(maker.attributes.values())
                self._nodes.append(
                    ir.Node(maker.domain, maker.op_type, inputs, attributes, outputs=[copied], name=maker.name)
                )
        return self._values[name]

    def ending_in(self, last: ir.Node, x: ir.Value, graph: ir.Graph) -> ir.Model:
        """Return the model from ``x`` to the output of ``last``.

        Args:
            last: reads ``x`` and copied values.
            x: the model's input.
            graph: the saved graph, whose opsets it has, up to 21.
        """
        initializers = [value for value in self._values.values() if value.const_value is not None]
        isolated = ir.Graph(
            [x],
            last.outputs,
            nodes=[*self._nodes, last],
            initializers=initializers,
            opset_imports={domain: min(version, _OPSET) for domain, version in graph.opset_imports.items()},
            name="isolated",
        )
        return ir.Model(isolated, ir_version=_IR_VERSION)


def run_isolated(
    model: ir.Model, x: np.ndarray, folder: Path, accuracy_level: int | None = None, threads: int | None = None
) -> np.ndarray:
    """Return the output of an isolated model on the CPU, in float32 where it holds types without kernels there.

    Args:
        model: has one input, called "x".
        x: what it reads; floating-point numbers are converted where the model was.
        folder: holds the saved data file.
        accuracy_level: for MatMuls that are fused; None: the runtime's own.
        threads: that run it; None: as many as are granted.

    Raises:
        GraphError: ONNX Runtime refuses the model.
    """
    with runnable_graph(model, CPU_ONLY, folder) as graph:
        upcast = isinstance(graph, Path)
        if upcast and not np.issubdtype(x.dtype, np.integer):
            x = x.astype(np.float32)
        settings = SessionSettings(
            external_data_folder=None if upcast else folder, accuracy_level=accuracy_level, threads=threads
        )
        output: np.ndarray = open_session(graph, settings).run(None, {"x": x})[0]
        return output


def relative_error(found: Float[np.ndarray, "rows columns"], reference: Float64[np.ndarray, "rows columns"]) -> float:
    """Return the largest difference relative to the largest number of the reference."""
    size = float(np.abs(reference).max())
    return float(np.abs(found.astype(np.float64) - reference).max()) / (size or 1.0)
