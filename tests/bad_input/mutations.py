"""Damage valid files and keep their form, so that loaders get behind their parsers: pure functions of bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from random import Random

import onnx
from google.protobuf.message import DecodeError

Mutation = Callable[[bytes, Random], bytes]

_NUMBERS = (0, 1, -1, 2, 3, 48, 255, 1 << 31, (1 << 63) - 1, -(1 << 63))
_VALUES: tuple[object, ...] = (*_NUMBERS, 0.5, 1e308, None, True, "", "x", "../x", "\0", "ü\n", [], {}, [0], {"a": 1})


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Change, remove, repeat or insert a few bytes."""
    mutated = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(mutated) + 1)
        length = random.choice((1, 1, 2, 8, 64, 1024))
        match random.randrange(4):
            case 0:
                mutated[at : at + length] = random.randbytes(min(length, max(len(mutated) - at, 0)))
            case 1:
                del mutated[at : at + length]
            case 2:
                mutated[at:at] = mutated[at : at + length]
            case _:
                mutated[at:at] = random.choice((b"\0", b"\xff", b"\n", b'"', b"{", b"[" * length, b"9" * length))
    return bytes(mutated)


def mutate_text(data: bytes, random: Random) -> bytes:
    """Swap, repeat, remove or cut lines; else change bytes."""
    lines = data.splitlines(keepends=True)
    if not lines or random.random() < 0.5:
        return mutate_bytes(data, random)
    one, other = random.randrange(len(lines)), random.randrange(len(lines))
    match random.randrange(4):
        case 0:
            lines[one], lines[other] = lines[other], lines[one]
        case 1:
            lines.insert(other, lines[one])
        case 2:
            del lines[one]
        case _:
            lines[one] = lines[one][: random.randrange(len(lines[one]) + 1)]
    return b"".join(lines)


# --------------------------------------------------------------------------- JSON


def mutate_json(data: bytes, random: Random) -> bytes:
    """Replace, remove, rename or double values anywhere in the document."""
    try:
        content: object = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, random)
    for _ in range(random.randint(1, 3)):
        content = _changed(content, random)
    return json.dumps(content).encode("utf-8", "surrogatepass")


def _changed(value: object, random: Random) -> object:
    if isinstance(value, list) and value and random.random() < 0.9:
        return _changed_list(value, random)
    if isinstance(value, dict) and value and random.random() < 0.9:
        return _changed_object(value, random)
    return random.choice(_VALUES)


def _changed_list(items: list[object], random: Random) -> list[object]:
    at = random.randrange(len(items))
    match random.randrange(8):
        case 0:
            return items[:at] + items[at + 1 :]
        case 1:
            return [*items, items[at]]
        case _:
            return [*items[:at], _changed(items[at], random), *items[at + 1 :]]


def _changed_object(members: dict[str, object], random: Random) -> dict[str, object]:
    key = random.choice(list(members))
    others = {name: member for name, member in members.items() if name != key}
    match random.randrange(8):
        case 0:
            return others
        case 1:
            return others | {str(random.choice(_VALUES)): members[key]}
        case _:
            return members | {key: _changed(members[key], random)}


# --------------------------------------------------------------------------- safetensors


def mutate_safetensors(data: bytes, random: Random) -> bytes:
    """Change the header (names, shapes, types, places, metadata), or the numbers behind it."""
    size = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else len(data)
    header, numbers = data[8 : 8 + size], data[8 + size :]
    if size > len(data) or random.random() < 0.2:
        return mutate_bytes(data, random)
    if random.random() < 0.3 and numbers:
        return data[: 8 + size] + _same_length(numbers, random)
    header = _other_type(header, random) if random.random() < 0.4 else mutate_json(header, random)
    return struct.pack("<Q", len(header)) + header + numbers


def _same_length(numbers: bytes, random: Random) -> bytes:
    at = random.randrange(len(numbers))
    return (numbers[:at] + random.choice((b"\xff", b"\0", b"\x7f")) * 8 + numbers[at + 8 :])[: len(numbers)]


