"""Stage one, ``python -m stages.calibrate``: run the base model on text and cache statistics of its activations."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from stages.commands.calibrate_options import CalibrateConfig
from stages.commands.output import Section
from stages.commands.run import run_command
from stages.system.paths import shell_line

_LOGGER = logging.getLogger(__name__)


def command(config: CalibrateConfig) -> Iterator[Section]:
    """Calibrate, and log which command to run next."""
    # Imported here, as in every command: --help and errors in options need not wait for torch.
    from stages.calibration.run import calibrate
    from stages.calibration.summary import calibration_section

    yield calibration_section(calibrate(config))
    cache = () if config.cache_dir is None else ("--cache_dir", str(config.cache_dir))
    component = () if config.component is None else ("--component", config.component)
    _LOGGER.info("next: %s OUTPUT", shell_line(["stages.quantize", *component, *cache, str(config.onnx_path)]))


if __name__ == "__main__":
    run_command(CalibrateConfig, command, "python -m stages.calibrate")
