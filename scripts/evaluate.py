"""The earlier name of ``python -m stages.evaluate``: ``python -m scripts.evaluate --base DIR --model DIR ...``."""

from __future__ import annotations

from stages.cli import run_command
from stages.config import EvaluateConfig
from stages.evaluate import evaluate_models

__all__ = ["evaluate_models"]

if __name__ == "__main__":
    run_command(EvaluateConfig, evaluate_models, "python -m scripts.evaluate")
