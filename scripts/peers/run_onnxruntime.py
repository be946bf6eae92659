"""Quantize one model with ONNX Runtime's own MatMulNBitsQuantizer: ``python scripts/peers/run_onnxruntime.py JSON``.

The only argument is JSON: ``base`` and ``output`` (.onnx files), ``method`` (default, hqq, k_quant), ``block_size``,
``use_zero_point`` and ``exclude`` (node names).
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import onnx
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    KQuantWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
    WeightOnlyQuantConfig,
)

_SHIPPED_LEVEL = 4
"""The accuracy level that onnxruntime-genai's builder and ONNX Runtime's fusion give the CPU."""


def main(request: dict[str, Any]) -> None:
    """Quantize as ``request`` says and save the graph with its data beside it."""
    quantizer = MatMulNBitsQuantizer(
        onnx.load(request["base"]),
        bits=4,
        block_size=request["block_size"],
        is_symmetric=not request["use_zero_point"],
        accuracy_level=_SHIPPED_LEVEL,
        nodes_to_exclude=request["exclude"],
        algo_config=_algorithm(request),
    )
    quantizer.process()
    quantizer.model.save_model_to_file(request["output"], True)


def _algorithm(request: dict[str, Any]) -> WeightOnlyQuantConfig:
    match request["method"]:
        case "hqq":
            return HQQWeightOnlyQuantConfig(block_size=request["block_size"], bits=4)
        case "k_quant":
            return KQuantWeightOnlyQuantConfig()
        case _:
            return DefaultWeightOnlyQuantConfig(
                block_size=request["block_size"],
                is_symmetric=not request["use_zero_point"],
                accuracy_level=_SHIPPED_LEVEL,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("request", type=json.loads, help="a JSON object")
    main(parser.parse_args().request)
