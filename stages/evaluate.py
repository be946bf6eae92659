"""Compare models with their base, ``python -m stages.evaluate``: accuracy, answers, lm-eval tasks, speed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from stages.commands.evaluate_options import EvaluateConfig
from stages.commands.output import Section
from stages.commands.run import run_command

if TYPE_CHECKING:
    from stages.evaluation.compare import PreparedEvaluation
    from stages.evaluation.records import Evaluation
    from stages.report.document import Report


def command(config: EvaluateConfig) -> Iterator[Section]:
    """Evaluate the models."""
    from rich.console import Group

    from stages.report.tables import tables_of

    found = evaluate(config)
    yield Section(name="evaluation", table=Group(*tables_of(found)), record=found)


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Compare models with their base on the same text; a comparison that was kept is not run again.

    Raises:
        UserError: an option, a model, a text or a task can't be used.
    """
    from stages.evaluation.compare import prepare
    from stages.evaluation.run import run_evaluation
    from stages.report.document import Report, read_report

    config.validate()
    document = Report() if config.report is None else read_report(config.report)
    prepared = prepare(config)
    found = run_evaluation(config, prepared, _earlier(config, document, prepared))
    _keep(config, found, document)
    return found


def _earlier(config: EvaluateConfig, document: Report, prepared: PreparedEvaluation) -> Evaluation | None:
    """Return a kept evaluation of the same comparison, from --results or the report; None where there is none."""
    from stages.evaluation.records import load_evaluation

    found = None if config.results is None else load_evaluation(config.results, prepared.comparison)
    of_report = (one for one in document.evaluations if one.comparison == prepared.comparison)
    return found or next(of_report, None)


def _keep(config: EvaluateConfig, found: Evaluation, document: Report) -> None:
    """Write ``found`` to --results and into the report of --report."""
    from stages.evaluation.records import save_evaluation
    from stages.model.directory import locate_model
    from stages.report.document import Report, write_report
    from stages.report.from_runs import origin_of
    from stages.report.render import render
    from stages.system.hardware import describe_machine

    if config.results is not None:
        save_evaluation(found, config.results)
    if config.report is not None:
        title = document.title or ", ".join(path.absolute().name for path in config.model)
        origin = document.origin
        if document == Report():
            origin = origin_of("genai-quant evaluate", config, locate_model(config.base).folder)
        document = replace(document, title=title, machine=document.machine or describe_machine(), origin=origin)
        write_report(document.with_evaluation(found), render, config.report)


if __name__ == "__main__":
    run_command(EvaluateConfig, command, "python -m stages.evaluate")
