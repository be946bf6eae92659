"""Quantize ONNX Runtime GenAI language models from Python: see docs/python.md.

The configurations are the command lines' own dataclasses; the functions return what the commands would print.
"""

from __future__ import annotations

from genai_quant.api import calibrate, evaluate, export, preview, quantize
from genai_quant.results import QuantizedModel
from genai_quant.run_file import WholeRun, read_run
from stages.config import CalibrateConfig, EvaluateConfig, ExportConfig, QuantizeConfig
from stages.errors import CacheMismatch, GraphError, RecipeError, SolveError, UserError

__all__ = [
    "CacheMismatch",
    "CalibrateConfig",
    "EvaluateConfig",
    "ExportConfig",
    "GraphError",
    "QuantizeConfig",
    "QuantizedModel",
    "RecipeError",
    "SolveError",
    "UserError",
    "WholeRun",
    "calibrate",
    "evaluate",
    "export",
    "preview",
    "quantize",
    "read_run",
]
