"""List damaged base models: the folder, the graph's file, its external data, the numbers, and genai_config.json."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.bad_input.edits import (
    DATA,
    LFS_POINTER,
    MODEL,
    copied,
    external,
    first_node,
    first_weight,
    folder_in_place_of,
    gain_of_values,
    gone,
    graph_with,
    in_turn,
    json_with,
    linked,
    moved,
    set_external,
    shortened,
    small_model,
    weight_of_values,
    written,
)
from tests.bad_input.row import BadInput, Command, Spoil

_CONFIG = "base/genai_config.json"
_EYE = np.eye(32, dtype=np.float32)


def _model(name: str, spoil: Spoil, *words: str, command: Command = "quantize", arguments: str = "") -> BadInput:
    return BadInput(name=name, command=command, words=words, spoil=spoil, arguments=tuple(arguments.split()))


def _deep_json(depth: int = 100_000) -> str:
    return "[" * depth + "]" * depth


FOLDERS = (
    _model("no such folder", gone(), "nothing", "does not exist", arguments="--onnx_path [bold]nothing"),
    _model(
        "no such file", gone(), "no.onnx", "does not exist", command="calibrate", arguments="--onnx_path base/no.onnx"
    ),
    _model("no .onnx file in the folder", gone(MODEL), "base", "no .onnx file", command="calibrate"),
    _model("two .onnx files", in_turn(moved(MODEL, "base/a.onnx"), written("base/b.onnx", "")), "a.onnx, b.onnx"),
    _model("a name of 300 characters", gone(), "nnnn", "too long", arguments="--onnx_path " + "n" * 300),
    _model(
        "a path of 5000 characters", gone(), "too long", command="calibrate", arguments="--onnx_path " + "n/" * 2500
    ),
    _model("a name that is not UTF-8", gone(), "does not exist", arguments="--onnx_path \udcff\udcfe"),
    _model("a link to itself", linked("loop", "loop"), "loop", arguments="--onnx_path loop"),
    _model(
        "a dangling link", linked("dangling", "nowhere"), "dangling", "does not exist", arguments="--onnx_path dangling"
    ),
    _model("a .onnx that is a folder", in_turn(gone(MODEL), folder_in_place_of(MODEL)), "model.onnx"),
    _model("a text file", gone(), "text.txt", "not a readable ONNX model", arguments="--onnx_path text.txt"),
    _model(
        "export: no such folder", gone(), "nothing", "does not exist", command="export", arguments="--onnx_path nothing"
    ),
    _model("sweep: no such folder", gone(), "nothing", "does not exist", command="sweep", arguments="--base nothing"),
)

CONFIGS = (
    _model("config: no JSON", written(_CONFIG, "{"), "genai_config.json", "JSON"),
    _model("config: empty", written(_CONFIG, ""), "genai_config.json", command="calibrate"),
    _model("config: not UTF-8", written(_CONFIG, b"\xff\xfe\x00"), "genai_config.json"),
    _model("config: a list", written(_CONFIG, "[1, 2]"), "genai_config.json"),
    _model("config: brackets a hundred thousand deep", written(_CONFIG, _deep_json()), "genai_config.json"),
    _model("config: model is a list", written(_CONFIG, '{"model": []}'), "genai_config.json", "model"),
    _model(
        "config: decoder is a word", json_with(_CONFIG, "model", "decoder", value="x"), "genai_config.json", "decoder"
    ),
    _model(
        "config: filename is a number",
        json_with(_CONFIG, "model", "decoder", "filename", value=3),
        "genai_config.json",
        "filename",
    ),
    _model(
        "config: filename outside of the folder",
        in_turn(
            moved(MODEL, "elsewhere.onnx"),
            json_with(_CONFIG, "model", "decoder", "filename", value="../elsewhere.onnx"),
        ),
        "genai_config.json",
        "../elsewhere.onnx",
    ),
    _model(
        "config: vocabulary in words",
        json_with(_CONFIG, "model", "vocab_size", value="many"),
        "genai_config.json",
        "vocab_size",
        command="calibrate",
    ),
    _model(
        "config: no context",
        json_with(_CONFIG, "model", "context_length", value=-3),
        "genai_config.json",
        "context_length",
        command="calibrate",
    ),
    _model(
        "config: head size of a half",
        json_with(_CONFIG, "model", "decoder", "head_size", value=0.5),
        "genai_config.json",
        "head_size",
        command="calibrate",
    ),
    _model(
        "config: session options in a list",
        json_with(_CONFIG, "model", "decoder", "session_options", value=[1]),
        "genai_config.json",
        "session_options",
        arguments="--accuracy_level 1",
    ),
)

EXTERNAL_DATA = (
    _model("data: missing", gone(DATA), "model.onnx.data", "missing"),
    _model("data: truncated", shortened(DATA), "model.onnx.data", "truncated"),
    _model("data: truncated (calibrate)", shortened(DATA), "model.onnx.data", "truncated", command="calibrate"),
    _model("data: truncated (export)", shortened(DATA), "model.onnx.data", "truncated", command="export"),
    _model("data: truncated (sweep)", shortened(DATA), "model.onnx.data", "truncated", command="sweep"),
    _model("data: empty", written(DATA, ""), "model.onnx.data"),
    _model(
        "data: a symbolic link",
        in_turn(moved(DATA, "real.data"), linked(DATA, "{here}/real.data")),
        "real.data",
        "a link leads",
    ),
    _model("data: a folder", in_turn(gone(DATA), folder_in_place_of(DATA)), "model.onnx.data"),
    _model(
        "data: above the folder",
        in_turn(copied(DATA, "real.data"), set_external("location", "../real.data")),
        "real.data",
        "outside",
    ),
    _model("data: an absolute place", set_external("location", "/etc/passwd"), "/etc/passwd"),
    _model("data: /proc", set_external("location", "../../../../../../../../../proc/self/mem"), "/mem", "outside"),
    _model("data: no name", set_external("location", ""), "base"),
    _model("data: a name with a zero", set_external("location", "a\0b"), "model.onnx"),
    _model("data: offset below 0", set_external("offset", "-4096"), "model.onnx"),
    _model("data: offset in words", set_external("offset", "begin"), "model.onnx"),
    _model("data: offset behind the end", set_external("offset", str(1 << 40)), "model.onnx.data"),
    _model("data: length below 0", set_external("length", "-8"), "model.onnx"),
    _model("data: length shorter than the weight", set_external("length", "16"), "model.onnx"),
    _model("data: length beyond 64 bits", set_external("length", "9" * 30), "model.onnx"),
)


def _dims(*dims: int) -> Spoil:
    def change(model: onnx.ModelProto) -> None:
        tensor = first_weight(model)
        tensor.dims[:] = dims

    return graph_with(change)


def _cycle(model: onnx.ModelProto) -> None:
    """Let the first norm read what the last node gives."""
    node = first_node(model, "SimplifiedLayerNormalization")
    node.input[0] = model.graph.node[-1].output[0]


def _self_loop(model: onnx.ModelProto) -> None:
    node = first_node(model, "MatMul")
    node.input[0] = node.output[0]


def _same_outputs(model: onnx.ModelProto) -> None:
    one, other = [node for node in model.graph.node if node.op_type == "MatMul"][:2]
    other.output[0] = one.output[0]


def _same_initializers(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(first_weight(model))


def _same_inputs(model: onnx.ModelProto) -> None:
    model.graph.input.append(model.graph.input[0])


def _input_called_as_output(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = first_node(model, "MatMul").output[0]


def _unknown_value(model: onnx.ModelProto) -> None:
    first_node(model, "MatMul").input[0] = "nobody"


def _one_input(model: onnx.ModelProto) -> None:
    del first_node(model, "MatMul").input[1]


def _no_output(model: onnx.ModelProto) -> None:
    del first_node(model, "MatMul").output[:]


def _other_width(model: onnx.ModelProto) -> None:
    tensor = first_weight(model)
    tensor.CopyFrom(numpy_helper.from_array(np.ones((48, 128), np.float32), tensor.name))


def _undeclared_width(model: onnx.ModelProto) -> None:
    _other_width(model)
    others = [value for value in model.graph.value_info if value.name != first_weight(model).name]
    del model.graph.value_info[:]
    model.graph.value_info.extend(others)


def _too_few_bytes(model: onnx.ModelProto) -> None:
    tensor = first_weight(model)
    dims = list(tensor.dims)
    tensor.CopyFrom(TensorProto(name=tensor.name, data_type=TensorProto.FLOAT, dims=dims, raw_data=b"\0" * 8))


def _unknown_type(model: onnx.ModelProto) -> None:
    first_weight(model).data_type = 99


def _unknown_operator(model: onnx.ModelProto) -> None:
    first_node(model, "SimplifiedLayerNormalization").op_type = "Teleport"


def _no_opset(model: onnx.ModelProto) -> None:
    del model.opset_import[:]


def _no_head_count(model: onnx.ModelProto) -> None:
    del first_node(model, "GroupQueryAttention").attribute[:]


def _no_heads(model: onnx.ModelProto) -> None:
    for attribute in first_node(model, "GroupQueryAttention").attribute:
        if "num_heads" in attribute.name:
            attribute.i = 0


def _head_count_in_words(model: onnx.ModelProto) -> None:
    node = first_node(model, "GroupQueryAttention")
    others = [attribute for attribute in node.attribute if attribute.name != "num_heads"]
    del node.attribute[:]
    node.attribute.extend([*others, helper.make_attribute("num_heads", "four")])


def _huge_cache(model: onnx.ModelProto) -> None:
    for value in model.graph.input:
        if "past" in value.name:
            value.type.tensor_type.shape.dim[1].dim_value = 1 << 50


def _further_input(name: str, *shape: int | str) -> Spoil:
    def change(model: onnx.ModelProto) -> None:
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    return graph_with(change)


def _window_of_one_length(model: onnx.ModelProto) -> None:
    """Let the graph take 1024 tokens at a time, twice the context."""
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 1024


def _later_version(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 9999


def _constant_of_no_type(model: onnx.ModelProto) -> None:
    tensor = onnx.TensorProto(name="value", dims=[2], raw_data=b"12345678")
    model.graph.node.append(helper.make_node("Constant", [], ["unread"], name="typeless", value=tensor))


def _version_zero(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 0


def _no_graph(model: onnx.ModelProto) -> None:
    model.ClearField("graph")


def _all_data_under(model: onnx.ModelProto) -> None:
    """External data in a folder inside the base's."""
    for tensor in model.graph.initializer:
        if tensor.external_data:
            external(tensor, "location").value = "data/weights.bin"


