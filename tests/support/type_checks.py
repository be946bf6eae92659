"""Check the types of every call into stages and export, the shapes of arrays too, at little cost.

pytest's ``--jaxtyping-packages`` decorates every function and class with ``jaxtyping.jaxtyped``, which makes four calls
of each one and compiles two checks for each function that is ever imported: two fifths of the time that the tests took.
``decorate`` stands in for it: it compiles one check, when a function is first called.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import beartype
from jaxtyping import jaxtyped
from jaxtyping._import_hook import _JaxtypingLoader


def check_types_cheaply() -> None:
    """Have the modules that are imported from now on decorated by what is here; the checker is beartype."""

    def stand_in(*, typechecker: object) -> Callable[[Any], Any]:
        return decorate

    jaxtyping.jaxtyped = stand_in
    # What runpy compiles with checks in it would lie where processes look that know nothing of them, and break them.
    _JaxtypingLoader._cache_bytecode = lambda *_: None


def decorate(decorated: Any) -> Any:
    """Return a function that checks its calls; of a class, a dataclass's constructor is checked."""
    if not inspect.isclass(decorated):
        return _checked(decorated)
    if dataclasses.is_dataclass(decorated) and "__init__" in vars(decorated):
        decorated.__init__ = _checked(decorated.__init__)
    return decorated


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    check: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        __tracebackhide__ = True
        nonlocal check
        if check is None:
            check = _with_checks(function)
        return check(*arguments, **named)

    return call


def _with_checks(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what checks arguments and result; sizes of arrays that have the same name must agree within a call."""
    function.__annotations__ = hints = _resolved(function)
    checked = beartype(function)
    if not any(map(_has_array, hints.values())):
        return checked

    @functools.wraps(function)
    def in_one_scope(*arguments: Any, **named: Any) -> Any:
        __tracebackhide__ = True
        with jaxtyped("context"):
            return checked(*arguments, **named)

    return in_one_scope


def _resolved(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations as types; what is imported for mypy alone is left unchecked."""
    names = function.__globals__
    return {name: _resolved_hint(hint, names) for name, hint in function.__annotations__.items()}


def _resolved_hint(hint: object, names: dict[str, Any]) -> Any:
    def annotated() -> None: ...

    annotated.__annotations__ = {"hint": hint}
    try:
        return typing.get_type_hints(annotated, names, include_extras=True)["hint"]
    except Exception:
        return Any


def _has_array(hint: object) -> bool:
    is_array = inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray)
    return is_array or any(map(_has_array, typing.get_args(hint)))
