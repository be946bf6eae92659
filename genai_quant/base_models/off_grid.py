"""Move a model's weights off their old 4-bit grid, its function unchanged.

A checkpoint dequantized from GGUF has a few values in each block of 32; a quantizer with the same blocks recovers them
exactly, which says nothing about it. How weights can change while the function stays depends on the architecture; the
equations are in ``equivalent_weights``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from genai_quant.base_models.equivalent_weights import change_channels, rotate_residual_stream
from stages.errors import UserError

_CHANGES: dict[str, Callable[[nn.Module, torch.Generator], None]] = {
    "llama": rotate_residual_stream,
    "mistral": rotate_residual_stream,
    "qwen2": rotate_residual_stream,
    "qwen3": rotate_residual_stream,
    "gemma2": change_channels,
    "gemma3_text": change_channels,
}
_PROBE_TOKENS = 32
# Float32 arithmetic through 30 layers leaves about 1e-5 of the largest logit.
_TOLERANCE = 1e-3


@torch.no_grad()
def move_off_grid(model: PreTrainedModel, seed: int = 0) -> float:
    """Change the weights of ``model`` in place, its function unchanged.

    Returns:
        The largest difference of logits on a few tokens, relative to the largest logit.

    Raises:
        UserError: the architecture isn't one whose norms and residual stream are known here.
    """
    kind = model.config.model_type
    if kind not in _CHANGES:
        raise UserError(
            f"SOURCE has architecture '{kind}', which can't be moved off its grid (known: "
            f"{', '.join(_CHANGES)}); pass --keep_grid."
        )
    network: Any = model
    network.eval()
    probe = torch.arange(_PROBE_TOKENS)[None] * 7 % model.config.vocab_size
    before: Tensor = network(probe).logits
    _CHANGES[kind](network, torch.Generator().manual_seed(seed))
    after: Tensor = network(probe).logits
    difference = float((after - before).abs().max() / before.abs().max())
    assert difference < _TOLERANCE, f"new weights changed the logits by {difference:.1e} of the largest"
    return difference
