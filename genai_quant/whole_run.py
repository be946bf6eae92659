"""``genai-quant run FILE``: every step of a run file, one after the other."""

from __future__ import annotations

import logging
from dataclasses import replace

from export.__main__ import export
from genai_quant.run_file import WholeRun, read_run
from stages.calibrate import calibrate
from stages.config import RunConfig
from stages.evaluate import evaluate_models
from stages.quantize import check_before_calibration, quantize, show_preview
from stages.screen import Screen

_LOGGER = logging.getLogger(__name__)


def run_whole(config: RunConfig, screen: Screen) -> None:
    """Do what the file of ``config`` says, or with ``dry_run`` say what that would be.

    Raises:
        UserError: the file can't be read or has something that no option is; and what the steps raise. What can't work
            is said before the first step.
    """
    run = read_run(config.config)
    if config.dry_run or run.quantize.dry_run:
        show_preview(replace(run.quantize, dry_run=True), run.calibrate, screen)
        return
    check_before_calibration(run.quantize)
    _calibrate(run, screen)
    quantize(run.quantize, screen)
    if run.export is not None:
        export(run.export, screen)
    if run.evaluate is not None:
        evaluate_models(run.evaluate, screen)


def _calibrate(run: WholeRun, screen: Screen) -> None:
    if run.calibrate is None:
        return
    if run.quantize.needs_cache:
        calibrate(run.calibrate, screen)
    else:
        _LOGGER.info("%s rounds without calibration data: stage one is left out.", run.quantize.algo)
