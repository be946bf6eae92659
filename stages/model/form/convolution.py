"""Write a Conv as the MatMul that it is: of the windows that it cuts out, laid side by side, and its weight.

Of patches, where windows don't overlap, that only changes the order of numbers. Windows along one axis that overlap are
written once for each place in the kernel, as ONNX Runtime's own Conv does inside.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from stages.model.form.insert import insert_before, integers, replace_inputs
from stages.model.form.validate import opset_of
from stages.model.patterns import STANDARD_DOMAINS, input_of, is_constant
from stages.records.formats import float_of_onnx

_FEWEST_INPUTS = 32
"""Numbers of a window: fewer don't fill a block."""
_LONGEST_KERNEL = 8
"""Of windows that overlap: each number is copied as often."""
_OLDEST_OPSET = 11
"""Slice and Pad take their numbers as inputs."""
_END = 2**63 - 1
_WAS = "genai_quant.conv"
"""Key of the last node's metadata: what the Conv was."""


def write_convolutions(model: ir.Model) -> None:
    """Turn every Conv that can be a site into MatMul, in place; the numbers stay what they were but for rounding."""
    if (opset_of(model) or 0) < _OLDEST_OPSET:
        return
    for node in tuple(model.graph):
        if is_convolution(node) and not why_no_product(node):
            _rewrite(node)


def restore_convolutions(model: ir.Model) -> None:
    """Turn what ``write_convolutions`` wrote back into Conv, in place, where the weight is still in floating point.

    ONNX Runtime runs it faster so. The nodes that nobody reads any more stay.
    """
    values = {str(value.name): value for value in model.graph.inputs}
    values |= {str(output.name): output for node in model.graph for output in node.outputs}
    for node in tuple(model.graph):
        said = node.metadata_props.pop(_WAS, None)
        operands = None if said is None else _float_operands(node)
        if said is not None and operands is not None:
            was = json.loads(said)
            attributes = {name: _attribute(name, value) for name, value in was["attributes"].items()}
            _become(node, "Conv", [values[was["input"]], *operands], attributes)


def _attribute(name: str, value: int | str | list[int]) -> ir.Attr:
    if isinstance(value, str):
        return ir.AttrString(name, value)
    return ir.AttrInt64(name, value) if isinstance(value, int) else ir.AttrInt64s(name, value)


def _float_operands(last: ir.Node) -> list[ir.Value] | None:
    """Return kernel and bias, if there is one, of the nodes that end in ``last``; None where the kernel has codes."""
    operands: list[ir.Value] = []
    before = last.inputs[0]
    node = None if before is None else before.producer()
    if node is not None and node.op_type == "Transpose" and last.op_type == "Reshape":
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    if node is not None and node.op_type == "Add":
        product, bias = node.inputs
        operands += [] if bias is None else [bias]
        node = None if product is None else product.producer()
    for op_type, index in (("MatMul", 1), ("Transpose", 0), ("Reshape", 0)):
        source = None if node is None or node.op_type != op_type else node.inputs[index]
        if source is None:
            return None
        if op_type == "Reshape":
            return [source, *operands]
        node = source.producer()
    return None


def is_convolution(node: ir.Node) -> bool:
    """Return whether ``node`` is ONNX's Conv."""
    return node.op_type == "Conv" and node.domain in STANDARD_DOMAINS


def why_no_product(node: ir.Node) -> str:
    """Return why a Conv isn't written as MatMul, in words; empty where it is."""
    weight = node.inputs[1]
    shape = None if weight is None or not is_constant(weight) else weight.shape
    if weight is None or shape is None or len(shape) < 3 or float_of_onnx(weight.dtype) is None:
        return "its Conv has no constant floating-point weight"
    _, channels, *kernel = (int(size) for size in shape.numpy())
    if node.attributes.get_int("group", 1) != 1:
        return "its Conv works in groups of channels"
    if any(step != 1 for step in node.attributes.get_ints("dilations", [1])):
        return "its Conv leaves numbers out between those of a window (dilations)"
    if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return "its Conv pads by auto_pad"
    if channels * prod(kernel) < _FEWEST_INPUTS:
        return f"its Conv reads fewer than {_FEWEST_INPUTS} numbers at a time"
    if _are_patches(node, kernel) or (len(kernel) == 1 and kernel[0] <= _LONGEST_KERNEL):
        return ""
    return "the windows of its Conv overlap"