def _other_type(header: bytes, random: Random) -> bytes:
    """Declare a tensor's bytes as another type and shape that fit: what safetensors itself can't refuse."""
    try:
        content = json.loads(header)
        entry = content[random.choice([name for name in content if name != "__metadata__"])]
        begin, end = entry["data_offsets"]
        kind, width = random.choice(
            (("F32", 4), ("F64", 8), ("I64", 8), ("U8", 1), ("I8", 1), ("BF16", 2), ("BOOL", 1))
        )
        count, rest = divmod(end - begin, width)
        shapes = [[count], [1, count], [count, 1], [count, 1, 1]] + [[2, count // 2]] * (count % 2 == 0)
        if rest == 0:
            entry["dtype"], entry["shape"] = kind, random.choice(shapes)
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return mutate_bytes(header, random)
    return json.dumps(content).encode("utf-8", "surrogatepass")


# --------------------------------------------------------------------------- ONNX


def mutate_onnx(data: bytes, random: Random) -> bytes:
    """Rewire, rename, retype, resize, double or remove nodes, attributes, weights, inputs and outputs."""
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        return mutate_bytes(data, random)
    if random.random() < 0.1:
        return mutate_bytes(data, random)
    for _ in range(random.randint(1, 3)):
        random.choice((_node, _node, _weight, _weight, _value, _model))(model, random)
    return bytes(model.SerializeToString())


def _name(model: onnx.ModelProto, random: Random) -> str:
    graph = model.graph
    places = [name for node in graph.node for name in (*node.input, *node.output)]
    names: list[str] = [*places, *(tensor.name for tensor in graph.initializer), "", "nobody", "../x", "a\nb"]
    return random.choice(names)


def _node(model: onnx.ModelProto, random: Random) -> None:
    nodes = model.graph.node
    if not nodes:
        return
    node = random.choice(nodes)
    match random.randrange(8):
        case 0:
            nodes.remove(node)
        case 1:
            nodes.append(node)
        case 2:
            node.op_type = random.choice([other.op_type for other in nodes])
        case 3:
            node.domain = random.choice(("", "ai.onnx", "com.microsoft", "x"))
        case 4:
            node.name = random.choice(("", _name(model, random)))
        case 5:
            _attribute(node, random)
        case _:
            _wires(model, node, random)


def _wires(model: onnx.ModelProto, node: onnx.NodeProto, random: Random) -> None:
    names = random.choice((node.input, node.output))
    if not names or random.random() < 0.2:
        names.append(_name(model, random))
    elif random.random() < 0.4:
        del names[random.randrange(len(names)) :]
    else:
        names[random.randrange(len(names))] = _name(model, random)


def _attribute(node: onnx.NodeProto, random: Random) -> None:
    if not node.attribute:
        return
    attribute = random.choice(node.attribute)
    match random.randrange(5):
        case 0:
            node.attribute.remove(attribute)
        case 1:
            attribute.type = random.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 13, 14))
        case 2:
            attribute.name = random.choice(("axis", "perm", "num_heads", "alpha", "transB", "x"))
        case 3:
            attribute.ints[:] = [random.choice(_NUMBERS) for _ in range(random.randrange(4))]
        case _:
            attribute.i = random.choice(_NUMBERS)


def _weight(model: onnx.ModelProto, random: Random) -> None:
    tensors = model.graph.initializer
    if not tensors:
        return
    tensor = random.choice(tensors)
    match random.randrange(8):
        case 0:
            tensors.remove(tensor)
        case 1:
            tensors.append(tensor)
        case 2:
            tensor.name = _name(model, random)
        case 3:
            tensor.data_type = random.choice((0, 1, 2, 7, 8, 10, 11, 16, 17, 21, 22, 99))
        case 4 if tensor.dims:
            tensor.dims[random.randrange(len(tensor.dims))] = random.choice(_NUMBERS)
        case 5:
            random.choice((tensor.dims.append, lambda _: tensor.dims.reverse()))(random.choice(_NUMBERS))
        case 6 if tensor.external_data:
            entry = random.choice(tensor.external_data)
            entry.value = random.choice((*map(str, _NUMBERS), "", "x", "../x", "/etc/passwd", "a\0b", "."))
        case _:
            tensor.raw_data = tensor.raw_data[: random.randrange(len(tensor.raw_data) + 1)]


def _value(model: onnx.ModelProto, random: Random) -> None:
    values = random.choice((model.graph.input, model.graph.output, model.graph.value_info))
    if not values:
        return
    value = random.choice(values)
    dims = value.type.tensor_type.shape.dim
    match random.randrange(5):
        case 0:
            values.remove(value)
        case 1:
            values.append(value)
        case 2:
            value.name = _name(model, random)
        case 3 if dims:
            random.choice(dims).dim_value = random.choice(_NUMBERS)
        case _:
            value.type.tensor_type.elem_type = random.choice((0, 1, 7, 8, 10, 16, 99))


def _model(model: onnx.ModelProto, random: Random) -> None:
    match random.randrange(4):
        case 0:
            model.ir_version = random.choice(_NUMBERS)
        case 1 if model.opset_import:
            random.choice(model.opset_import).version = random.choice((-1, 0, 7, 13, 17, 20, 21, 23, 99, 1 << 40))
        case 2:
            model.functions.append(onnx.FunctionProto(name="f", domain="x", node=model.graph.node[:1]))
        case _:
            model.graph.name = random.choice(("", "x"))
