"""Quantize a Hugging Face checkpoint with AutoRound, in an environment of its own: nothing of ours is imported here.

The only argument is JSON: ``checkpoint`` and ``output`` (folders), ``windows`` (a .npy file of token ids),
``block_size``, ``use_zero_point`` and ``options`` (further keyword arguments of AutoRound).
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np


def arguments_of(request: dict[str, Any], samples: int, tokens: int) -> dict[str, Any]:
    """Return the keyword arguments of AutoRound that ``request`` means; all others are its defaults.

    Args:
        request: what was asked for.
        samples: windows of calibration text.
        tokens: in each of them.
    """
    return {
        "scheme": "W4A16",
        "group_size": request["block_size"],
        "sym": not request["use_zero_point"],
        "nsamples": samples,
        "seqlen": tokens,
        "device_map": "cpu",
        **request["options"],
    }


def main(request: dict[str, Any]) -> None:
    """Quantize as ``request`` says and save the checkpoint in GPTQ's form."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all of it is on this machine
    # Here, so that the function above can be tested where AutoRound isn't.
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    windows = torch.from_numpy(np.load(request["windows"], allow_pickle=False))
    model = AutoModelForCausalLM.from_pretrained(request["checkpoint"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(request["checkpoint"])
    arguments = arguments_of(request, *windows.shape)
    rounding = AutoRound(model, tokenizer, dataset=[window[None] for window in windows], **arguments)
    output = Path(request["output"])
    _, folder = rounding.quantize_and_save(str(output), format="auto_gptq")
    for file in Path(folder).iterdir():  # a folder in it, named after the format
        file.rename(output / file.name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("request", type=json.loads, help="a JSON object")
    main(parser.parse_args().request)
