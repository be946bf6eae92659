"""Write out the norms inside attention, which the CPU provider lacks.

GroupQueryAttention can normalize the heads of q and k itself; only the CUDA and WebGPU providers have that kernel, and
onnxruntime-genai's builder writes it for both. On the CPU the norms stand before attention as nodes of their own.
"""

from __future__ import annotations

import onnx_ir as ir

from stages.model.form.insert import insert_before, integers
from stages.runtime.providers import CUDA

NORMS_REASON = "with the norms of q and k as nodes of their own: the CPU's attention can't compute them"
"""What tables say of a run with ``write_out_norms``."""
_ATTENTION = "GroupQueryAttention"
_QUERY, _KEY = 0, 1
_GAINS = {_QUERY: 14, _KEY: 15}
"""Inputs that hold the gains of the norms, by what they normalize."""
_EPSILON = "qk_norm_epsilon"
_DEFAULT_EPSILON = 1e-6


def must_write_out_norms(model: ir.Model, providers: tuple[str, ...]) -> bool:
    """Return whether attention of ``model`` normalizes q or k itself and none of ``providers`` can run that."""
    return CUDA not in providers and any(_has_norms(node) for node in model.graph.all_nodes())


def write_out_norms(model: ir.Model) -> ir.Model:
    """Return a copy of ``model`` with the norms inside attention as nodes before it; ``model`` is left as it was.

    Ensures: names of values and nodes stay; packed q, k and v are split where they were packed.
    """
    changed = model.clone()
    for node in list(changed.graph.all_nodes()):
        if _has_norms(node):
            _take_norms_out(node)
    return changed


def _has_norms(node: ir.Node) -> bool:
    return node.op_type == _ATTENTION and any(
        len(node.inputs) > index and node.inputs[index] is not None for index in _GAINS.values()
    )


def _take_norms_out(node: ir.Node) -> None:
    """Put the norms of an attention node before it."""
    gains = {part: node.inputs[index] for part, index in _GAINS.items() if len(node.inputs) > index}
    if node.inputs[_KEY] is None:
        _unpack(node, next(gain for gain in gains.values() if gain is not None))
    for part, gain in gains.items():
        if gain is not None:
            _normalize(node, part, gain)
    node.resize_inputs(min(_GAINS.values()))
    node.attributes.pop(_EPSILON, None)


def _unpack(node: ir.Node, gain: ir.Value) -> None:
    """Split the packed input of ``node``, whose heads are as long as ``gain``, into q, k and v."""
    heads, kv_heads = (node.attributes["num_heads"].as_int(), node.attributes["kv_num_heads"].as_int())
    widths = integers(node, "widths", [count * _length(gain) for count in (heads, kv_heads, kv_heads)])
    parts = insert_before(node, "Split", [node.inputs[_QUERY], widths], {"axis": -1}, outputs=3)
    for index, part in enumerate(parts):
        node.replace_input_with(index, part)


def _normalize(node: ir.Node, part: int, gain: ir.Value) -> None:
    """Split an input of ``node`` [batch, length, heads * size] into heads, normalize each, and join them again."""
    attributes = {"axis": -1, "epsilon": node.attributes.get_float(_EPSILON, _DEFAULT_EPSILON), "stash_type": 1}
    apart = integers(node, f"apart_{part}", [0, 0, -1, _length(gain)])
    joined = integers(node, f"joined_{part}", [0, 0, -1])
    (heads,) = insert_before(node, "Reshape", [node.inputs[part], apart], {}, name=f"heads_{part}")
    (normed,) = insert_before(node, "SimplifiedLayerNormalization", [heads, gain], attributes, name=f"normed_{part}")
    (whole,) = insert_before(node, "Reshape", [normed, joined], {}, name=f"whole_{part}")
    node.replace_input_with(part, whole)


def _length(gain: ir.Value) -> int:
    assert gain.shape is not None, "an initializer has a shape"
    return int(gain.shape.numpy()[0])
