"""Stand in for ModelOpt-Windows' script: ``python scripts/quantize.py --onnx_path ... --output_path ...``."""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Run by its path: Python looks beside this file for packages that lie one folder up.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from scripts.drop_in.run import calibrate_and_quantize
from scripts.options import DropInConfig
from stages.commands.run import run_command

if __name__ == "__main__":
    run_command(DropInConfig, calibrate_and_quantize, "python scripts/quantize.py")