GRAPHS = (
    _model("graph: truncated", shortened(MODEL), "model.onnx", "not a readable ONNX model"),
    _model("graph: a pointer of Git LFS", written(MODEL, LFS_POINTER), "model.onnx", "git lfs pull"),
    _model("data: a pointer of Git LFS", written(DATA, LFS_POINTER), "model.onnx.data", "git lfs pull"),
    _model("graph: empty", written(MODEL, ""), "model.onnx"),
    _model("graph: a constant without a type", graph_with(_constant_of_no_type), "model.onnx", "not a readable ONNX"),
    _model("graph: opset 0", graph_with(_version_zero), "model.onnx", "opset 0"),
    _model("graph: no graph", graph_with(_no_graph), "model.onnx"),
    _model("graph: noise", written(MODEL, bytes(range(256)) * 8), "model.onnx", command="calibrate"),
    _model("graph: a cycle", graph_with(_cycle), "model.onnx", "cycle"),
    _model("graph: a cycle (calibrate)", graph_with(_cycle), "model.onnx", "cycle", command="calibrate"),
    _model("graph: a node that reads itself", graph_with(_self_loop), "model.onnx", "cycle"),
    _model("graph: two nodes make one value", graph_with(_same_outputs), "model.onnx"),
    _model("graph: two weights of one name", graph_with(_same_initializers), "model.onnx", "twice"),
    _model("graph: two inputs of one name", graph_with(_same_inputs), "model.onnx", command="calibrate"),
    _model("graph: an input called as a node's output", graph_with(_input_called_as_output), "model.onnx"),
    _model("graph: a value that nobody makes", graph_with(_unknown_value), "nobody"),
    _model("graph: a MatMul with one input", graph_with(_one_input), "MatMul"),
    _model("graph: a MatMul without an output", graph_with(_no_output), "MatMul"),
    _model("graph: a weight of another width", graph_with(_other_width), "qkv_proj", "[48, 128]"),
    _model(
        "graph: a weight of another width (calibrate)",
        graph_with(_undeclared_width),
        "48 inputs",
        "64 channels",
        command="calibrate",
    ),
    _model("graph: too few bytes in a weight", graph_with(_too_few_bytes), "model.onnx"),
    _model("graph: a weight of unknown type", graph_with(_unknown_type), "model.onnx"),
    _model("graph: an unknown operator", graph_with(_unknown_operator), "Teleport", command="calibrate"),
    _model("graph: no opset", graph_with(_no_opset), "opset"),
    _model("graph: an opset of the future", graph_with(_later_version), "9999"),
    _model("graph: attention without head counts", graph_with(_no_head_count), "num_heads"),
    _model("graph: attention with no heads", graph_with(_no_heads), "num_heads"),
    _model("graph: a head count in words", graph_with(_head_count_in_words), "num_heads"),
    _model("graph: a key/value cache of 2^50 heads", graph_with(_huge_cache), "past_key", command="calibrate"),
    _model(
        "graph: what an encoder makes of sound",
        _further_input("past_key_cross_0", "batch", 4, 1500, 16),
        "past_key_cross_0",
        "--algo rtn_dq",
        command="calibrate",
    ),
    _model(
        "graph: embedded tokens without an embedding",
        _further_input("inputs_embeds", "batch", "length", 64),
        "inputs_embeds",
        "model.embedding.filename",
        command="calibrate",
    ),
    _model(
        "graph: an input without a meaning", _further_input("bias", 4), "'bias'", "has no default", command="calibrate"
    ),
    _model(
        "graph: windows longer than the context",
        graph_with(_window_of_one_length),
        "1024 is longer than the context",
        command="calibrate",
    ),
    _model("graph: dimensions of 2^40", _dims(1 << 40, 1 << 40), "model.onnx"),
    _model("graph: dimensions below 0", _dims(-64, -128), "model.onnx"),
    _model("graph: a dimension of 0", _dims(0, 128), "model.onnx"),
    _model("graph: more than the file has", _dims(1 << 20, 1 << 10), "model.onnx", "[1048576, 1024]"),
    _model(
        "graph: nothing to quantize",
        small_model(helper.make_node("Relu", ["x"], ["y"]), weights={}),
        "nothing to quantize",
    ),
    _model(
        "graph: no embedding",
        small_model(helper.make_node("MatMul", ["x", "w"], ["y"]), weights={"w": _EYE}),
        "--embedding",
        "leave the option out",
        arguments="--gather_quantize_axis 1",
    ),
    _model(
        "graph: an output that nobody makes",
        small_model(helper.make_node("MatMul", ["x", "w"], ["z"]), weights={"w": _EYE}),
        "model.onnx",
        "'y'",
    ),
)

NUMBERS = (
    _model("NaN in a weight", weight_of_values(np.nan), "qkv_proj", "NaN or infinite"),
    _model("infinity in a weight", weight_of_values(np.inf), "qkv_proj", "NaN or infinite", arguments="--algo rtn_dq"),
    _model("NaN in a weight (rtn)", weight_of_values(np.nan), "qkv_proj", "NaN or infinite", arguments="--algo rtn"),
    _model("NaN in a weight (calibrate)", weight_of_values(np.nan), "NaN or infinite", command="calibrate"),
    _model("infinity in a weight (calibrate)", weight_of_values(np.inf), "NaN or infinite", command="calibrate"),
    _model("NaN in a gain", gain_of_values(np.nan), "layers.1/input_layernorm", "NaN or infinite", command="calibrate"),
    _model("infinity in a gain", gain_of_values(np.inf), "layers.1/input_layernorm", "NaN", command="calibrate"),
    _model("activations that overflow", weight_of_values(3e38), "NaN or infinite", command="calibrate"),
)

MODELS = (*FOLDERS, *CONFIGS, *EXTERNAL_DATA, *GRAPHS, *NUMBERS)
