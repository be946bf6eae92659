"""Give our loaders one file of bytes each: they must take them or raise UserError."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from stages.calibration.cache import CalibrationCache, find_cache
from stages.calibration.text.documents import open_documents
from stages.calibration.trt_profile import decoder_sizes
from stages.errors import UserError
from stages.model.directory import ModelDirectory, locate_model
from stages.model.load import load_graph
from stages.model.sites import find_embeddings, find_groups, find_sites, find_skipped_matmuls
from stages.model.unquantized import find_unquantized
from stages.model.weights import read_rows, read_weight
from stages.quantization.plan.plan_file import PlannedSite, plan_text, read_plan
from stages.quantization.weights.store import open_store
from tests.bad_input.mutations import Mutation, mutate_bytes, mutate_json, mutate_onnx, mutate_safetensors, mutate_text

_CPU = torch.device("cpu")
_TEXTS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A loader, and the file of a good folder that it is given changed."""

    name: str
    file: Path
    seed: bytes
    mutate: Mutation
    load: Callable[[], object]

    def survives(self, data: bytes) -> bool:
        """Say whether the loader takes ``data``, or refuses them with a sentence; anything else is raised."""
        self.file.write_bytes(data)
        try:
            self.load()
        except UserError as error:
            if not str(error).endswith("."):
                raise ValueError(f"this is no sentence: {error}") from error
            return False
        return True


def make_targets(base: Path, cache: Path, weights: Path, scratch: Path) -> dict[str, Target]:
    """Return the targets by name, on copies of a small model, its cache and its quantized weights in ``scratch``."""
    shutil.copytree(base, scratch / "base")
    shutil.copytree(cache, scratch / "cache")
    shutil.copytree(weights, scratch / "weights")
    directory = locate_model(scratch / "base")
    opened = _open_cache(scratch / "cache")
    sites = find_sites(load_graph(directory))
    plan = plan_text({site.name: PlannedSite(format="4b32") for site in sites})
    group, table = (min((scratch / "weights").glob(f"{kind}*.safetensors")) for kind in ("0", "embedding."))
    read_weights = partial(_read_store, scratch / "weights")
    files: Mapping[str, tuple[Path, bytes | None, Mutation, Callable[[], object]]] = {
        "graph": (directory.onnx_file, None, mutate_onnx, partial(_read_graph, directory)),
        "genai_config": (directory.genai_config_path, None, mutate_json, partial(_read_config, directory.folder)),
        "manifest": (scratch / "cache/manifest.json", None, mutate_json, partial(_read_cache, scratch / "cache")),
        "statistics": (
            scratch / "cache/0000.safetensors",
            None,
            mutate_safetensors,
            lambda: _open_cache(scratch / "cache").read(next(iter(opened.manifest.files))),
        ),
        "tokens": (
            scratch / "cache/tokens.safetensors",
            None,
            mutate_safetensors,
            lambda: _open_cache(scratch / "cache").read_tokens(),
        ),
        "recipe": (scratch / "weights/recipe.json", None, mutate_json, read_weights),
        "weights": (group, None, mutate_safetensors, read_weights),
        "table": (table, None, mutate_safetensors, read_weights),
        "plan": (
            scratch / "plan.toml",
            plan.encode(),
            mutate_text,
            partial(read_plan, scratch / "plan.toml", sites),
        ),
        "text": (scratch / "text.txt", _plain_text(), mutate_text, partial(_read_documents, scratch / "text.txt")),
        "jsonl": (scratch / "a.jsonl", _json_lines(), mutate_text, partial(_read_documents, scratch / "a.jsonl")),
        "parquet": (scratch / "a.parquet", _parquet(), mutate_bytes, partial(_read_documents, scratch / "a.parquet")),
    }
    return {
        name: Target(name=name, file=file, seed=seed or file.read_bytes(), mutate=mutate, load=load)
        for name, (file, seed, mutate, load) in files.items()
    }


# --------------------------------------------------------------------------- loaders


def _read_graph(directory: ModelDirectory) -> None:
    model = load_graph(directory)
    find_skipped_matmuls(model)
    for table in find_embeddings(model):
        read_rows(model, table, slice(0, 4), _CPU)
    find_unquantized(model, set())
    for group in find_groups(model):
        for site in group.sites:
            read_weight(model, site, _CPU)


def _read_config(folder: Path) -> None:
    decoder_sizes(locate_model(folder), None, trust_remote_code=False)


def _open_cache(folder: Path) -> CalibrationCache:
    opened = find_cache(folder)
    assert opened is not None, "a calibration cache"
    return opened


def _read_cache(folder: Path) -> None:
    cache = find_cache(folder)
    if cache is not None:
        for activation in cache.manifest.files:
            cache.read(activation)


def _read_store(folder: Path) -> None:
    store = open_store(folder)
    for index in range(len(store.recipe.groups)):
        store.read_group(index)
    for index in range(len(store.recipe.embeddings)):
        table = store.table_file(index)
        table.read_packed()
        table.read_scales()


def _read_documents(path: Path) -> None:
    for _ in islice(open_documents(str(path), 0).texts, _TEXTS):
        pass


# --------------------------------------------------------------------------- seeds without a folder


def _plain_text() -> bytes:
    return "One line of text.\nAnother, with umlauts: äöü.\n\n\nA second document.\n".encode()


def _json_lines() -> bytes:
    return b'{"text": "One line."}\n{"text": "Another.", "label": 3}\n{"text": null}\n'


def _parquet() -> bytes:
    import pyarrow
    from pyarrow import parquet

    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"text": ["One text.", "Another.", None], "label": [1, 2, 3]}), sink)
    return bytes(sink.getvalue())
