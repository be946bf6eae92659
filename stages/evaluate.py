"""Compare models with their base, ``python -m stages.evaluate``: accuracy, answers, lm-eval tasks, speed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from stages.commands.evaluate_options import EvaluateConfig
from stages.commands.options import require
from stages.commands.output import Section
from stages.commands.quantize_options import QuantizeConfig
from stages.commands.run import run_command
from stages.errors import UserError

if TYPE_CHECKING:
    from stages.evaluation.compare import PreparedEvaluation
    from stages.evaluation.outputs import JudgedSamples
    from stages.evaluation.records import Evaluation, OutputEvaluation
    from stages.report.document import Report

_LOGGER = logging.getLogger(__name__)
_WINDOWS, _SEQ_LEN, _SPEED_ROUNDS = 8, 512, 3
"""Of the evaluation of a quantized model that was just made: a few minutes for a model of 135 million weights."""


def command(config: EvaluateConfig) -> Iterator[Section]:
    """Evaluate the models."""
    from stages.report.document import log_report

    config.validate()
    if _compares_outputs(config):
        outputs = evaluate_outputs(config)
        yield output_section((outputs,), record=outputs)
    else:
        found = evaluate(config)
        yield from evaluation_sections((found,), record=found)
    if config.report is not None:
        log_report(config.report)


def evaluation_sections(
    evaluations: Sequence[Evaluation], *, record: object = None, detail: bool = False
) -> Iterator[Section]:
    """Yield what a command prints of some evaluations; the predictions farthest from the base's are details.

    Args:
        evaluations: of the same models, one for each text.
        record: what stands in the JSON document; None: a list of the evaluations.
        detail: whether all of it is.
    """
    from rich.console import Group

    from stages.report.tables import tables_of, tables_of_worst

    shown = tuple(evaluations) if record is None else record
    for one in evaluations:
        yield Section(name="evaluation", table=Group(*tables_of(one)), record=shown, detail=detail)
        if any(row.worst for row in one.rows):
            yield Section(name="evaluation", table=Group(*tables_of_worst(one)), record=shown, detail=True)


def output_section(evaluations: Sequence[OutputEvaluation], *, record: object = None, detail: bool = False) -> Section:
    """Return what a command prints of comparisons of outputs.

    Args:
        evaluations: one for each component.
        record: what stands in the JSON document; None: a list of the evaluations.
        detail: whether it is one.
    """
    from rich.console import Group

    from stages.report.tables import tables_of_outputs

    shown = tuple(evaluations) if record is None else record
    tables = [each for one in evaluations for each in tables_of_outputs(one)]
    return Section(name="outputs", table=Group(*tables), record=shown, detail=detail)


def _compares_outputs(config: EvaluateConfig) -> bool:
    from stages.evaluation.judged_samples import judged_by_outputs

    return judged_by_outputs(config)


def evaluate_outputs(config: EvaluateConfig) -> OutputEvaluation:
    """Compare what encoders, projectors or embedding models give with what their base gives, on the same samples.

    Raises:
        UserError: an option, a model or the samples can't be used.
    """
    from stages.evaluation.judged_samples import samples_to_judge

    config.validate()
    require(
        not config.asks_for_text,
        f"--base {config.base} is an encoder, whose outputs are compared; --generate, --lm_eval_tasks and --speed go "
        "with decoders.",
    )
    document = _report(config)
    return _compare_outputs(config, samples_to_judge(config), document)


def _compare_outputs(config: EvaluateConfig, judged: JudgedSamples, document: Report) -> OutputEvaluation:
    """Compare the models on ``judged``, and keep what was found."""
    from stages.commands.progress import progress_bar
    from stages.evaluation.compare import settings_of
    from stages.evaluation.outputs import compare_outputs
    from stages.model.directory import locate_model

    base, *models = (locate_model(path, config.component) for path in (config.base, *config.model))
    with progress_bar() as progress:
        found = compare_outputs(base, models, judged, settings_of(config), progress)
    _keep(config, found, document)
    return found


def evaluate_result_outputs(config: QuantizeConfig) -> OutputEvaluation | None:
    """Compare what ``config`` made with its base on the samples that it kept for that; None where it has none.

    The model is finished: what can't be measured is a warning.
    """
    from stages.evaluation.judged_samples import samples_of_run
    from stages.quantization.weights.store import REPORT_FOLDER

    request = EvaluateConfig(
        base=config.onnx_path,
        model=(config.output_path,),
        component=config.component,
        report=config.weights_folder / REPORT_FOLDER,
    )
    try:
        judged = samples_of_run(config)
        return None if judged is None else _compare_outputs(request, judged, _report(request))
    except UserError as error:
        _LOGGER.warning("the model is finished, but its outputs can't be compared with its base's: %s", error)
        return None


def evaluate_result(config: QuantizeConfig) -> tuple[Evaluation, ...]:
    """Compare what ``config`` made with its base on text of other kinds than it was calibrated on.

    All is kept in the report. The model is finished: what can't be measured is a warning.
    """
    from stages.calibration.cache import find_cache
    from stages.evaluation.texts import texts_of_other_kinds
    from stages.model.directory import locate_model
    from stages.quantization.weights.store import REPORT_FOLDER
    from stages.runtime.genai import why_not_genai
    from stages.runtime.providers import own_providers

    cache = find_cache(config.cache_path) if config.needs_cache else None
    base = locate_model(config.onnx_path)
    request = EvaluateConfig(
        base=config.onnx_path,
        model_name=config.model_name,
        model=(config.output_path,),
        windows=_WINDOWS,
        seq_len=min(_SEQ_LEN, base.context_length or _SEQ_LEN),
        eps=f"{base.provider},cpu" if own_providers(base.provider) else "cpu",
        report=config.weights_folder / REPORT_FOLDER,
        speed_rounds=_SPEED_ROUNDS,
    )
    found: list[Evaluation] = []
    for text in texts_of_other_kinds("" if cache is None else cache.manifest.key.source):
        try:
            found.append(evaluate(replace(request, text=text)))
        except UserError as error:
            _LOGGER.warning("the model is finished, but its evaluation on %s is not: %s", text, error)
    missing = why_not_genai([base.folder, locate_model(config.output_path).folder])
    if missing is None and found:
        found[0] = _with_speed(request, found[0])
    elif missing is not None:
        _LOGGER.info("decoding speed isn't measured: %s", missing)
    return tuple(found)


def _with_speed(request: EvaluateConfig, found: Evaluation) -> Evaluation:
    if found.speed is not None:
        return found
    try:
        return evaluate(replace(request, text=found.comparison.text, speed=True))
    except UserError as error:
        _LOGGER.warning("the model is finished, but its decoding speed can't be measured: %s", error)
        return found


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Compare models with their base on the same text; a comparison that was kept is not run again.

    Each part is kept as soon as it is there.

    Raises:
        UserError: an option, a model, a text or a task can't be used.
    """
    from stages.commands.progress import status
    from stages.evaluation.compare import prepare
    from stages.evaluation.run import run_evaluation
    from stages.model.directory import locate_model

    config.validate()
    document = _report(config)
    for path in (config.base, *config.model):
        locate_model(path, config.component)  # what isn't there is said before anything is read
    with status("reading the models and the text"):
        prepared = prepare(config)
    earlier = _earlier(config, document, prepared)
    try:
        for found in run_evaluation(config, prepared, earlier):
            _keep(config, found, document)
    except KeyboardInterrupt as stop:
        if config.results is None and config.report is None:
            stop.__notes__ = ["stopped; finished parts of an evaluation are kept with --results or --report only."]
        raise
    return found


