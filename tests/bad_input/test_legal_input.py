"""Legal input that looks odd works: links, spaces, other alphabets, long paths, names that look like paths."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from tests.bad_input.edits import graph_with
from tests.bad_input.row import USUAL, tree
from tests.support.commands import Commands
from tests.support.written import fused_sites

_LONG = "/".join(["a_folder_with_a_name_of_forty_characters"] * 7)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["with two spaces/[bold]/größe/模型/д", _LONG], ids=["odd", "long"])
def test_odd_places(place: str, work_folder: Path, commands: Commands) -> None:
    (work_folder / place).parent.mkdir(parents=True)
    (work_folder / "base").rename(work_folder / place)
    (work_folder / "text.txt").rename(work_folder / "überblick 文.txt")
    base, cache, weights = work_folder / place, f"{place}.c", f"{place}.w"
    assert len(str(base)) >= 300 or place != _LONG
    text = ("--dataset", "überblick 文.txt", "--calib_size", 4, "--seq_len", 16)
    code, printed = commands.calibrate("--onnx_path", base, "--cache_dir", cache, *text)
    assert code == 0, printed
    quantize = ("--onnx_path", base, "--output_path", f"{place}.q", "--cache_dir", cache, "--weights_path", weights)
    code, printed = commands.quantize(*quantize, "--algo", "awq_lite", "--block_size", 32)
    assert code == 0, printed
    code, printed = commands.export("--onnx_path", base, "--weights_path", weights, "--output_path", f"{place}.e")
    assert code == 0, printed


def test_links_to_folders_and_side_files(work_folder: Path, commands: Commands) -> None:
    (work_folder / "base").rename(work_folder / "real")
    (work_folder / "base").symlink_to("real")
    (work_folder / "real/tokenizer.json").rename(work_folder / "tokenizer.json")
    (work_folder / "real/tokenizer.json").symlink_to(work_folder / "tokenizer.json")
    (work_folder / "elsewhere").mkdir()
    (work_folder / "out").symlink_to("elsewhere")
    before = tree(work_folder / "real")
    assert commands.calibrate(*USUAL["calibrate"])[0] == 0
    code, printed = commands.quantize(*USUAL["quantize"])
    assert code == 0, printed
    assert (work_folder / "out").is_symlink()
    assert (work_folder / "elsewhere/model.onnx").is_file()
    assert (work_folder / "elsewhere/tokenizer.json").read_bytes() == (work_folder / "tokenizer.json").read_bytes()
    assert tree(work_folder / "real") == before


def test_sizes_that_declarations_of_weights_leave_open(work_folder: Path, commands: Commands) -> None:
    def leave_open(model) -> None:
        for tensor in model.graph.initializer:
            shape = ["any"] * len(tensor.dims)
            model.graph.value_info.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, shape))

    graph_with(leave_open)(work_folder)
    code, printed = commands.quantize(*USUAL["quantize"])
    assert code == 0, printed
    assert fused_sites(work_folder / "out") == (10, 10)


@pytest.mark.parametrize("name", ["../../escaped", "/escaped", "..", "a/../../b", "x" * 300, "a\\b:c*?", "模型"])
def test_nothing_is_written_outside_whatever_nodes_are_called(name: str, work_folder: Path, commands: Commands) -> None:
    def rename(model) -> None:
        for node in model.graph.node:
            if node.op_type == "MatMul" and "qkv" in node.name:
                node.name = f"{name}{node.name[-40:]}" if len(name) < 300 else f"{name}{node.name}"
        old = next(tensor.name for tensor in model.graph.initializer if "embed" in tensor.name)
        for tensor in model.graph.initializer:
            tensor.name = name if tensor.name == old else tensor.name
        for node in model.graph.node:
            node.input[:] = [name if value == old else value for value in node.input]
        kept = [value for value in model.graph.value_info if value.name != old]
        del model.graph.value_info[:]
        model.graph.value_info.extend(kept)

    graph_with(rename)(work_folder)
    around, before = tree(work_folder.parent), tree(work_folder)
    code, printed = commands.quantize(*USUAL["quantize"], "--gather_quantize_axis", 1)
    assert code == 0, printed
    new = tree(work_folder).keys() - before.keys()
    assert {path.split("/")[0] for path in new} == {"out", "out.weights"}
    assert all(path.startswith("work/out") for path in tree(work_folder.parent).keys() - around.keys())


def test_a_byte_order_mark_nested_rows_and_odd_characters_are_read(work_folder: Path, commands: Commands) -> None:
    row = json.dumps({"text": "half a \ud83d, \0 and more words " * 40, "more": {"nested": [1, [2]]}})
    (work_folder / "rows.jsonl").write_text("\ufeff" + f"{row}\n\n" * 9, encoding="utf-8")
    code, printed = commands.calibrate(*USUAL["calibrate"], "--dataset", "rows.jsonl")
    assert code == 0, printed


def test_an_output_is_replaced_where_that_is_asked_for(work_folder: Path, commands: Commands) -> None:
    assert commands.quantize(*USUAL["quantize"])[0] == 0
    before = (work_folder / "out/model.onnx.data").read_bytes()
    code, printed = commands.quantize(*USUAL["quantize"], "--block_size", 32, "--overwrite")
    assert code == 0, printed
    assert (work_folder / "out/model.onnx.data").read_bytes() != before
