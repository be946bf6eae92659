"""What the project's own source says, for tests that read it."""

from __future__ import annotations

import ast
from functools import cache


@cache
def nodes_of(source: str) -> tuple[ast.AST, ...]:
    """The imports, functions and calls of ``source``, wherever in it."""
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.Call)
    return tuple(node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
