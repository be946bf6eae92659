"""Write an Attention node, which multiplies with packed weights itself, as MatMul and MultiHeadAttention.

ONNX Runtime's transformer optimizer makes Attention nodes of encoders: input [B, S, K], weight [K, q + k + v]. No
runtime takes their weight as integers; MatMulNBits in front of MultiHeadAttention does the same.
"""

from __future__ import annotations

import onnx_ir as ir

from stages.model.form.insert import insert_before, integers, replace_inputs
from stages.model.patterns import input_of, is_constant
from stages.records.formats import float_of_onnx

_MICROSOFT = "com.microsoft"
_WEIGHT, _BIAS, _MASK, _PAST, _ADDED, _LENGTH = range(1, 7)
_KEPT = ("num_heads", "unidirectional", "mask_filter_value", "scale")
_MAKE_LENGTHS = frozenset({"ReduceSum", "EmbedLayerNormalization"})
"""What the optimizer writes to count the tokens of each text."""
_KNOWN = frozenset({*_KEPT, "qkv_hidden_sizes"})


def write_packed_attention(model: ir.Model) -> None:
    """Turn every Attention node whose weight can be a site into MatMul, Split and MultiHeadAttention, in place."""
    for node in tuple(model.graph):
        if is_packed_attention(node) and not why_stays_packed(node):
            _rewrite(node)


def is_packed_attention(node: ir.Node) -> bool:
    """Return whether ``node`` is ONNX Runtime's Attention, which holds a weight; ONNX's own of that name doesn't."""
    return node.op_type == "Attention" and node.domain == _MICROSOFT


def why_stays_packed(node: ir.Node) -> str:
    """Return why an Attention node stays as it is, in words; empty where it doesn't."""
    weight = input_of(node, _WEIGHT)
    if weight is None or not is_constant(weight) or weight.shape is None or len(weight.shape) != 2:
        return "its Attention has no constant weight"
    if float_of_onnx(weight.dtype) is None:
        return "its Attention has no floating-point weight"
    if input_of(node, _PAST) is not None or input_of(node, _LENGTH) is not None or _hands_on_cache(node):
        return "its Attention keeps a cache in a form of its own"
    unknown = [name for name in node.attributes if name not in _KNOWN and node.attributes.get_int(name, True)]
    if unknown:
        return f"its Attention has the attribute {unknown[0]}, which MultiHeadAttention lacks"
    return (
        "" if _takes_mask(input_of(node, _MASK)) else "MultiHeadAttention takes no mask of the form of its Attention's"
    )


def _takes_mask(mask: ir.Value | None) -> bool:
    """Return whether a mask is [batch, length], or [batch] lengths; what begins elsewhere has one axis, too."""
    while mask is not None and mask.shape is None:
        maker = mask.producer()
        if maker is None or maker.op_type not in ("Cast", "Identity"):
            return maker is not None and maker.op_type in _MAKE_LENGTHS
        mask = maker.inputs[0]
    if mask is None or mask.shape is None or len(mask.shape) == 2:
        return True
    maker = mask.producer()
    return len(mask.shape) == 1 and maker is not None and maker.op_type in _MAKE_LENGTHS


def _hands_on_cache(node: ir.Node) -> bool:
    return any(output.is_graph_output() or output.uses() for output in node.outputs[1:])


def _rewrite(node: ir.Node) -> None:
    """Let ``node`` become the MultiHeadAttention."""
    weight = input_of(node, _WEIGHT)
    assert weight is not None
    assert weight.shape is not None
    columns = int(weight.shape.numpy()[1])
    sizes = list(node.attributes.get_ints("qkv_hidden_sizes", [])) or [columns // 3] * 3
    product = insert_before(node, "MatMul", [node.inputs[0], weight])[0]
    product.type = ir.TensorType(weight.dtype or ir.DataType.FLOAT)
    made = product.producer()
    assert made is not None
    name = node.name or str(node.outputs[0].name)
    made.name, node.name = f"{name}/qkv_proj/MatMul", name
    bias = input_of(node, _BIAS)
    if bias is not None:  # not as attention's own input, which no input scale of the next layer could go through
        product = insert_before(node, "Add", [product, bias])[0]
    parts = insert_before(
        node, "Split", [product, integers(node, "sizes", [int(size) for size in sizes])], {"axis": -1}, outputs=3
    )
    inputs = [*parts, None, input_of(node, _MASK), input_of(node, _ADDED)]
    node.op_type = "MultiHeadAttention"
    replace_inputs(node, inputs)
    node.resize_outputs(1)
    for attribute in [each for each in node.attributes if each not in _KEPT]:
        del node.attributes[attribute]
