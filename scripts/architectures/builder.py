"""Run onnxruntime-genai's builder in this process."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path


def build_genai_model(
    source: Path, output: Path, precision: str = "fp32", execution_provider: str = "cpu", *extra: str
) -> None:
    """Run onnxruntime-genai's builder with ``extra`` options, without a new interpreter for each model."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    place = ("", str(source), str(output), precision, execution_provider, str(output / "cache"))
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        create_model(*place, **parse_extra_options(*place, list(extra)))
