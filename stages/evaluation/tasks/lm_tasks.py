"""Run lm-eval tasks on models in ONNX Runtime: tasks by name from the hub, or from local task files."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stages.calibration.text.tokenizer import load_tokenizer
from stages.commands.progress import Progress
from stages.errors import UserError, with_class_name
from stages.evaluation.records import TaskScore
from stages.model.directory import ModelDirectory
from stages.runtime.decoder import open_decoder
from stages.runtime.session import SessionSettings

_OPTION = "--lm_eval_tasks"
_YAML = ".yaml"
_STDERR = "_stderr"
_NO_FILTER = "none"
TaskSpec = str | dict[str, Any]
"""A task as lm-eval takes it: a name, or the content of a task file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRequest:
    """The tasks to run, and how much of each."""

    specs: tuple[TaskSpec, ...]
    limit: int | None
    """Samples of each task; None for all."""
    manager: Any
    """lm-eval's TaskManager: kept, because it takes half a minute to index lm-eval's own tasks."""


def require_lm_eval() -> None:
    """Raise UserError where lm-eval isn't installed."""
    if find_spec("lm_eval") is None:
        raise UserError(f"{_OPTION} needs lm-eval, which isn't installed: pip install 'lm-eval>=0.4.13'.")


def find_tasks(names: Sequence[str], limit: int | None) -> TaskRequest:
    """Return the tasks that ``names`` mean: names that lm-eval knows, task files (.yaml), or folders of them.

    Paths of data files in a task file may be relative to it.

    Args:
        names: the values of --lm_eval_tasks.
        limit: samples of each task; None for all.

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
    directory: ModelDirectory,
    request: TaskRequest,
    settings: SessionSettings,
    progress: Progress,
    tokenizer_source: str | None = None,
) -> tuple[TaskScore, ...]:
    """Run the tasks on one model and return every metric of every task, groups of tasks included.

    Args:
        directory: the model.
        request: what ``find_tasks`` found.
        settings: how its session is opened.
        progress: shows how far each kind of request is.
        tokenizer_source: folder or hub name of its tokenizer; None: its own folder.

    Raises:
        UserError: a task's data is missing, it asks for what the model can't do, or the model can't be run.
    """
    from lm_eval.evaluator import simple_evaluate

    from stages.evaluation.tasks.lm_model import OnnxRuntimeLM

    tokenizer = load_tokenizer(tokenizer_source or str(directory.folder))
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
                f"{_OPTION}: lm-eval stopped ({with_class_name(error)}); where a data set is missing, run once online "
                "or pass a task file whose data lies on this machine."
            ) from error
    return tuple(_scores(directory.folder.name, results))


def _task_files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob(f"*{_YAML}"))
    if path.suffix != _YAML:
        return []
    if not path.is_file():
        raise UserError(
            f"{_OPTION} {path} doesn't exist; pass a task file, a folder of them, or a name that lm-eval knows."
        )
    return [path]


def _read_task(file: Path) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        task: dict[str, Any] = load_yaml(file)
    except Exception as error:  # yaml's own classes, and whatever functions beside the file raise
        raise UserError(f"{_OPTION} {file} can't be read ({with_class_name(error)}); fix the file.") from error
    files = task.get("dataset_kwargs", {}).get("data_files")
    if files is not None:
        task["dataset_kwargs"] = {**task["dataset_kwargs"], "data_files": _resolve_files(files, file.parent)}
    return task


def _resolve_files(files: object, folder: Path) -> object:
    """Return ``files`` (a path, or lists and mappings of some) with those that lie in ``folder`` as absolute paths."""
    match files:
        case str():
            return str((folder / files).absolute()) if (folder / files).is_file() else files
        case list():
            return [_resolve_files(file, folder) for file in files]
        case dict():
            return {split: _resolve_files(file, folder) for split, file in files.items()}
        case _:
            return files


def _require_known(name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise UserError(
            f"{_OPTION} {name} is not a task that lm-eval knows, a {_YAML} file or a folder of them; "
            "'lm-eval ls tasks' lists the names."
        )


def _scores(model: str, results: Mapping[str, Any]) -> Iterator[TaskScore]:
    """Yield every number of lm-eval's results: ``metric,filter`` and ``metric_stderr,filter``."""
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