def _are_patches(node: ir.Node, kernel: list[int]) -> bool:
    return not any(node.attributes.get_ints("pads", [0])) and _strides(node, kernel) == kernel


def _strides(node: ir.Node, kernel: list[int]) -> list[int]:
    return [int(stride) for stride in node.attributes.get_ints("strides", [1] * len(kernel))]


def _rewrite(node: ir.Node) -> None:
    """Let ``node`` become the last of the nodes that do what it did."""
    weight, bias = node.inputs[1], input_of(node, 2)
    assert weight is not None
    assert weight.shape is not None
    outputs, channels, *kernel = (int(size) for size in weight.shape.numpy())
    said = {name: attribute.value for name, attribute in node.attributes.items()}
    node.metadata_props[_WAS] = json.dumps({"input": _read(node).name, "attributes": said}, default=list)
    inputs = channels * prod(kernel)
    grid = _Grid.of(node, kernel)
    if not _are_patches(node, kernel):
        windows = _overlapping(node, channels, kernel[0])
    elif prod(kernel) == 1:
        windows = _columns(node, _read(node), inputs)
    else:
        windows = _patches(node, channels, kernel, grid)
    windows.shape, windows.type = ir.Shape([None, None, inputs]), ir.TensorType(weight.dtype or ir.DataType.FLOAT)
    rows = insert_before(node, "Reshape", [weight, integers(node, "rows", [outputs, inputs])], name="matrix")[0]
    matrix = insert_before(node, "Transpose", [rows], {"perm": [1, 0]}, name="turned")[0]
    product = insert_before(node, "MatMul", [windows, matrix])[0]
    product.type = windows.type
    made = product.producer()
    assert made is not None
    made.name, node.name = node.name or made.name, f"{node.outputs[0].name}/back"
    if bias is not None:
        product = insert_before(node, "Add", [product, bias])[0]
    if len(kernel) == 1:
        _become(node, "Transpose", [product], {"perm": ir.AttrInt64s("perm", [0, 2, 1])})
        return
    turned = insert_before(node, "Transpose", [product], {"perm": [0, 2, 1]}, name="channels first")[0]
    _become(node, "Reshape", [turned, grid.sizes([0, outputs])], {})


def _become(node: ir.Node, op_type: str, inputs: list[ir.Value], attributes: dict[str, ir.Attr]) -> None:
    node.op_type = op_type
    replace_inputs(node, inputs)
    node.attributes.clear()
    node.attributes.update(attributes)


def _read(node: ir.Node) -> ir.Value:
    assert node.inputs[0] is not None
    return node.inputs[0]


