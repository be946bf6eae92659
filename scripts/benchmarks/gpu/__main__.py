"""Check what a CUDA GPU does: ``python -m scripts.benchmarks.gpu --output models/gpu-check``.

``bash scripts/gpu_check.sh`` installs what it needs first. A step that fails is named, and the others go on.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import TypeAdapter

from scripts.benchmarks.figures import this_machine
from scripts.benchmarks.gpu.figures import GpuCheck
from scripts.benchmarks.gpu.models import FULL, TINY
from scripts.benchmarks.gpu.steps import Room, decode, fuse, place, refine, repeat, run_whole, search
from scripts.benchmarks.gpu.tables import check_table
from scripts.options import GpuCheckConfig
from stages.commands.output import Section
from stages.commands.run import run_command
from stages.errors import with_class_name
from stages.system.atomic import atomic_file

_LOGGER = logging.getLogger(__name__)
_FIGURES = TypeAdapter(GpuCheck)
_STEPS = {
    "placement": place,
    "fusion": fuse,
    "layers": search,
    "two searches": repeat,
    "whole model": run_whole,
    "decoding": decode,
    "refine": refine,
}
"""In this order; what is asked first comes first, should the time run out."""


def gpu_check(config: GpuCheckConfig) -> Iterator[Section]:
    """Take all steps, and write gpu_check.json after each: a run that is stopped leaves what it has."""
    config.output.mkdir(parents=True, exist_ok=True)
    size = config.size if config.size != "auto" else "full" if torch.cuda.is_available() else "tiny"
    found = GpuCheck(machine=this_machine(), size=size)
    began, file = time.monotonic(), config.output / "gpu_check.json"
    with tempfile.TemporaryDirectory(dir=config.output, ignore_cleanup_errors=True) as folder:
        room = Room(folder=Path(folder), sizes=FULL if size == "full" else TINY)
        for name, step in _STEPS.items():
            if time.monotonic() - began > config.seconds:
                found = replace(found, not_done=(*found.not_done, (name, f"{config.seconds:.0f} s were over")))
                continue
            _LOGGER.info("gpu check: %s", name)
            try:
                found = step(found, room)
            except Exception as error:  # whatever a device, a driver or a library raises is what the check is for
                found = replace(found, not_done=(*found.not_done, (name, with_class_name(error))))
            with atomic_file(file) as partial:
                partial.write_bytes(_FIGURES.dump_json(found, indent=1))
    yield Section(name="gpu_check", table=check_table(found), record=found)
    _LOGGER.info("figures: %s", file)


if __name__ == "__main__":
    run_command(GpuCheckConfig, gpu_check, "python -m scripts.benchmarks.gpu")
