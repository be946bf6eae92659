"""Make a report's page again from its report.json: ``python -m stages.report_page DIR``."""

from __future__ import annotations

from dataclasses import replace

from stages.cli import run_command
from stages.config import ReportConfig
from stages.errors import UserError
from stages.model_directory import locate_model
from stages.page.document import REPORT_JSON, read_document, write_report
from stages.page.from_weights import quantization_of
from stages.page.render import render
from stages.quantized_store import open_store
from stages.screen import Screen
from stages.size_breakdown import size_parts


def report_page(config: ReportConfig, _: Screen) -> None:
    """Write report.html, and first the part on quantized weights where their folder is named.

    Raises:
        UserError: there is nothing to make a page from, or the folder can't be written.
    """
    config.validate()
    document = read_document(config.report)
    if config.weights_path is not None:
        sizes = (
            size_parts(locate_model(config.base), locate_model(config.model)) if config.base and config.model else ()
        )
        quantization = quantization_of(open_store(config.weights_path), sizes)
        title = document.title or (config.model or config.weights_path).absolute().name
        document = replace(document, title=title, quantization=quantization)
    elif not (config.report / REPORT_JSON).exists():
        raise UserError(f"{config.report} holds no {REPORT_JSON}; name a report's folder, or --weights_path as well.")
    write_report(document, render, config.report)


if __name__ == "__main__":
    run_command(ReportConfig, report_page, "python -m stages.report_page")
