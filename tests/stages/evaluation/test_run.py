"""A whole evaluation: optional packages load only where they are asked for."""

from __future__ import annotations

import ast
from pathlib import Path

import stages.evaluation.run

FOLDER = Path(stages.evaluation.run.__file__).parent


def imported_on_loading(file: Path) -> set[str]:
    """Return the modules that ``file`` imports outside functions."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    names = {node.module or "" for node in body if isinstance(node, ast.ImportFrom)}
    return names | {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}


def test_lm_eval_is_loaded_only_when_tasks_are_run() -> None:
    imports = {file.stem: imported_on_loading(file) for file in FOLDER.rglob("*.py")}
    needing = {name for name, found in imports.items() if any(one.partition(".")[0] == "lm_eval" for one in found)}
    assert needing == {"lm_model"}
    assert not [name for name, found in imports.items() if "stages.evaluation.tasks.lm_model" in found]
