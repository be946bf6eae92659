"""Quantize ONNX Runtime GenAI language models from Python: see docs/reference/python.md.

The options are the command lines' own dataclasses; the functions return what the commands print. Names are imported
on first use: torch and ONNX Runtime take seconds, and ``genai-quant --help`` needs neither.
"""

from __future__ import annotations

import os
import sys

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and __path__[0] != f"{sys.path[0]}{os.sep}{__name__}":
    # python -m looks in the current folder first, where a file export.py or json.py of the user's would stand in for
    # a package of ours or another's.
    del sys.path[0]

from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
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
    from stages.evaluate import evaluate, evaluate_outputs
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
    "evaluate_outputs",
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
    "stages.evaluate": ("evaluate", "evaluate_outputs"),
    "stages.quantize": ("preview", "quantize"),
}


def __getattr__(name: str) -> object:
    """Import ``name`` from the module that defines it."""
    for module, names in _NAMES_BY_MODULE.items():
        if name in names:
            _require_ours(module.partition(".")[0])
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _require_ours(package: str) -> None:
    """Raise ImportError where a script's own folder has a file that hides ``package``, before it is run."""
    spec = find_spec(package)
    if spec is not None and spec.origin is not None and not spec.submodule_search_locations:
        raise ImportError(f"{spec.origin} hides the package {package} of genai-quant; rename that file.")