def _report(config: EvaluateConfig) -> Report:
    """Return the report of --report, an empty one where there is none."""
    from stages.report.document import Report, read_report

    return Report() if config.report is None else read_report(config.report)


def _earlier(config: EvaluateConfig, document: Report, prepared: PreparedEvaluation) -> Evaluation | None:
    """Return what --results and the report keep of the same comparison; None where neither has it."""
    from stages.evaluation.records import load_evaluation

    found = None if config.results is None else load_evaluation(config.results, prepared.comparison)
    of_report = next((one for one in document.evaluations if one.comparison == prepared.comparison), None)
    return of_report if found is None else found.kept_from(of_report)


def _keep(config: EvaluateConfig, found: Evaluation | OutputEvaluation, document: Report) -> None:
    """Write ``found`` to --results and into the report of --report."""
    from stages.evaluation.records import Evaluation, save_evaluation
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
            origin = origin_of("genai-quant evaluate", config, locate_model(config.base, config.component).folder)
        document = replace(document, title=title, machine=document.machine or describe_machine(), origin=origin)
        added = document.with_evaluation(found) if isinstance(found, Evaluation) else document.with_outputs(found)
        write_report(added, render, config.report)


if __name__ == "__main__":
    run_command(EvaluateConfig, command, "python -m stages.evaluate")
