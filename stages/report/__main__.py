"""Write a report's page again from its report.json: ``python -m stages.report DIR``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from stages.commands.evaluate_options import ReportConfig
from stages.commands.options import default_folder
from stages.commands.output import Section
from stages.commands.run import run_command
from stages.errors import UserError


def command(config: ReportConfig) -> Iterable[Section]:
    """Write report.html, with the part on quantized weights made anew where --weights_path names them.

    Raises:
        UserError: there is nothing to report on, or the folder can't be written.
    """
    from stages.model.directory import locate_model
    from stages.model.sizes import size_parts
    from stages.quantization.weights.store import open_store
    from stages.report.document import REPORT_JSON, Origin, log_report, read_report, write_report
    from stages.report.from_runs import origin_of_weights, quantization_of
    from stages.report.render import render

    if config.weights_path is None:
        config = replace(config, report=_with_report(config.report))
    report = read_report(config.report)
    if config.weights_path is not None:
        sizes = (
            size_parts(locate_model(config.base), locate_model(config.model)) if config.base and config.model else ()
        )
        store = open_store(config.weights_path)
        quantization, origin = quantization_of(store, sizes), report.origin
        if origin == Origin():
            origin = replace(origin_of_weights(store), base=config.base.absolute().name if config.base else "")
        title = report.title or (config.model or config.weights_path).absolute().name
        report = replace(report, title=title, origin=origin, quantization=quantization)
    elif not (config.report / REPORT_JSON).exists():
        raise UserError(f"{config.report} holds no {REPORT_JSON}; pass a report's folder, or --weights_path too.")
    write_report(report, render, config.report)
    log_report(config.report)
    return ()


def _with_report(folder: Path) -> Path:
    """Return the folder with the report of the weights or of the model in ``folder``; else ``folder`` itself."""
    from stages.quantization.weights.store import REPORT_FOLDER
    from stages.report.document import REPORT_JSON

    places = (folder, folder / REPORT_FOLDER, default_folder(folder, ".weights") / REPORT_FOLDER)
    return next((place for place in places if (place / REPORT_JSON).exists()), folder)


if __name__ == "__main__":
    run_command(ReportConfig, command, "python -m stages.report")
