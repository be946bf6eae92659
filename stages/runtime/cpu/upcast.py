"""Upcast a 16-bit graph to float32: the CPU provider has no bfloat16 kernels.

Every bfloat16 is a float32, so weights and constants keep their values; activations are rounded less than they would
be. Nothing is held in memory: upcast weights go tensor by tensor into a temporary file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir

from stages.runtime.providers import CPU_ONLY

_FILE = "model.onnx"
_TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype", "stash_type", "precision", "softmax_precision"})
"""Attributes whose number is an ONNX element type."""
_BFLOAT16 = frozenset({ir.DataType.BFLOAT16})
SIXTEEN_BIT = _BFLOAT16 | {ir.DataType.FLOAT16}
"""Types of 16 bits, every number of which is a float32."""
UPCAST_REASON = "as float32: the CPU has no bfloat16 kernels, and every bfloat16 is a float32"
"""What tables say of an upcast run."""


def must_upcast(model: ir.Model, providers: tuple[str, ...]) -> bool:
    """Return whether ``model`` holds bfloat16 and ``providers`` offer only the CPU to run it."""
    return providers == CPU_ONLY and any(value.dtype == ir.DataType.BFLOAT16 for value in _values(model))


def upcast_model(model: ir.Model, types: frozenset[ir.DataType] = _BFLOAT16) -> ir.Model:
    """Return a copy of ``model`` with float32 wherever it had one of ``types``; ``model`` is left as it was.

    Ensures: initializers are read and upcast only when they are written; inputs and outputs of the graph (key/value
    caches), constants, and the types that nodes such as Cast name change too.
    """
    upcast = model.clone()
    for value in _values(upcast):
        if value.dtype in types:
            value.type = ir.TensorType(ir.DataType.FLOAT)
            if value.const_value is not None:
                value.const_value = _lazily_upcast(value.const_value)
    for node in _nodes(upcast):
        for name, attribute in tuple(node.attributes.items()):
            node.attributes[name] = _upcast_attribute(attribute, types)
    return upcast


@contextmanager
def upcast_file(model: ir.Model, scratch: Path | None) -> Iterator[Path]:
    """Yield the upcast ``model`` as a file in a temporary folder in ``scratch`` (None: the system's)."""
    if scratch is not None:
        with suppress(FileExistsError):  # perhaps made by another machine, and not to be seen here yet
            scratch.mkdir(parents=True)
    with TemporaryDirectory(prefix="upcast-", dir=scratch, ignore_cleanup_errors=True) as folder:
        path = Path(folder, _FILE)
        ir.save(upcast_model(model), path, external_data=f"{_FILE}.data")
        yield path


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.inputs
        yield from graph.initializers.values()
    for node in _nodes(model):
        yield from node.outputs


def _lazily_upcast(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    return ir.LazyTensor(
        lambda: _float32(tensor), dtype=ir.DataType.FLOAT, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name
    )


def _float32(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    values = tensor.numpy().astype(np.float32)
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return ir.Tensor(values, name=tensor.name)


def _upcast_attribute(attribute: ir.Attr, types: frozenset[ir.DataType]) -> ir.Attr:
    if attribute.is_ref():
        return attribute
    if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in types:
        return ir.AttrTensor(attribute.name, _float32(attribute.as_tensor()))
    named_type = attribute.name in _TYPE_ATTRIBUTES and attribute.type == ir.AttributeType.INT
    if named_type and attribute.as_int() in types:
        return ir.AttrInt64(attribute.name, int(ir.DataType.FLOAT))
    return attribute


def resident_bytes(weight: ir.TensorProtocol, providers: tuple[str, ...]) -> int:
    """Return the most bytes that ``weight`` takes in memory under ``providers``.

    The CPU provider multiplies in float32: it keeps 16-bit weights as float32 copies (measured with ONNX Runtime 1.31:
    5.2 GB for 2.6 GB of float16; an embedding that is only looked up stays as it is). Others lie as they are stored.
    """
    return weight.nbytes * (2 if providers == CPU_ONLY and weight.dtype in SIXTEEN_BIT else 1)
