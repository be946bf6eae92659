"""Make a graph run where the CPU is the only provider, and open it.

Norms are written out, bfloat16 becomes float32, and block-sparse attention a bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from stages.model.load import place_weights, weights_folder
from stages.runtime.cpu.norms import must_write_out_norms, write_out_norms
from stages.runtime.cpu.sparse_attention import has_sparse_attention, write_out_sparse_attention
from stages.runtime.cpu.upcast import must_upcast, upcast_file, upcast_model
from stages.runtime.providers import CPU_ONLY
from stages.runtime.session import SessionSettings, open_session

_KEPT_BYTES = 1024


@contextmanager
def runnable_graph(model: ir.Model, providers: tuple[str, ...], scratch: Path | None) -> Iterator[Path | bytes]:
    """Yield ``model`` serialized, its weights left where they lie, or an upcast file in ``scratch`` where needed.

    Args:
        model: the graph, which stays as it was.
        providers: those that shall run it; what they can't is rewritten.
        scratch: folder for the upcast file; None is the system's folder for temporary files.
    """
    if must_write_out_norms(model, providers):
        model = write_out_norms(model)
    if has_sparse_attention(model):
        model = write_out_sparse_attention(model)
    if must_upcast(model, providers):
        with upcast_file(model, scratch) as path:
            yield path
    else:
        yield ir.to_proto(model).SerializeToString()


@contextmanager
def open_file(onnx_file: Path, settings: SessionSettings, scratch: Path | None) -> Iterator[ort.InferenceSession]:
    """Open ``onnx_file`` where its providers can run it as it is, else what ``runnable_graph`` makes of it.

    Raises:
        GraphError: ONNX Runtime refuses the model.
    """
    model = ir.load(onnx_file)
    place_weights(model, onnx_file)
    changes = (must_write_out_norms(model, settings.providers), must_upcast(model, settings.providers))
    rewritten = any(changes) or has_sparse_attention(model)
    with runnable_graph(model, settings.providers, scratch) if rewritten else nullcontext(onnx_file) as source:
        folder = weights_folder(model, onnx_file) if isinstance(source, bytes) else None
        yield open_session(source, replace(settings, external_data_folder=folder))


def without_weights(model: ir.Model) -> bytes:
    """Return ``model`` for the CPU with its large weights as inputs: enough to look for its operators' kernels."""
    changed = write_out_norms(model)
    for name, value in tuple(changed.graph.initializers.items()):
        if value.const_value is not None and value.const_value.nbytes > _KEPT_BYTES:
            del changed.graph.initializers[name]
            value.const_value = None
            if not value.is_graph_input():
                changed.graph.inputs.append(value)
    if must_upcast(changed, CPU_ONLY):
        changed = upcast_model(changed)
    content: bytes = ir.to_proto(changed).SerializeToString()
    return content
