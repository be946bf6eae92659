"""Save tiny random models as Hugging Face folders, and run onnxruntime-genai's builder on them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import transformers

from scripts.architectures import stand_ins
from scripts.architectures.configs import Architecture

_WIDE = ("embed", "lm_head", "output.weight", "output_layer", "router", "sinks", "gate.weight", "conv")
"""Parameters as wide as the embedding; all other matrices add less than it holds."""
_AS_THEY_ARE = ("A_log", "dt_bias", "layer_scalar", "per_expert_scale", "router.scale", "std_bias", "std_scale")
_OUTPUTS = ("proj.weight", "w1.weight", "w2.weight", "w3.weight", "dense.weight", "fc1.weight", "fc2.weight")


def save_architecture(architecture: Architecture, folder: Path, tokenizer: Path) -> None:
    """Save a tiny random model of ``architecture`` with a tokenizer as a Hugging Face folder."""
    config = architecture.config()
    place = stand_ins if architecture.is_stand_in else transformers
    made = getattr(place, architecture.auto_class)
    model = made(config) if not hasattr(made, "from_config") else made.from_config(config)
    draw_weights(model, architecture.width)
    weights = {architecture.prefix + name.removeprefix("model."): weight for name, weight in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=weights if architecture.prefix else None)
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    file = folder / "config.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    written |= {"architectures": [architecture.name.partition(" (")[0]], **architecture.written}
    if architecture.is_stand_in:
        code = Path(stand_ins.__file__)
        shutil.copy(code, folder)
        of_code = {"AutoConfig": "StandInConfig", "AutoModelForCausalLM": architecture.auto_class}
        written["auto_map"] = {auto: f"{code.stem}.{name}" for auto, name in of_code.items()}
    file.write_text(json.dumps(written, indent=1), encoding="utf-8")


def draw_weights(model: torch.nn.Module, width: float) -> None:
    """Draw weights by which predictions are neither flat nor certain.

    The embedding and head are wide enough for an entropy of some nats less than uniform: a KL divergence then means
    something. Gains are drawn around one whichever way the family stores them (Gemma and Nemotron keep gain - 1). Each
    layer's outputs have unlike sizes, so that every activation has channels that matter more and an input scale pays.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(_AS_THEY_ARE):
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                # Fresh models hold gains of one, or of zero where one is added; biases are zero.
                parameter.copy_(parameter.mean().round() + 0.3 * noise)
            else:
                # Layers add less than the embedding holds, so that all of them don't drown the logits in rounding.
                wide = any(part in name for part in _WIDE) and "proj" not in name
                parameter.copy_((width if wide else 0.05) * noise)
            if name.endswith(_OUTPUTS) and parameter.dim() > 1:
                sizes = torch.exp(0.7 * torch.randn(len(parameter), 1, generator=generator))
                parameter.mul_(sizes.reshape(-1, *[1] * (parameter.dim() - 1)))
