"""lm-eval's tasks on models in ONNX Runtime: by name from the hub, or from local task files."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stages.calibration.text.tokenizer import load_tokenizer
from stages.commands.progress import Progress
from stages.errors import UserError, named
from stages.evaluation.records import TaskScore
from stages.model.directory import ModelDirectory
from stages.runtime.decoder import open_decoder
from stages.runtime.session import SessionSettings

_OPTION = "--lm_eval_tasks"
_YAML = ".yaml"
_STDERR = "_stderr"
_NO_FILTER = "none"
TaskSpec = str | dict[str, Any]
"""A task as lm-eval takes it: a name, or a task file's content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRequest:
    """Tasks that were found, and how much of each is run."""

    specs: tuple[TaskSpec, ...]
    limit: int | None
    """Samples of each task; None for all."""
    manager: Any
    """lm-eval's TaskManager: it takes half a minute to learn lm-eval's own tasks, where they are needed."""


def require_lm_eval() -> None:
    """Raise UserError where lm-eval isn't installed."""
    if find_spec("lm_eval") is None:
        raise UserError(f"{_OPTION} needs lm-eval, which isn't installed: pip install 'lm-eval>=0.4.13'.")


def find_tasks(names: Sequence[str], limit: int | None) -> TaskRequest:
    """The tasks that ``names`` mean: names that lm-eval knows, task files (.yaml), or folders of them.

    Paths of data files in a task file may be relative to it.

    Raises:
        UserError: lm-eval isn't installed, or a name is neither of these, or a file can't be read.
    """
    require_lm_eval()
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    specs: list[TaskSpec] = []
    for name in names:
        files = _task_files(Path(name))
        specs += [_read_task(file) for file in files] or [name]
    # A group may name lm-eval's own tasks.
    manager = TaskManager(include_defaults=any(isinstance(spec, str) or "group" in spec for spec in specs))
    for spec in specs:
        if isinstance(spec, str):
            _require_known(spec, manager.all_tasks)
    return TaskRequest(specs=tuple(specs), limit=limit, manager=manager)


def run_tasks(
    directory: ModelDirectory, request: TaskRequest, settings: SessionSettings, progress: Progress
) -> tuple[TaskScore, ...]:
    """Run the tasks on one model: every metric of every task, groups of tasks too.

    Raises:
        UserError: a task's data can't be had, or it asks for what the model can't do, or the model doesn't run.
    """
    from lm_eval.evaluator import simple_evaluate

    from stages.evaluation.lm_model import OnnxRuntimeLM

    tokenizer = load_tokenizer(str(directory.folder), trust_remote_code=False)
    with open_decoder(directory, settings, None) as decoder:
        model = OnnxRuntimeLM(decoder, tokenizer, progress)
        try:
            results = simple_evaluate(
                model,
                tasks=list(request.specs),
                limit=request.limit,
                task_manager=request.manager,
                log_samples=False,
            )
        except UserError:
            raise
        except Exception as error:  # data sets, task files and metrics raise whatever they like
            raise UserError(
                f"{_OPTION}: lm-eval stops ({named(error)}); where a data set is missing, go online once or pass a "
                "task file whose data lies on this machine."
            ) from error
    return tuple(_scores(directory.folder.name, results))


def _task_files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob(f"*{_YAML}"))
    if path.suffix != _YAML:
        return []
    if not path.is_file():
        raise UserError(f"{_OPTION} {path} doesn't exist; pass a task file, a folder of them, or a name lm-eval knows.")
    return [path]


def _read_task(file: Path) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        task: dict[str, Any] = load_yaml(file)
    except Exception as error:  # yaml's own classes, and whatever functions beside the file raise
        raise UserError(f"{_OPTION} {file} can't be read ({named(error)}); mend the file.") from error
    files = task.get("dataset_kwargs", {}).get("data_files")
    if files is not None:
        task["dataset_kwargs"] = {**task["dataset_kwargs"], "data_files": _found_beside(files, file.parent)}
    return task


def _found_beside(files: object, folder: Path) -> object:
    """``files`` (a path, or several in lists and mappings) with those that lie in ``folder`` as absolute paths."""
    match files:
        case str():
            return str((folder / files).absolute()) if (folder / files).is_file() else files
        case list():
            return [_found_beside(file, folder) for file in files]
        case dict():
            return {split: _found_beside(file, folder) for split, file in files.items()}
        case _:
            return files


def _require_known(name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise UserError(
            f"{_OPTION} {name} is neither a task that lm-eval knows nor a {_YAML} file or a folder with some; "
            "'lm-eval ls tasks' lists its names."
        )


def _scores(model: str, results: Mapping[str, Any]) -> Iterator[TaskScore]:
    """Every number of lm-eval's results: ``metric,filter`` and ``metric_stderr,filter``."""
    for task, metrics in results["results"].items():
        samples = results.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith(_STDERR) and isinstance(value, int | float):
                stderr = metrics.get(f"{metric}{_STDERR},{kind}")
                yield TaskScore(
                    model=model,
                    task=task,
                    metric=metric,
                    filter="" if kind == _NO_FILTER else kind,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    samples=samples or metrics.get("sample_len", 0),
                )
