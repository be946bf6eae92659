"""Which tensors of a model lie outside its .onnx file."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Every initializer that lies in an external data file, subgraphs included, in the graph's order."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
