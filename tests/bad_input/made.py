"""List artifacts of an earlier stage that are damaged or belong to something else: caches, weights, plans."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.bad_input.edits import (
    DATA,
    folder_in_place_of,
    gone,
    in_turn,
    json_with,
    moved,
    shortened,
    tensors_with,
    written,
)
from tests.bad_input.row import BadInput, Command, Spoil

_CACHE, _MANIFEST = "base.calibration", "base.calibration/manifest.json"
_STATISTICS = "base.calibration/0000.safetensors"
_WEIGHTED = "base.calibration/weighted-0000.safetensors"
"""What a search reads."""
_STORE, _RECIPE = "weights", "weights/recipe.json"
_GROUP = "weights/0000.*.safetensors"
_TABLE = "weights/embedding.*.safetensors"


def _cache(name: str, spoil: Spoil, *words: str, command: Command = "quantize", algo: str = "awq_lite") -> BadInput:
    arguments = ("--algo", algo) if command == "quantize" else ("--cache_dir", _CACHE)
    return BadInput(name=f"cache: {name}", command=command, arguments=arguments, words=words, spoil=spoil)


def _statistics(name: str, value: torch.Tensor | None) -> Spoil:
    def change(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
        for part in ("calibration", "held_out"):
            tensors.pop(f"{part}.{name}", None)
            if value is not None:
                tensors[f"{part}.{name}"] = value

    return tensors_with(_WEIGHTED, change)


def _nan_in(name: str) -> Spoil:
    def change(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
        tensors[name].view(-1)[0] = float("nan")

    return tensors_with(_WEIGHTED, change)


def _other_weights(folder: Path) -> None:
    content = bytearray((folder / DATA).read_bytes())
    content[-1] ^= 1
    (folder / DATA).write_bytes(content)


CACHES = (
    _cache("a file", in_turn(moved(_CACHE, "away"), written(_CACHE, "x")), "base.calibration"),
    _cache("of another model", _other_weights, "base.calibration", "another model"),
    _cache("of another model (sweep)", _other_weights, "base.calibration", "another model", command="sweep"),
    _cache("of other text (calibrate)", gone(), "its text is", "--overwrite", command="calibrate"),
    _cache("manifest: no JSON", written(_MANIFEST, "{"), "manifest.json", "damaged"),
    _cache("manifest: no JSON (calibrate)", written(_MANIFEST, "{"), "manifest.json", "damaged", command="calibrate"),
    _cache("manifest: deep", written(_MANIFEST, "[" * 100_000), "manifest.json", "damaged"),
    _cache("manifest: not UTF-8", written(_MANIFEST, b"\xff\xfe"), "manifest.json", "damaged"),
    _cache("manifest: a later format", json_with(_MANIFEST, "format", value=99), "manifest.json", "99"),
    _cache("manifest: a folder", folder_in_place_of(_MANIFEST), "base.calibration"),
    _cache("manifest: no files", json_with(_MANIFEST, "files", value={}), "base.calibration", "no statistics"),
    _cache(
        "manifest: a file elsewhere",
        in_turn(
            moved(_STATISTICS, "elsewhere.safetensors"),
            json_with(
                _MANIFEST,
                "files",
                "/model/layers.0/input_layernorm/output_0",
                value="../elsewhere.safetensors",
            ),
        ),
        "manifest.json",
        "../elsewhere.safetensors",
    ),
    _cache("statistics missing", gone(_WEIGHTED), "weighted-0000.safetensors"),
    _cache("statistics truncated", shortened(_WEIGHTED), "weighted-0000.safetensors", "damaged"),
    _cache("statistics of noise", written(_WEIGHTED, bytes(range(256)) * 9), "0000.safetensors", "damaged"),
    _cache("statistics without means", _statistics("abs_mean", None), "0000.safetensors", "abs_mean"),
    _cache("statistics without a count", _statistics("num_tokens", None), "0000.safetensors", "num_tokens"),
    _cache("statistics without a matrix", _statistics("gram_triangle", None), "0000.safetensors", "gram"),
    _cache("means of another width", _statistics("abs_mean", torch.ones(48)), "0000.safetensors", "abs_mean"),
    _cache("means of integers", _statistics("abs_mean", torch.ones(64, dtype=torch.int64)), "0000.safetensors"),
    _cache("a matrix of another width", _statistics("gram_triangle", torch.ones(24, 49)), "0000.safetensors", "gram"),
    _cache("a matrix that is a vector", _statistics("gram_triangle", torch.ones(65)), "0000.safetensors", "gram"),
    _cache("a count of two numbers", _statistics("num_tokens", torch.ones(2).long()), "0000.safetensors", "num_tokens"),
    _cache("a count below 0", _statistics("num_tokens", torch.tensor(-4)), "0000.safetensors", "num_tokens"),
    _cache("NaN in a mean", _nan_in("calibration.abs_mean"), "0000.safetensors", "NaN"),
    _cache("NaN in a matrix", _nan_in("held_out.gram_triangle"), "0000.safetensors", "NaN"),
    BadInput(
        name="cache: tokens missing",
        command="sweep",
        spoil=gone("base.calibration/tokens.safetensors"),
        words=("tokens.safetensors", "missing"),
    ),
    BadInput(
        name="cache: tokens without held-out ones",
        command="sweep",
        spoil=tensors_with("base.calibration/tokens.safetensors", lambda tensors, _: tensors.__delitem__("held_out")),
        words=("tokens.safetensors", "held_out"),
    ),
    BadInput(
        name="cache: would replace the base",
        command="calibrate",
        arguments=("--cache_dir", "base", "--overwrite"),
        words=("--cache_dir", "base"),
    ),
    BadInput(
        name="cache: would replace a folder of other things",
        command="calibrate",
        spoil=written("documents/letter.txt", "dear"),
        arguments=("--cache_dir", "documents", "--overwrite"),
        words=("--cache_dir", "documents"),
    ),
    BadInput(
        name="cache: would replace the work folder",
        command="calibrate",
        arguments=("--cache_dir", ".", "--overwrite"),
        words=("--cache_dir",),
    ),
)


def _store(name: str, spoil: Spoil, *words: str, arguments: str = "") -> BadInput:
    return BadInput(
        name=f"weights: {name}", command="export", words=words, spoil=spoil, arguments=tuple(arguments.split())
    )


def _group(part: str, value: torch.Tensor | None) -> Spoil:
    """Change or remove a part of the first site."""

    def change(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
        name = next(name for name in tensors if name.endswith(f":{part}"))
        del tensors[name]
        if value is not None:
            tensors[name] = value

    return tensors_with(_GROUP, change)


def _metadata(key: str, value: str | None) -> Spoil:
    def change(_: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        metadata.pop(key)
        if value is not None:
            metadata[key] = value

    return tensors_with(_GROUP, change)


def _scales(fill: float) -> Spoil:
    def change(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
        name = next(name for name in tensors if name.endswith(":scales"))
        tensors[name].fill_(fill)

    return tensors_with(_GROUP, change)


def _table(name: str, value: torch.Tensor | None) -> Spoil:
    def change(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
        del tensors[name]
        if value is not None:
            tensors[name] = value

    return tensors_with(_TABLE, change)


STORES = (
    _store("no such folder", gone(), "nothing", "is not a folder", arguments="--weights_path nothing"),
    _store("a file", gone(), "text.txt", "is not a folder", arguments="--weights_path text.txt"),
    _store("of another base", _other_weights, "weights", "another model"),
    _store("recipe: no JSON", written(_RECIPE, "{"), "recipe.json"),
    _store("recipe: deep", written(_RECIPE, "[" * 100_000), "recipe.json"),
    _store("recipe: a list", written(_RECIPE, "[]"), "recipe.json"),
    _store(
        "recipe: nothing in it",
        in_turn(json_with(_RECIPE, "groups", value=[]), json_with(_RECIPE, "embeddings", value=[])),
        "recipe.json",
        "groups",
    ),
    _store("recipe: a group without sites", json_with(_RECIPE, "groups", 0, "sites", value=[]), "recipe.json", "site"),
    _store(
        "recipe: a site that isn't in the graph",
        json_with(_RECIPE, "groups", 0, "sites", 0, "output", value="nowhere"),
        "nowhere",
    ),
    _store(
        "recipe: a site of another shape",
        json_with(_RECIPE, "groups", 0, "sites", 0, "in_features", value=48),
        "weights/0000.",
    ),
    _store(
        "recipe: a site of 2^60 inputs",
        json_with(_RECIPE, "groups", 0, "sites", 0, "in_features", value=1 << 60),
        "weights/0000.",
    ),
    _store(
        "recipe: no inputs", json_with(_RECIPE, "groups", 0, "sites", 0, "in_features", value=0), "recipe.json", "sizes"
    ),
    _store(
        "recipe: an accuracy level in words",
        json_with(_RECIPE, "session_options", value=[["session.qdq_matmulnbits_accuracy_level", "best"]]),
        "recipe.json",
        "best",
    ),
    _store("a group missing", gone(_GROUP), "0000.", "complete"),
    _store("a group truncated", shortened(_GROUP), "0000.", "damaged"),
    _store(
        "a group of noise",
        written("weights/0000.model.layers.0.attn.qkv_proj.MatMul.safetensors", b"\x01" * 99),
        "0000.",
    ),
    _store(
        "a group that is a folder",
        folder_in_place_of("weights/0000.model.layers.0.attn.qkv_proj.MatMul.safetensors"),
        "0000.",
    ),
    _store("a group without formats", _metadata("specs", None), "0000.", "specs"),
    _store("formats that are no JSON", _metadata("specs", "{"), "0000."),
    _store("formats of other sites", _metadata("specs", "{}"), "0000."),
    _store("no codes", _group("codes", None), "0000.", "codes"),
    _store("no scales", _group("scales", None), "0000.", "scales"),
    _store("no zero points", _group("zero_points", None), "0000.", "zero_points"),
    _store("codes of another shape", _group("codes", torch.zeros(8, 8, dtype=torch.uint8)), "0000.", "codes"),
    _store("codes in one row", _group("codes", torch.zeros(64 * 128, dtype=torch.uint8)), "0000.", "codes"),
    _store("codes of floats", _group("codes", torch.zeros(128, 64)), "0000.", "codes"),
    _store("codes beyond 4 bits", _group("codes", torch.full((128, 64), 77, dtype=torch.uint8)), "0000.", "codes"),
    _store("scales of another shape", _group("scales", torch.ones(128, 3)), "0000.", "scales"),
    _store("scales of another type", _group("scales", torch.ones(128, 2).double()), "0000.", "scales"),
    _store("NaN scales", _scales(float("nan")), "0000.", "NaN"),
    _store("zero points of another shape", _group("zero_points", torch.ones(1, 1).byte()), "0000.", "zero_points"),
    _store("zero points beyond 4 bits", _group("zero_points", torch.full((128, 2), 99).byte()), "0000.", "zero_points"),
    _store("a table missing", gone(_TABLE), "embedding."),
    _store("a table truncated", shortened(_TABLE), "embedding.", "damaged"),
    _store("a table without scales", _table("scales", None), "embedding.", "scales"),
    _store("a table of other bytes", _table("packed", torch.zeros(7, dtype=torch.uint8)), "embedding.", "packed"),
    _store("a table of another type", _table("packed", torch.zeros(9600, dtype=torch.int32)), "embedding.", "packed"),
    _store("a table with scales of another shape", _table("scales", torch.ones(3, 3)), "embedding.", "scales"),
    _store("output inside them", gone(), "--output_path", "weights", arguments="--output_path weights --overwrite"),
    BadInput(
        name="weights: another run's",
        command="quantize",
        arguments=("--weights_path", "weights"),
        words=("weights", "another run", "--overwrite"),
    ),
    BadInput(
        name="weights: a folder of other things",
        command="quantize",
        arguments=("--weights_path", "base", "--overwrite"),
        words=("--weights_path", "base", "recipe.json"),
    ),
    BadInput(
        name="weights: that hold the base",
        command="quantize",
        spoil=moved("base", "weights/base"),
        arguments=("--onnx_path", "weights/base", "--weights_path", "weights", "--overwrite"),
        words=("--weights_path", "weights/base"),
    ),
)


def _plan(name: str, content: str | bytes, *words: str) -> BadInput:
    return BadInput(
        name=f"plan: {name}",
        command="quantize",
        arguments=("--plan", "plan.toml"),
        spoil=written("plan.toml", content),
        words=("--plan plan.toml", *words),
    )


PLANS = (
    _plan("no TOML", "[sites", "not valid TOML"),
    _plan("empty", "", "[sites]"),
    _plan("not UTF-8", b"\xff\xfe", "UTF-8"),
    _plan("another table", "[other]\nx = 1", "[sites]"),
    _plan("a line that is no table", "[sites]\nx = 1", "[sites]"),
    _plan("an unknown site", '[sites]\nnowhere = { format = "4b32" }', "nowhere"),
    _plan("an unknown format", '[sites]\n"/lm_head/MatMul" = { format = "3b32" }', "3b32"),
    _plan("a format that is a number", '[sites]\n"/lm_head/MatMul" = { format = 4 }', "format"),
    _plan("brackets without end", "[sites]\nx = " + "[" * 100_000, "nested too deeply"),
    _plan("a site of quotes and lines", '[sites]\n"a\\nb\\"c" = { format = "4b32" }', "no site"),
    _plan("only some sites", '[sites]\n"/lm_head/MatMul" = { format = "keep" }', "says nothing about"),
)

MADE = (*CACHES, *STORES, *PLANS)
