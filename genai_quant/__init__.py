"""Quantize ONNX Runtime GenAI language models from Python: see docs/reference/python.md.

The options are the command lines' own dataclasses; the functions return what the commands print. Names are imported
on first use: torch and ONNX Runtime take seconds, and ``genai-quant --help`` needs neither.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from export.__main__ import export
    from export.run import QuantizedModel
    from genai_quant.run_file import WholeRun, read_run
    from stages.calibration.run import calibrate
    from stages.commands.calibrate_options import CalibrateConfig
    from stages.commands.evaluate_options import EvaluateConfig
    from stages.commands.progress import progress_on
    from stages.commands.quantize_options import ExportConfig, QuantizeConfig
    from stages.errors import CacheMismatch, GraphError, OptionError, SolveError, UserError
    from stages.evaluate import evaluate
    from stages.quantize import preview, quantize

__version__ = version("genai-quant")
__all__ = [
    "CacheMismatch",
    "CalibrateConfig",
    "EvaluateConfig",
    "ExportConfig",
    "GraphError",
    "OptionError",
    "QuantizeConfig",
    "QuantizedModel",
    "SolveError",
    "UserError",
    "WholeRun",
    "__version__",
    "calibrate",
    "evaluate",
    "export",
    "preview",
    "progress_on",
    "quantize",
    "read_run",
]
_NAMES_BY_MODULE = {
    "export.__main__": ("export",),
    "export.run": ("QuantizedModel",),
    "genai_quant.run_file": ("WholeRun", "read_run"),
    "stages.calibration.run": ("calibrate",),
    "stages.commands.calibrate_options": ("CalibrateConfig",),
    "stages.commands.evaluate_options": ("EvaluateConfig",),
    "stages.commands.progress": ("progress_on",),
    "stages.commands.quantize_options": ("ExportConfig", "QuantizeConfig"),
    "stages.errors": ("CacheMismatch", "GraphError", "OptionError", "SolveError", "UserError"),
    "stages.evaluate": ("evaluate",),
    "stages.quantize": ("preview", "quantize"),
}


def __getattr__(name: str) -> object:
    """Import ``name`` from the module that defines it."""
    for module, names in _NAMES_BY_MODULE.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
