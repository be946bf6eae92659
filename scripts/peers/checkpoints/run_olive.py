"""Quantize a Hugging Face checkpoint with Olive's GPTQ, in an environment of its own: nothing of ours is imported here.

The only argument is JSON: ``checkpoint`` and ``output`` (folders), ``windows`` (a .npy file of token ids),
``block_size`` and ``use_zero_point``.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import numpy as np

_DATASET = "calibration_windows"


def samples_of(file: str) -> list[tuple[dict[str, np.ndarray], int]]:
    """Read every window as a sample with a label, as Olive's data loaders take them."""
    windows = np.load(file, allow_pickle=False)
    return [({"input_ids": window, "attention_mask": np.ones_like(window)}, 0) for window in windows]


def options_of(request: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the pass that ``request`` means; all others are Olive's defaults."""
    dataset = {"type": _DATASET, "params": {"file": request["windows"]}}
    return {
        "group_size": request["block_size"],
        "sym": not request["use_zero_point"],
        "data_config": {"name": "windows", "load_dataset_config": dataset},
    }


def main(request: dict[str, Any]) -> None:
    """Quantize as ``request`` says and save the checkpoint."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all of it is on this machine
    # Here, so that the functions above can be tested where Olive isn't.
    from olive.data.registry import Registry
    from olive.model import HfModelHandler
    from olive.passes.olive_pass import create_pass_from_dict
    from olive.passes.pytorch.gptq import Gptq

    Registry.register_dataset(_DATASET)(samples_of)
    gptq = create_pass_from_dict(Gptq, options_of(request), disable_search=True)
    gptq.run(HfModelHandler(request["checkpoint"]), request["output"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("request", type=json.loads, help="a JSON object")
    main(parser.parse_args().request)
