"""Checkpoint folders in the spelling that onnxruntime-genai's builder reads.

transformers 5 keeps one set of rotation parameters for each kind of layer of Gemma 3, also where config.json has
transformers 4's flat names. onnxruntime-genai 0.18 looks for one set, and for the sliding layers' base beside it
(KeyError: 'rope_type'). Both read a config.json that holds both spellings.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from stages.errors import UserError

_CONFIG = "config.json"
_LAYERED_ROPE = "gemma3_text"
_FLAT_NAMES = ("rope_theta", "rope_local_base_freq", "rope_scaling")


def as_builder_input(folder: Path, scratch: Path) -> Path:
    """``folder`` itself, or ``scratch`` with links to its files and another config.json where the builder needs one.

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
            f"--source has rotations of type '{everywhere['rope_type']}' in its full attention alone, which "
            "onnxruntime-genai's builder would apply to sliding layers too; use a Gemma 3 of at most 1B parameters."
        )
    return {**layered, **everywhere, "rope_local_base_freq": sliding["rope_theta"]}
