"""Read a run file and turn its dictionaries into the dataclasses of options, with every key and value checked."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from stages.commands.options import CommandOptions
from stages.commands.parsing import suggestion
from stages.errors import UserError

Options = TypeVar("Options", bound=CommandOptions)

_BOOLEAN = "tag:yaml.org,2002:bool"
_TIME = "tag:yaml.org,2002:timestamp"


def option_names(kind: type[CommandOptions]) -> frozenset[str]:
    """Return the options of a command, without those about printing, which belong to the run."""
    return frozenset(field.name for field in dataclasses.fields(kind)) - {"printing"}


def unknown(place: str, what: str, key: str, known: Iterable[str], otherwise: str) -> UserError:
    """Return an error about a key that isn't among ``known``, which suggests the closest one if any is close.

    Args:
        place: the file, and the section in it.
        what: what the key should be, such as "option".
        key: the key.
        known: the valid keys.
        otherwise: what to do where none is close.
    """
    return UserError(f"{place} has no {what} {key}; {suggestion(key, known, otherwise)}")


def read_options(kind: type[Options], given: Mapping[str, Any], file: Path, section: str) -> Options:
    """Return ``given`` as an instance of ``kind``.

    Args:
        kind: the command's dataclass of options.
        given: option -> value; names may have hyphens in place of underscores.
        file: the run file, for messages.
        section: the section of the file.

    Raises:
        UserError: an option is unknown or missing, or a value has the wrong type.
    """
    place, hints = f"{file}: {section}", get_type_hints(kind, include_extras=True)
    names, values = option_names(kind), dict[str, Any]()
    for key, value in given.items():
        name = str(key).replace("-", "_")
        if name not in names:
            raise unknown(place, "option", str(key), names, f"see genai-quant {section} --help.")
        values[name] = _value(value, hints[name], f"{place}: {key}")
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and field.name not in values:
            raise UserError(f"{place} lacks {field.name}; add it.")
    return kind(**values)


def _value(value: object, hint: object, place: str) -> object:
    """Return ``value`` as the option's type: text becomes a path, a number a word where one is due (``lm_head: 4``)."""
    if type(value) is int and str(value) in _words(hint):
        value = str(value)
    try:
        checked: TypeAdapter[object] = TypeAdapter(hint, config=ConfigDict(coerce_numbers_to_str=True))  # type: ignore[arg-type]  # a type known only at run time
        return checked.validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise UserError(
            f"{place} can't be {value!r} ({reason[:1].lower()}{reason[1:]}); write another value."
        ) from error


def _words(hint: object) -> set[str]:
    """Return the words among the choices of a type, however deep inside it."""
    if get_origin(hint) is Literal:
        return {choice for choice in get_args(hint) if isinstance(choice, str)}
    return {word for part in get_args(hint) if not isinstance(part, str | int) for word in _words(part)}


class _Loader(yaml.SafeLoader):
    """Safe YAML in which ``off`` is a word, as in YAML 1.2 and in our options, and no key may occur twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # the base class declares it so
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOLEAN, _TIME)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return a dictionary; raise an error where a key occurs twice, rather than silently take the last."""
        names = [key.value for key, _ in node.value]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise yaml.MarkedYAMLError(problem=f"{name} occurs twice", problem_mark=node.value[index][0].start_mark)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


_Loader.add_implicit_resolver(_BOOLEAN, re.compile("^(?:true|false)$"), ["t", "f"])


def read_mapping(path: Path) -> Mapping[str, Any]:
    """Return the content of a .json or YAML file.

    Raises:
        UserError: the file can't be read or parsed, or isn't a dictionary.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text) if path.suffix == ".json" else yaml.load(text, _Loader)
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); pass a run file.") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} can't be read as YAML ({type(error).__name__}); fix it.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}; fix the JSON.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_place(error)}; fix the YAML.") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} holds no sections; write calibrate: and quantize: with their options below.")
    return content


def _place(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or "it can't be parsed"
    mark = getattr(error, "problem_mark", None)
    return f": {problem}" if mark is None else f", line {mark.line + 1}: {problem}"
