"""Compare models with their base: ``python -m stages.evaluate --base DIR --model DIR [DIR ...]``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Group

from stages.cli import run_command
from stages.config import EvaluateConfig
from stages.evaluation.compare import PreparedEvaluation, evaluate, prepare
from stages.evaluation.decode_round import SpeedRequest
from stages.evaluation.findings import Evaluation, SpeedTest, TaskScore, load_evaluation, save_evaluation
from stages.evaluation.genai_session import require_genai
from stages.evaluation.generation import generate
from stages.evaluation.harness import TaskRequest, find_tasks, run_tasks
from stages.evaluation.speed import measure_speed
from stages.machine import default_threads, describe_machine
from stages.page.document import Document, read_document, write_report
from stages.page.render import render
from stages.page.tables import tables_of
from stages.progress import Progress, progress_bar
from stages.screen import Screen
from stages.threads import threads


def evaluate_models(config: EvaluateConfig, screen: Screen) -> None:
    """Show what an equal comparison found earlier if there is one, else evaluate; add what else is asked for.

    Raises:
        UserError: an option, a model, a text or a task can't be used.
    """
    config.validate()
    document = Document() if config.report is None else read_document(config.report)
    prepared = prepare(config)
    folders = [model.folder for model in prepared.all_models]
    for option, wanted in (("--generate", config.generate), ("--speed", config.speed)):
        if wanted:
            require_genai(folders, option)
    tasks = find_tasks(config.lm_eval_tasks, config.lm_eval_limit) if config.lm_eval_tasks else None
    earlier = _earlier(config, document, prepared)
    with progress_bar(screen.console) as progress:
        found = earlier or evaluate(prepared, progress)
        found = replace(
            found,
            generations=generate(folders, config.generate, config.max_new_tokens, progress) if config.generate else (),
            speed=_speed(config, prepared, progress) if config.speed else None,
            tasks=() if tasks is None else _tasks(tasks, prepared, progress),
        ).kept_from(earlier)
    _keep(config, found, document)
    screen.show("evaluation", Group(*tables_of(found)), found)


def _earlier(config: EvaluateConfig, document: Document, prepared: PreparedEvaluation) -> Evaluation | None:
    """An evaluation of the same comparison, from --results or the report."""
    found = None if config.results is None else load_evaluation(config.results, prepared.comparison)
    of_report = (one for one in document.evaluations if one.comparison == prepared.comparison)
    return found or next(of_report, None)


def _speed(config: EvaluateConfig, prepared: PreparedEvaluation, progress: Progress) -> SpeedTest:
    request = SpeedRequest(
        prompt=tuple(prepared.base.windows.reshape(-1)[: config.speed_prompt_tokens].tolist()),
        new_tokens=config.speed_new_tokens,
        threads=threads() or default_threads(),
    )
    return measure_speed(prepared.all_models, request, config.speed_rounds, progress)


def _tasks(request: TaskRequest, prepared: PreparedEvaluation, progress: Progress) -> tuple[TaskScore, ...]:
    scores: Sequence[tuple[TaskScore, ...]] = [
        run_tasks(model, request, prepared.base.settings, progress) for model in prepared.all_models
    ]
    return tuple(score for of_model in scores for score in of_model)


def _keep(config: EvaluateConfig, found: Evaluation, document: Document) -> None:
    if config.results is not None:
        save_evaluation(found, config.results)
    if config.report is not None:
        title = document.title or ", ".join(path.absolute().name for path in config.model)
        document = replace(document, title=title, machine=document.machine or describe_machine())
        write_report(document.with_evaluation(found), render, config.report)


if __name__ == "__main__":
    run_command(EvaluateConfig, evaluate_models, "python -m stages.evaluate")
