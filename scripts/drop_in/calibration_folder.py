"""Name a folder for each calibration: the name holds a digest of everything that the statistics depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path

from scripts.options import DropInConfig
from stages.calibration.text.documents import DEFAULT_DATASET
from stages.calibration.text.mix import dataset_names
from stages.commands.calibrate_options import CalibrateConfig
from stages.commands.options import default_folder
from stages.errors import UserError
from stages.model.directory import locate_model
from stages.model.load import fingerprint_model
from stages.runtime.providers import choose_providers
from stages.system.atomic import require_creatable

_DIGITS = 10
# A new option counts unless it is named here.
_WITHOUT_EFFECT = frozenset(
    {"onnx_path", "cache_dir", "overwrite", "device", "batch_size", "add_position_ids", "trust_remote_code", "printing"}
)
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "chat_template*")


def calibration_folder(config: DropInConfig) -> Path:
    """Return where the statistics that ``config`` asks for lie, or will: beside the base model.

    Where no folder can be made there, beside the output, which must be writable anyway.

    Raises:
        UserError: there is no model, or an execution provider is unknown.
    """
    name = f".{_digest(config)}.calibration"
    folder = default_folder(config.onnx_path, name)
    try:
        require_creatable(folder, option="--cache_dir")
    except UserError:
        return folder if folder.is_dir() else default_folder(config.output_path, name)
    return folder


def _digest(config: CalibrateConfig) -> str:
    directory = locate_model(config.onnx_path)
    named = {
        field.name: str(getattr(config, field.name))
        for field in fields(CalibrateConfig)
        if field.name not in _WITHOUT_EFFECT
    }
    named |= {
        "model": fingerprint_model(directory),
        "calibration_eps": ",".join(choose_providers(config.calibration_eps).names),
        "text": _digest_of(_text_files(config.dataset or DEFAULT_DATASET)),
        "tokenizer": _digest_of(_tokenizer_files(Path(config.model_name or directory.folder))),
    }
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def _text_files(dataset: str) -> Iterator[Path]:
    yield from filter(Path.is_file, map(Path, dataset_names(dataset)))


def _tokenizer_files(source: Path) -> Iterator[Path]:
    """Yield the files of a local folder that decide how text becomes tokens; a hub name has none."""
    if source.is_dir():
        yield from (f for f in sorted(source.iterdir()) if any(fnmatch(f.name, kind) for kind in _TOKENIZER_FILES))


def _digest_of(files: Iterator[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
