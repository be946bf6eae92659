"""Write block-sparse attention as attention with a bias, which needs no buffer that a cache shares with its output.

SparseAttention (Phi-3 small) writes keys and values into the buffer that it reads them from, which must have room for
all tokens; a window that is run once has no such buffer.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from stages.model.form.insert import insert_before, integers

_SPARSE, _DENSE, _MICROSOFT = "SparseAttention", "GroupQueryAttention", "com.microsoft"
_QUERY, _CACHE, _ROWS, _COLUMNS, _TOTAL, _VALID, _ANGLES = 0, 3, 5, 6, 7, 8, slice(9, 11)
_BLOCK_SIZE = "sparse_block_size"
_NO_POSITIONS = None
_HIDDEN = -1e4
"""Far below any score, and a float16."""


def has_sparse_attention(model: ir.Model) -> bool:
    """Return whether ``model`` holds block-sparse attention that ``write_out_sparse_attention`` can rewrite."""
    return any(_is_rewritable(node) for node in model.graph.all_nodes())


def write_out_sparse_attention(model: ir.Model) -> ir.Model:
    """Return a copy of ``model`` with its block-sparse attention as GroupQueryAttention; ``model`` is left as it was.

    Ensures: names of values and nodes stay; keys of other blocks get a bias that leaves them no weight.
    """
    changed = model.clone()
    for node in list(changed.graph.all_nodes()):
        if _is_rewritable(node):
            _rewrite(node)
    return changed


def _is_rewritable(node: ir.Node) -> bool:
    return node.op_type == _SPARSE and all(
        (given := node.inputs[index]) is not None and given.const_value is not None for index in (_ROWS, _COLUMNS)
    )


def _rewrite(node: ir.Node) -> None:
    """Put attention with a bias in the place of ``node``."""
    (last,) = insert_before(node, "Sub", [node.inputs[_VALID], _number(node, "one", 1, np.int32)], name="last")
    attributes = {name: value for name, value in node.attributes.items() if name != _BLOCK_SIZE}
    angles = (*node.inputs[_ANGLES], None, None)[:2]
    inputs = [*node.inputs[:_ROWS], last, node.inputs[_TOTAL], *angles, _NO_POSITIONS, _bias(node)]
    dense = ir.Node(_MICROSOFT, _DENSE, inputs, attributes.values(), num_outputs=len(node.outputs), name=node.name)
    assert node.graph is not None
    for old, new in zip(node.outputs, dense.outputs, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], [dense], node.outputs, dense.outputs)


def _bias(node: ir.Node) -> ir.Value:
    """Return what is added to the scores [1, heads, queries, keys]: 0 within the blocks that a head reads."""
    query, cache = node.inputs[_QUERY], node.inputs[_CACHE]
    assert cache is not None, "the operator needs it"
    assert cache.dtype is not None, "inputs of a graph have a type"
    blocks = ir.tensor(_blocks(node).astype(cache.dtype.numpy()))
    (table,) = insert_before(node, "Constant", [], {"value": blocks}, name="blocks")
    (total,) = insert_before(node, "Cast", [node.inputs[_TOTAL]], {"to": ir.DataType.INT64.value}, name="total")
    (end,) = insert_before(node, "Reshape", [total, integers(node, "one_number", [1])], name="end")
    (length,) = insert_before(node, "Shape", [query], {"start": 1, "end": 2}, name="length")
    (start,) = insert_before(node, "Sub", [end, length], name="start")
    bounds = [_number(node, "zero", 0), insert_before(node, "Squeeze", [end], name="stop")[0], _number(node, "step", 1)]
    (places,) = insert_before(node, "Range", bounds, name="places")
    size = integers(node, "block_size", [node.attributes[_BLOCK_SIZE].as_int()])
    (of_keys,) = insert_before(node, "Div", [places, size], name="blocks_of_keys")
    (of_queries,) = insert_before(node, "Slice", [of_keys, start, end], name="blocks_of_queries")
    (rows,) = insert_before(node, "Gather", [table, of_queries], {"axis": 2}, name="rows")
    return insert_before(node, "Gather", [rows, of_keys], {"axis": 3}, name="bias")[0]


def _number(node: ir.Node, name: str, value: int, dtype: type[np.integer] = np.int64) -> ir.Value:
    return insert_before(node, "Constant", [], {"value": ir.tensor(np.array(value, dtype))}, name=name)[0]


def _constant(node: ir.Node, index: int) -> np.ndarray:
    value = node.inputs[index]
    tensor = None if value is None else value.const_value
    assert tensor is not None, "layouts are constants"
    return tensor.numpy()


def _blocks(node: ir.Node) -> np.ndarray:
    """Return the bias of each block [1, heads, blocks, blocks], from compressed rows [layouts, blocks + 1].

    Head h has the layout h % layouts; behind a layout's last column stand numbers without meaning.
    """
    rows, columns = (_constant(node, index) for index in (_ROWS, _COLUMNS))
    count = rows.shape[1] - 1
    bias = np.full((len(rows), count, count), _HIDDEN)
    for layout, (starts, read) in enumerate(zip(rows, columns, strict=True)):
        for row in range(count):
            bias[layout, row, read[starts[row] : starts[row + 1]]] = 0
    heads = np.arange(node.attributes["num_heads"].as_int())
    return bias[None, heads % len(rows)]
