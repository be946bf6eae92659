"""Quantize one model with NVIDIA ModelOpt, in an environment of its own: nothing of this project is imported here.

The only argument is JSON: ``base`` and ``output`` (.onnx files), ``feeds`` (safetensors named "<window>:<input>"),
``method``, ``block_size``, ``use_zero_point``, ``exclude`` (node names) and ``options`` (further keyword arguments).
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file


def read_feeds(file: Path) -> list[dict[str, np.ndarray]]:
    """Read the inputs of every calibration window, in order."""
    feeds: dict[int, dict[str, np.ndarray]] = defaultdict(dict)
    for key, array in load_file(file).items():
        window, name = key.split(":", 1)
        feeds[int(window)][name] = array
    return [feeds[window] for window in sorted(feeds)]


def arguments_of(request: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of modelopt's quantize that ``request`` means."""
    return {
        "calibration_method": request["method"],
        "calibration_eps": ["cpu"],
        "use_zero_point": request["use_zero_point"],
        "block_size": request["block_size"],
        # ModelOpt matches regular expressions at the start of node names.
        "nodes_to_exclude": [f"{re.escape(name)}$" for name in request["exclude"]],
        **request["options"],
    }


def main(request: dict[str, Any]) -> None:
    """Quantize as ``request`` says and save the graph with its data beside it."""
    # Here, so that the functions above can be tested where ModelOpt isn't.
    from modelopt.onnx.quantization.int4 import quantize
    from modelopt.onnx.utils import save_onnx

    feeds = read_feeds(Path(request["feeds"]))
    model = quantize(request["base"], calibration_data_reader=feeds, **arguments_of(request))
    save_onnx(model, request["output"], save_as_external_data=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("request", type=json.loads, help="a JSON object")
    main(parser.parse_args().request)
