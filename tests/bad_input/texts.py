"""List calibration texts and tokenizers that can't be used."""

from __future__ import annotations

import json

from tests.bad_input.edits import LFS_POINTER, gone, in_turn, json_with, shortened, written
from tests.bad_input.row import BadInput, Spoil, nothing

_TOKENIZER = "base/tokenizer.json"


def _text(name: str, spoil: Spoil, *words: str, arguments: str = "") -> BadInput:
    return BadInput(
        name=f"text: {name}", command="calibrate", words=words, spoil=spoil, arguments=tuple(arguments.split())
    )


def _file(name: str, file: str, content: str | bytes, *words: str) -> BadInput:
    return _text(name, written(file, content), file, *words, arguments=f"--dataset {file}")


TEXTS = (
    _text("no such file", nothing, "--dataset no.txt", "does not exist", arguments="--dataset no.txt"),
    _text("no such data set", nothing, "--dataset wikitex", "cnn", "offline", arguments="--dataset wikitex"),
    _text("a folder", nothing, "--dataset base", arguments="--dataset base"),
    _text("a folder called .txt", lambda folder: (folder / "a.txt").mkdir(), "a.txt", arguments="--dataset a.txt"),
    _file("empty", "e.txt", "", "windows", "--calib_size"),
    _file("blank lines", "e.txt", "\n \n\n\t\n" * 9, "windows", "--calib_size"),
    _file("a few words", "e.txt", "A few words only.", "1 window of", "--calib_size"),
    _file("not UTF-8", "e.txt", b"caf\xe9 " * 99, "UTF-8"),
    _file("UTF-16 without its mark", "e.txt", "words ".encode("utf-16-le") * 99, "UTF-8", "UTF-16"),
    _file("jsonl: not UTF-8", "e.jsonl", b'{"text": "caf\xe9"}\n' * 9, "line 1", "UTF-8"),
    _file("jsonl: empty", "e.jsonl", "", "e.jsonl"),
    _file("jsonl: no JSON", "e.jsonl", "{\n", "jsonl"),
    _file("jsonl: a list a line", "e.jsonl", "[1, 2]\n" * 9, "e.jsonl"),
    _file("jsonl: no text", "e.jsonl", '{"label": 1}\n' * 9, "label", "text"),
    _file("jsonl: numbers", "e.jsonl", '{"text": 1}\n' * 9, "text", "int"),
    _file("jsonl: lists", "e.jsonl", '{"text": ["a"]}\n' * 9, "text", "list"),
    _file("jsonl: nothing in the texts", "e.jsonl", '{"text": null}\n{"text": ""}\n' * 9, "windows"),
    _file("jsonl: half a line", "e.jsonl", '{"text": "words words"}\n{"text": "wor', "jsonl"),
    _file("jsonl: deep", "e.jsonl", '{"text": ' + "[" * 50_000 + "]" * 50_000 + "}\n", "jsonl"),
    _file("parquet: noise", "e.parquet", b"PAR1" + bytes(range(256)) + b"PAR1", "parquet"),
    _file("parquet: empty", "e.parquet", b"", "parquet"),
    _text("too little for the windows", nothing, "--calib_size is 100000", arguments="--calib_size 100000"),
    _text("no tokenizer", gone("base/tok*", "base/special*", "base/chat*"), "base", "--model_name"),
    _text("tokenizer: truncated", shortened(_TOKENIZER), "base", "--model_name"),
    _text("tokenizer: a pointer of Git LFS", written(_TOKENIZER, LFS_POINTER), "tokenizer.json", "git lfs pull"),
    _text("tokenizer: a list", written(_TOKENIZER, "[]"), "base", "--model_name"),
    _text(
        "tokenizer: code of its own",
        in_turn(
            gone("base/tokenizer.json"),
            written(
                "base/tokenizer_config.json",
                json.dumps({"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}),
            ),
            written("base/own.py", 'open("ran", "w").write("owned")\nclass Own: pass\n'),
        ),
        "base",
        "--model_name",
    ),
    _text("tokenizer: of no such folder", nothing, "/nowhere", arguments="--model_name /nowhere/at/all"),
    _text(
        "tokenizer: a larger vocabulary",
        json_with("base/genai_config.json", "model", "vocab_size", value=100),
        "vocabulary has 100",
        "--model_name",
    ),
)
