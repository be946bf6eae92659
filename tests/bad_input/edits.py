"""Do small damage: to bytes, JSON, safetensors and graphs of a work folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from safetensors import safe_open
from safetensors.torch import save_file

from tests.bad_input.row import Spoil

MODEL, DATA = "base/model.onnx", "base/model.onnx.data"
LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9999\n"
GraphChange = Callable[[onnx.ModelProto], None]


def written(name: str, content: bytes | str) -> Spoil:
    """Write a file with this content, in place of what was there."""

    def spoil(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def gone(*patterns: str) -> Spoil:
    """Delete the files that match."""

    def spoil(folder: Path) -> None:
        for pattern in patterns:
            for path in sorted(folder.glob(pattern)):
                path.unlink()

    return spoil


def shortened(pattern: str, keep: float = 0.5) -> Spoil:
    """Cut the first file that matches."""

    def spoil(folder: Path) -> None:
        path = sorted(folder.glob(pattern))[0]
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])

    return spoil


def folder_in_place_of(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir(parents=True)

    return spoil


def linked(name: str, target: str) -> Spoil:
    """Make a symbolic link to ``target``, in place of what was there; the work folder is written {here}."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target.format(here=folder))

    return spoil


def moved(name: str, to: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / to).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).rename(folder / to)

    return spoil


def copied(name: str, to: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / to).write_bytes((folder / name).read_bytes())

    return spoil


def in_turn(*spoils: Spoil) -> Spoil:
    def spoil(folder: Path) -> None:
        for each in spoils:
            each(folder)

    return spoil


def json_with(name: str, *keys: str | int, value: object) -> Spoil:
    """Put ``value`` into the JSON file, at the place that ``keys`` lead to."""

    def spoil(folder: Path) -> None:
        content: Any = json.loads((folder / name).read_text(encoding="utf-8"))
        place = content
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        (folder / name).write_text(json.dumps(content), encoding="utf-8")

    return spoil


def tensors_with(pattern: str, change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> Spoil:
    """Change tensors or metadata of the first safetensors file that matches."""

    def spoil(folder: Path) -> None:
        path = sorted(folder.glob(pattern))[0]
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
            metadata = dict(file.metadata() or {})
        change(tensors, metadata)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata)

    return spoil


def graph_with(change: GraphChange) -> Spoil:
    """Change the base's graph; its data file stays."""

    def spoil(folder: Path) -> None:
        model = onnx.load(folder / MODEL, load_external_data=False)
        change(model)
        (folder / MODEL).write_bytes(model.SerializeToString())

    return spoil


# --------------------------------------------------------------------------- parts of a graph


def first_node(model: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == op_type)


def first_weight(model: onnx.ModelProto) -> onnx.TensorProto:
    """Return the weight of the first MatMul."""
    name = first_node(model, "MatMul").input[1]
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def external(tensor: onnx.TensorProto, key: str) -> onnx.StringStringEntryProto:
    return next(entry for entry in tensor.external_data if entry.key == key)


def set_external(key: str, value: str) -> Spoil:
    """Change the first weight's external data entry."""

    def change(model: onnx.ModelProto) -> None:
        external(first_weight(model), key).value = value

    return graph_with(change)


def weight_of_values(value: float) -> Spoil:
    """Give the first weight one such number, inside the .onnx file."""

    def change(model: onnx.ModelProto) -> None:
        tensor = first_weight(model)
        array = np.full(tuple(tensor.dims), 0.25, np.float32)
        array[3, 5] = value
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    return graph_with(change)


def gain_of_values(value: float) -> Spoil:
    """Give the gain of the second layer's first norm one such number, inside the .onnx file."""

    def change(model: onnx.ModelProto) -> None:
        (tensor,) = (one for one in model.graph.initializer if one.name == "model.layers.1.input_layernorm.weight")
        array = np.ones(tuple(tensor.dims), np.float32)
        array[3] = value
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    return graph_with(change)


def small_model(*nodes: onnx.NodeProto, weights: dict[str, np.ndarray]) -> Spoil:
    """Make a base of these nodes, from ``x`` [t, 32] to ``y``, with nothing else in its folder."""
    graph = onnx.helper.make_graph(
        list(nodes),
        "small",
        [onnx.helper.make_tensor_value_info("x", TensorProto.FLOAT, ["t", 32])],
        [onnx.helper.make_tensor_value_info("y", TensorProto.FLOAT, ["t", 32])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    content = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    return in_turn(gone("base/*"), written(MODEL, content.SerializeToString()))
