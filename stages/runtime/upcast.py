"""A narrow floating-point graph as a float32 one: bfloat16 for the CPU provider, which has no kernels for it.

Every bfloat16 is a float32, so weights and constants stay exactly what they are; activations are rounded less than they
would be. Nothing is held in memory: widened weights go tensor by tensor into a temporary file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir

from stages.runtime.providers import CPU_ONLY

_WIDENED = "model.onnx"


_TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype", "stash_type", "precision", "softmax_precision"})
"""Attributes whose number is an ONNX element type."""


_BFLOAT16 = frozenset({ir.DataType.BFLOAT16})


SIXTEEN_BIT = _BFLOAT16 | {ir.DataType.FLOAT16}
"""Types of 16 bits, every number of which is a float32."""


WIDENED_BECAUSE = "as float32: the CPU has no bfloat16 kernels, and every bfloat16 is a float32"
"""What tables say of a widened run."""


def must_upcast(model: ir.Model, providers: tuple[str, ...]) -> bool:
    """Whether ``model`` holds bfloat16 and only the CPU is there to run it."""
    return providers == CPU_ONLY and any(value.dtype == ir.DataType.BFLOAT16 for value in _values(model))


def widened(model: ir.Model, narrow: frozenset[ir.DataType] = _BFLOAT16) -> ir.Model:
    """A copy of ``model`` with float32 wherever it had a type of ``narrow``; ``model`` is left as it was.

    Ensures: initializers are read and widened when they are written, inputs and outputs of the graph (key/value caches)
    change their type too, and so do constants and the types that Cast and its like name.
    """
    wide = model.clone()
    for value in _values(wide):
        if value.dtype in narrow:
            value.type = ir.TensorType(ir.DataType.FLOAT)
            if value.const_value is not None:
                value.const_value = _lazily_upcast(value.const_value)
    for node in _nodes(wide):
        for name, attribute in tuple(node.attributes.items()):
            node.attributes[name] = _widened_attribute(attribute, narrow)
    return wide


def save_upcast(model: ir.Model, folder: Path) -> Path:
    """Write the widened ``model`` and all its weights into ``folder``, one tensor in memory at a time."""
    path = folder / _WIDENED
    ir.save(widened(model), path, external_data=f"{_WIDENED}.data")
    return path


@contextmanager
def widened_file(model: ir.Model, scratch: Path | None) -> Iterator[Path]:
    """The widened ``model`` as a file in a folder of its own in ``scratch`` (None: the system's), gone afterwards."""
    if scratch is not None:
        scratch.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="widened-", dir=scratch, ignore_cleanup_errors=True) as folder:
        yield save_upcast(model, Path(folder))


@contextmanager
def runnable_file(onnx_file: Path, providers: tuple[str, ...], scratch: Path | None) -> Iterator[Path]:
    """``onnx_file``, or its widened copy where ``providers`` can't run it otherwise."""
    model = ir.load(onnx_file)
    source = widened_file(model, scratch) if must_upcast(model, providers) else nullcontext(onnx_file)
    with source as path:
        yield path


@contextmanager
def runnable_graph(model: ir.Model, providers: tuple[str, ...], scratch: Path | None) -> Iterator[Path | bytes]:
    """``model`` serialized, its weights left where they lie, or a widened file of it where needed."""
    if must_upcast(model, providers):
        with widened_file(model, scratch) as path:
            yield path
    else:
        yield ir.to_proto(model).SerializeToString()


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


def _widened_attribute(attribute: ir.Attr, narrow: frozenset[ir.DataType]) -> ir.Attr:
    if attribute.is_ref():
        return attribute
    if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in narrow:
        return ir.AttrTensor(attribute.name, _float32(attribute.as_tensor()))
    named_type = attribute.name in _TYPE_ATTRIBUTES and attribute.type == ir.AttributeType.INT
    if named_type and attribute.as_int() in narrow:
        return ir.AttrInt64(attribute.name, int(ir.DataType.FLOAT))
    return attribute


def resident_bytes(weight: ir.TensorProtocol, providers: tuple[str, ...]) -> int:
    """Bytes of ``weight`` under ``providers``, at most.

    The CPU provider multiplies in float32: it keeps 16-bit weights as float32 copies (measured with ONNX Runtime 1.31:
    5.2 GB for 2.6 GB of float16; an embedding that is only looked up stays as it is). Others lie as they are stored.
    """
    return weight.nbytes * (2 if providers == CPU_ONLY and weight.dtype in SIXTEEN_BIT else 1)
