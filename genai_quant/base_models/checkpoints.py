"""Find a model's checkpoint and make a Hugging Face folder of it that the model builder reads.

GGUF files are dequantized, and Gemma 3's configuration is spelled as the builder reads it.
"""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from genai_quant.base_models.off_grid import move_off_grid
from genai_quant.base_models.packaged_gguf import PACKAGED
from stages.calibration.text.tokenizer import hub_reason, why_unreachable
from stages.commands.parsing import suggestion
from stages.errors import UserError

_CONFIG = "config.json"
_LAYERED_ROPE = "gemma3_text"
"""Its sliding layers have a rotation of their own."""
_OTHER_FORMATS = ["*.gguf", "*.onnx*", "onnx/*", "*.h5", "*.msgpack", "*.ot", "*.pth", "original/*", "consolidated*"]
_PICKLED = ["*.bin", "*.pt"]
_FLAT_NAMES = ("rope_theta", "rope_local_base_freq", "rope_scaling")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedCheckpoint:
    """A GGUF file that Python packages carry."""

    source: str
    """Its name in ``packaged_gguf.PACKAGED``."""


Checkpoint = HubCheckpoint | FolderCheckpoint | GgufCheckpoint | PackagedCheckpoint


def find_checkpoint(source: str) -> Checkpoint:
    """Return the checkpoint that SOURCE names.

    Raises:
        UserError: a folder or file isn't there, or is something else.
    """
    path = Path(source)
    if source in PACKAGED:
        return PackagedCheckpoint(source=source)
    if path.suffix == ".gguf" and path.is_file():
        return GgufCheckpoint(file=path.absolute())
    if path.is_dir():
        if not (path / _CONFIG).is_file():
            raise UserError(f"SOURCE {source} holds no {_CONFIG}; pass a Hugging Face folder or a .gguf file.")
        return FolderCheckpoint(folder=path.absolute())
    if path.suffix == ".gguf" or path.is_absolute() or source.count("/") != 1:
        otherwise = (
            f"pass {', '.join(PACKAGED)}, a Hugging Face folder, a .gguf file, or a hub name such as "
            "HuggingFaceTB/SmolLM2-135M-Instruct."
        )
        raise UserError(f"SOURCE {source} does not exist; {suggestion(source, PACKAGED, otherwise)}")
    return HubCheckpoint(name=source)


def download(name: str) -> Path:
    """Return the folder in the hub's own cache that holds the model ``name``, downloaded where it isn't there yet.

    Raises:
        UserError: the hub can't be reached, or doesn't give the model.
    """
    try:
        folder = Path(snapshot_download(name, ignore_patterns=[*_OTHER_FORMATS, *_PICKLED]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, ignore_patterns=_OTHER_FORMATS))
    except Exception as error:  # the hub's library and the HTTP library each raise their own
        raise UserError(f"SOURCE {name} can't be downloaded ({_why(name, error)}).") from error
    return folder


def _why(name: str, error: Exception) -> str:
    unreachable = why_unreachable(name, "model") if isinstance(error, LocalEntryNotFoundError) else None
    if unreachable is None and not isinstance(error, OfflineModeIsEnabled):
        return hub_reason(error)
    reason = unreachable or "HF_HUB_OFFLINE is set and the hub's cache doesn't hold it"
    return f"{reason}; check the network, or pass a Hugging Face folder, a .gguf file, {' or '.join(PACKAGED)}"


def dequantize_gguf(file: Path, folder: Path, *, keep_grid: bool) -> str:
    """Write a GGUF model and its tokenizer to ``folder`` as a plain float32 checkpoint; say how it differs.

    Raises:
        UserError: transformers can't read the file, or its architecture can't be moved off its grid.
    """
    model = _load_gguf(file)
    was_tied = model.config.tie_word_embeddings
    if not keep_grid:
        move_off_grid(model)
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    if keep_grid:
        return "dequantized from a GGUF file, so most weights lie on its 4-bit grid"
    untied = "; lm_head is no longer tied to the embedding" if was_tied and not model.config.tie_word_embeddings else ""
    return f"dequantized from a GGUF file; weights moved off its 4-bit grid, which leaves the answers alone{untied}"


def _load_gguf(file: Path) -> PreTrainedModel:
    try:
        # transformers shows one bar while it dequantizes and another while it loads.
        with contextlib.redirect_stderr(io.StringIO()):
            loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except Exception as error:  # gguf, transformers and torch each raise their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"SOURCE {file} can't be read as GGUF ({reason}); pass another file.") from error
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # The loaded model still counts as quantized; a fresh one of its class holds the same numbers and nothing else.
    model: PreTrainedModel = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    return model


def as_builder_input(folder: Path, scratch: Path) -> Path:
    """Return ``folder`` itself, or ``scratch`` with links to its files and a config.json that the builder reads.

    Raises:
        UserError: the model scales its rotation in a way that the builder would also apply to its sliding layers.
    """
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    if config.get("model_type") != _LAYERED_ROPE or "rope_type" in (config.get("rope_parameters") or {}):
        return folder
    scratch.mkdir()
    for file in folder.iterdir():
        if file.name != _CONFIG:
            (scratch / file.name).symlink_to(file.absolute())
    readable = {name: value for name, value in config.items() if name not in _FLAT_NAMES}
    readable["rope_parameters"] = _both_spellings(AutoConfig.from_pretrained(folder).rope_parameters)
    (scratch / _CONFIG).write_text(json.dumps(readable, indent=2), encoding="utf-8")
    return scratch


def _both_spellings(layered: dict[str, dict[str, Any]]) -> dict[str, Any]:
    everywhere, sliding = layered["full_attention"], layered["sliding_attention"]
    if everywhere["rope_type"] != "default":
        raise UserError(
            f"SOURCE has rotations of type '{everywhere['rope_type']}' only in its full attention, and "
            "onnxruntime-genai's builder would apply them to all layers; use a Gemma 3 of at most 1B parameters."
        )
    return {**layered, **everywhere, "rope_local_base_freq": sliding["rope_theta"]}
