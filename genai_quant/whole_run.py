"""``genai-quant run FILE``: every step of a run file, one after the other."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

from export import __main__ as export
from genai_quant.run_file import WholeRun, read_run
from stages import evaluate, quantize
from stages.calibrate_run import calibrate
from stages.calibration_table import calibration_table
from stages.config import RunConfig
from stages.preview_table import preview_table
from stages.screen import Section

_LOGGER = logging.getLogger(__name__)


def run_whole(config: RunConfig) -> Iterator[Section]:
    """Do what the file of ``config`` says, or with ``dry_run`` say what that would be.

    Raises:
        UserError: the file can't be read or has something that no option is; and what the steps raise. What can't work
            is said before the first step.
    """
    run = read_run(config.config)
    if config.dry_run or run.quantize.dry_run:
        found = quantize.preview(replace(run.quantize, dry_run=True), run.calibrate)
        yield Section(name="plan", table=preview_table(found), record=found)
        return
    quantize.check_before_calibration(run.quantize)
    yield from _calibrate(run)
    yield from quantize.command(run.quantize)
    if run.export is not None:
        yield from export.command(run.export)
    if run.evaluate is not None:
        yield from evaluate.command(run.evaluate)


def _calibrate(run: WholeRun) -> Iterator[Section]:
    if run.calibrate is None:
        return
    if run.quantize.needs_cache:
        summary = calibrate(run.calibrate)
        yield Section(name="calibration", table=calibration_table(summary), record=summary)
    else:
        _LOGGER.info("%s rounds without calibration data: stage one is left out.", run.quantize.algo)
