"""The pass ``GenaiQuant`` of Microsoft Olive: both stages as a step of ``olive run``.

Olive imports this module by the file that ``python -m genai_quant.olive`` writes; nothing here imports it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from olive.hardware import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam
from pydantic import model_validator
from rich.console import Console

from genai_quant.olive import pass_options, sections_of_pass, target_of
from genai_quant.run_file import run_whole
from stages.commands.logs import logging_to
from stages.commands.options import RunConfig
from stages.commands.output import open_output
from stages.commands.progress import progress_on
from stages.errors import UserError, sentence_of

_NAME = "GenaiQuant"
_PROGRAM = "genai-quant run"


class GenaiQuant(Pass):  # type: ignore[misc]  # Olive's types aren't there where it isn't installed
    """Calibrate and quantize an ORT-GenAI model; the options are those of both stages."""

    @staticmethod
    def is_accelerator_agnostic(accelerator_spec: AcceleratorSpec) -> bool:  # noqa: ARG004 - Olive's signature
        """Return False: the execution provider decides the form of the weights."""
        return False

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:  # noqa: ARG003
        described = "See docs/reference/cli.md of genai-quant."
        return {name: PassConfigParam(type_=Any, default_value=None, description=described) for name in pass_options()}

    @classmethod
    def _validators(cls) -> dict[str, Any]:
        return {"_known_options": model_validator(mode="before")(_known_options)}

    def _run_for_config(
        self, model: ONNXModelHandler, config: BasePassConfig, output_model_path: str
    ) -> ONNXModelHandler:
        """Do the run in Olive's cache, in a folder that holds the run file too, and return the finished model."""
        folder = Path(output_model_path)
        output = folder / "model" / "model.onnx"  # Olive calls every graph so when it copies the folder
        provider = self.accelerator_spec.execution_provider
        target, providers = (None, None) if provider is None else target_of(str(provider), _NAME)
        sections = sections_of_pass(
            {"target": target, "calibration_eps": providers} | _given(config.model_dump()), _NAME
        )
        sections["quantize"] |= {"onnx_path": str(model.model_path), "output_path": str(output)}
        run_file = folder / "run.json"
        run_file.write_text(json.dumps(sections, indent=1), encoding="utf-8")
        _run(run_file)
        beside = sorted(str(path) for path in output.parent.iterdir() if not path.name.startswith(output.name))
        return ONNXModelHandler(
            model_path=str(output.parent),
            onnx_file_name=output.name,
            model_attributes=(model.model_attributes or {}) | {"additional_files": beside},
        )


def _known_options(values: dict[str, Any]) -> dict[str, Any]:
    """Refuse what Olive would ignore with a warning: an option that isn't one."""
    try:
        sections_of_pass(values, f"pass {_NAME}")
    except UserError as error:
        raise ValueError(sentence_of(error)) from error
    return values


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _run(run_file: Path) -> None:
    """Run ``run_file`` and print what the command line prints.

    Raises:
        ValueError: in place of a UserError: Olive takes other errors for failed attempts, and leaves with exit code 0.
    """
    config = RunConfig(config=run_file)
    console, output = Console(stderr=True), open_output(_PROGRAM, as_json=False, quiet=False)
    with logging_to(console, config.printing, _PROGRAM, errors_only=False), progress_on(console):
        try:
            for section in run_whole(config):
                output.show(section)
        except UserError as error:
            raise ValueError(sentence_of(error)) from error
