"""List places for results that can't be used: folders that are taken, can't be made, or have no room."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.bad_input.edits import copied, folder_in_place_of, in_turn, json_with, linked, written
from tests.bad_input.row import BadInput, Command, Spoil, nothing

_LONG = "n" * 300


def _place(name: str, spoil: Spoil, *words: str, command: Command = "quantize", arguments: str = "") -> BadInput:
    return BadInput(
        name=f"place: {name}", command=command, words=words, spoil=spoil, arguments=tuple(arguments.split())
    )


def _without_rights(*names: str, rights: int = 0o555) -> Spoil:
    """Nobody but root is stopped by rights."""

    def spoil(folder: Path) -> None:
        if not hasattr(os, "geteuid") or os.geteuid() == 0:
            pytest.skip("root may write and read everywhere")
        for name in names:
            (folder / name).chmod(rights)

    return spoil


def _full(
    name: str, largest_file: int, *words: str, command: Command, arguments: str = "", stays: str = ""
) -> BadInput:
    return BadInput(
        name=f"full disk: {name}",
        command=command,
        words=words,
        largest_file=largest_file,
        arguments=tuple(arguments.split()),
        stays=tuple(stays.split()),
    )


TAKEN = (
    _place("output: the base", nothing, "--output_path", "base model", arguments="--output_path base --overwrite"),
    _place("output: holds the base", nothing, "--output_path", arguments="--output_path . --overwrite"),
    _place("output: exists", written("out/model.onnx", "x"), "--output_path", "out", "--overwrite"),
    _place("output: a file", written("out", "x"), "--output_path", "out"),
    _place("output: a file, replaced", written("out", "x"), "--output_path", "out", arguments="--overwrite"),
    _place("output: no earlier output", written("out/a", "x"), "--output_path", "won't", arguments="--overwrite"),
    _place("output: exists (export)", written("out/model.onnx", "x"), "--output_path", "--overwrite", command="export"),
    _place("output: below a file", nothing, "--output_path", arguments="--output_path text.txt/out"),
    _place(
        "output: below a file (export)",
        nothing,
        "--output_path",
        command="export",
        arguments="--output_path text.txt/o",
    ),
    _place("output: a dangling link", linked("out", "nowhere"), "--output_path", "out"),
    _place("output: a link to the base", linked("out", "base"), "--output_path", arguments="--overwrite"),
    _place("output: a name of 300", nothing, "--output_path", "too long", arguments=f"--output_path {_LONG}"),
    _place(
        "output: a name of 300 (export)",
        nothing,
        "--output_path",
        "too long",
        command="export",
        arguments=f"--output_path {_LONG}",
    ),
    _place("output: in /proc", nothing, "/proc/out", arguments="--output_path /proc/out"),
    _place(
        "output: another component of the base",
        in_turn(
            copied("base/model.onnx", "base/other.onnx"),
            json_with("base/genai_config.json", "model", "vision", value={"filename": "other.onnx"}),
        ),
        "other.onnx",
        command="export",
        arguments="--output_path out/other.onnx",
    ),
    _place("weights: below a file", nothing, "--weights_path", arguments="--weights_path text.txt/w"),
    _place("weights: a file", nothing, "--weights_path", arguments="--weights_path text.txt"),
    _place("weights: a name of 300", nothing, "--weights_path", "too long", arguments=f"--weights_path {_LONG}"),
    _place("weights: the output itself", nothing, "quantized weights", "--output_path", arguments="--weights_path out"),
    _place(
        "weights: inside the output", nothing, "quantized weights", "--output_path", arguments="--weights_path out/w"
    ),
    _place("weights: in the base", nothing, "--weights_path", arguments="--weights_path base"),
    _place("cache: below a file", nothing, "--cache_dir", command="calibrate", arguments="--cache_dir text.txt/c"),
    _place("cache: a file", nothing, "--cache_dir", command="calibrate", arguments="--cache_dir text.txt"),
    _place(
        "cache: a file, replaced",
        nothing,
        "--cache_dir",
        command="calibrate",
        arguments="--cache_dir text.txt --overwrite",
    ),
    _place(
        "cache: a name of 300",
        nothing,
        "--cache_dir",
        "too long",
        command="calibrate",
        arguments=f"--cache_dir {_LONG}",
    ),
    _place("cache: a dangling link", linked("new", "nowhere"), "--cache_dir", command="calibrate"),
    _place("cache: in /proc", nothing, "--cache_dir", command="calibrate", arguments="--cache_dir /proc/c"),
    _place("sweep: a file", nothing, "--output", command="sweep", arguments="--output text.txt --no_evaluation"),
    _place("sweep: below a file", nothing, "--output", command="sweep", arguments="--output text.txt/s"),
    _place("sweep: a name of 300", nothing, "--output", command="sweep", arguments=f"--output {_LONG}"),
)

RIGHTS = (
    _place("no right to write output", _without_rights("."), "--output_path"),
    _place("no right to write a cache", _without_rights("."), "--cache_dir", command="calibrate"),
    _place(
        "no right to write weights",
        in_turn(folder_in_place_of("w"), _without_rights("w")),
        "--weights_path",
        arguments="--weights_path w/in",
    ),
    _place("no right to read the graph", _without_rights("base/model.onnx", rights=0), "model.onnx", "right to read"),
    _place(
        "no right to read data", _without_rights("base/model.onnx.data", rights=0), "model.onnx.data", "right to read"
    ),
    _place(
        "no right to read a cache",
        _without_rights("base.calibration/0000.safetensors", rights=0),
        "0000.safetensors",
        arguments="--algo awq_lite",
    ),
    _place(
        "no right to read weights", _without_rights("weights/recipe.json", rights=0), "recipe.json", command="export"
    ),
)

FULL = (
    _full("statistics", 3000, "cache", "--cache_dir", command="calibrate"),
    _full("tokens", 100, "cache", "--cache_dir", command="calibrate"),
    _full("what parts hand over", 1000, "cache", "--cache_dir", command="calibrate", arguments="--max_memory 200KB"),
    _full("recipe", 100, "--weights_path", "out.weights", command="quantize"),
    _full("weights", 7000, "--weights_path", "out.weights", command="quantize", stays="out.weights"),
    _full(
        "embedding",
        14000,
        "--weights_path",
        "out.weights",
        command="quantize",
        arguments="--gather_quantize_axis 1 --gather_block_size 16",
        stays="out.weights",
    ),
    _full("output", 30000, "--output_path", "out", command="export"),
    _full("graph", 100, "--output_path", "out", command="export"),
    _full("weights kept, output not", 60000, "--output_path", "out", command="quantize", stays="out.weights"),
    _full("logits", 1000, "TMPDIR", command="sweep", stays="swept"),
)

PLACES = (*TAKEN, *RIGHTS, *FULL)
