"""Run a whole evaluation: compare models on text, and add the answers, tasks and speed that are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from stages.commands.evaluate_options import EvaluateConfig
from stages.commands.progress import Progress, progress_bar
from stages.evaluation.compare import PreparedEvaluation, compare
from stages.evaluation.generation import generate
from stages.evaluation.records import Evaluation, SpeedTest, TaskScore
from stages.evaluation.speed import measure_speed
from stages.evaluation.speed_round import SpeedRequest
from stages.evaluation.tasks.lm_tasks import TaskRequest, find_tasks, run_tasks
from stages.runtime.genai import require_genai
from stages.system.threads import usable_threads


def run_evaluation(
    config: EvaluateConfig, prepared: PreparedEvaluation, earlier: Evaluation | None
) -> Iterator[Evaluation]:
    """Compare the models of ``prepared``, unless ``earlier`` did, and add what else ``config`` asks for.

    Yields all that is known, ``earlier`` included, after each part: the comparison, the answers, the speed, and each
    model's tasks.

    Args:
        config: valid options.
        prepared: the models and the windows of text.
        earlier: what an equal comparison found.

    Raises:
        UserError: a model, a prompt or a task can't be used. What can be known before anything is run is said then.
    """
    folders = [model.folder for model in prepared.all_models]
    for option, wanted in (("--generate", config.generate), ("--speed", config.speed)):
        if wanted:
            require_genai(folders, option)
    tasks = find_tasks(config.lm_eval_tasks, config.lm_eval_limit) if config.lm_eval_tasks else None
    with progress_bar() as progress:
        found = earlier or compare(prepared, progress)
        yield found
        if config.generate:
            answers = generate(folders, config.generate, config.max_new_tokens, progress)
            found = replace(found, generations=answers).kept_from(found)
            yield found
        if config.speed:
            found = replace(found, speed=_speed(config, prepared, progress))
            yield found
        if tasks is not None:
            for scores in _tasks(config, tasks, prepared, progress):
                yield replace(found, tasks=scores).kept_from(found)


def _speed(config: EvaluateConfig, prepared: PreparedEvaluation, progress: Progress) -> SpeedTest:
    request = SpeedRequest(
        prompt=tuple(prepared.base.windows.reshape(-1)[: config.speed_prompt_tokens].tolist()),
        new_tokens=config.speed_new_tokens,
        threads=usable_threads(),
    )
    return measure_speed(prepared.all_models, request, config.speed_rounds, progress)


def _tasks(
    config: EvaluateConfig, request: TaskRequest, prepared: PreparedEvaluation, progress: Progress
) -> Iterator[tuple[TaskScore, ...]]:
    """Yield the scores so far after each model."""
    scores: tuple[TaskScore, ...] = ()
    for model in prepared.all_models:
        scores += run_tasks(model, request, prepared.base.settings_of(model), progress, config.model_name)
        yield scores