def _columns(node: ir.Node, value: ir.Value, rows: int) -> ir.Value:
    """Return [batch, rows, ...] as [batch, columns, rows]."""
    flat = insert_before(node, "Reshape", [value, integers(node, "flat sizes", [0, rows, -1])], name="flat")[0]
    return insert_before(node, "Transpose", [flat], {"perm": [0, 2, 1]}, name="windows")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grid:
    """The patches along each axis behind batch and channels."""

    node: ir.Node
    kernel: list[int]
    fixed: tuple[int, ...] | None
    """Sizes of the input; None where only a run tells them."""
    counts: ir.Value | None
    """How many patches lie along each axis, where only a run tells it."""

    @classmethod
    def of(cls, node: ir.Node, kernel: list[int]) -> _Grid:
        shape = _read(node).shape
        fixed = () if shape is None else tuple(size for size in list(shape)[2:] if isinstance(size, int))
        if len(fixed) == len(kernel):
            return cls(node=node, kernel=kernel, fixed=fixed, counts=None)
        if len(kernel) == 1 and not _are_patches(node, kernel):
            return cls(node=node, kernel=kernel, fixed=None, counts=None)
        whole = insert_before(node, "Shape", [_read(node)])[0]
        bounds = [integers(node, name, [number]) for name, number in (("first", 2), ("last", _END))]
        sizes = insert_before(node, "Slice", [whole, *bounds], name="sizes")[0]
        counts = insert_before(node, "Div", [sizes, integers(node, "kernel", kernel)], name="grid")[0]
        return cls(node=node, kernel=kernel, fixed=None, counts=counts)

    def sizes(self, front: list[int]) -> ir.Value:
        """Return ``front`` and the counts."""
        if self.fixed is not None:
            counts = [size // step for size, step in zip(self.fixed, self.kernel, strict=True)]
            return integers(self.node, "form", front + counts)
        parts = [integers(self.node, "front of form", front), self._counts]
        return insert_before(self.node, "Concat", parts, {"axis": 0}, name="form")[0]

    def pairs(self, front: list[int]) -> ir.Value:
        """Return ``front``, and of each axis the count and the kernel."""
        if self.fixed is not None:
            pairs = [(size // step, step) for size, step in zip(self.fixed, self.kernel, strict=True)]
            return integers(self.node, "parts", front + [number for pair in pairs for number in pair])
        node, column = self.node, integers(self.node, "column", [-1, 1])
        kernel = integers(node, "kernel of parts", self.kernel)
        columns = [
            insert_before(node, "Reshape", [value, column], name=f"column of {name}")[0]
            for name, value in (("grid", self._counts), ("kernel", kernel))
        ]
        table = insert_before(node, "Concat", columns, {"axis": 1}, name="table of parts")[0]
        row = insert_before(node, "Reshape", [table, integers(node, "row", [-1])], name="row of parts")[0]
        return insert_before(node, "Concat", [integers(node, "front of parts", front), row], {"axis": 0}, name="parts")[
            0
        ]

    def covered(self, x: ir.Value) -> ir.Value:
        """Return ``x`` without what no patch covers at its ends."""
        node, axes = self.node, len(self.kernel)
        if self.fixed is None:
            ends = insert_before(node, "Mul", [self._counts, integers(node, "steps", self.kernel)], name="ends")[0]
        elif any(size % step for size, step in zip(self.fixed, self.kernel, strict=True)):
            whole = [size - size % step for size, step in zip(self.fixed, self.kernel, strict=True)]
            ends = integers(node, "ends", whole)
        else:
            return x
        bounds = integers(node, "begins", [0] * axes), ends, integers(node, "axes", list(range(2, 2 + axes)))
        return insert_before(node, "Slice", [x, *bounds], name="covered")[0]

    @property
    def _counts(self) -> ir.Value:
        assert self.counts is not None
        return self.counts


def _patches(node: ir.Node, channels: int, kernel: list[int], grid: _Grid) -> ir.Value:
    """Return [batch, patches, channels * kernel] of [batch, channels, sizes]."""
    behind = 2 + 2 * len(kernel)
    cut = insert_before(node, "Reshape", [grid.covered(_read(node)), grid.pairs([0, channels])], name="cut")[0]
    order = [0, *range(2, behind, 2), 1, *range(3, behind, 2)]
    sorted_ = insert_before(node, "Transpose", [cut], {"perm": order}, name="patch by patch")[0]
    target = integers(node, "sizes of windows", [0, -1, channels * prod(kernel)])
    return insert_before(node, "Reshape", [sorted_, target], name="windows")[0]


def _overlapping(node: ir.Node, channels: int, kernel: int) -> ir.Value:
    """Return [batch, places, channels * kernel] of a signal [batch, channels, length]."""
    x, stride = _read(node), _strides(node, [kernel])[0]
    begin, end = (int(pad) for pad in node.attributes.get_ints("pads", [0, 0]))
    if begin or end:
        x = insert_before(node, "Pad", [x, integers(node, "pads", [0, 0, begin, 0, 0, end])], name="padded")[0]
    form = integers(node, "one place", [0, channels, 1, -1])
    pieces = []
    for place in range(kernel):
        numbers = {"from": place, "to": place - kernel + 1 or _END, "axis": 2, "step": stride}
        bounds = [integers(node, f"{name} {place}", [number]) for name, number in numbers.items()]
        taken = insert_before(node, "Slice", [x, *bounds], name=f"place {place}")[0]
        pieces.append(insert_before(node, "Reshape", [taken, form], name=f"row {place}")[0])
    rows = insert_before(node, "Concat", pieces, {"axis": 2}, name="rows of places")[0]
    return _columns(node, rows, channels * kernel)
