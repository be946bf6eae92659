"""YAML and JSON files as dictionaries."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from stages.errors import UserError

_BOOLEAN = "tag:yaml.org,2002:bool"
_TIME = "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    """Safe YAML in which ``off`` is a word, as YAML 1.2 and the options have it, and no key stands twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # the base class declares it so
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOLEAN, _TIME)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A dictionary; a key that stands twice is an error, not silently the last."""
        names = [key.value for key, _ in node.value]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise yaml.MarkedYAMLError(problem=f"{name} stands twice", problem_mark=node.value[index][0].start_mark)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


_Loader.add_implicit_resolver(_BOOLEAN, re.compile("^(?:true|false)$"), ["t", "f"])


def read_mapping(path: Path) -> Mapping[str, Any]:
    """The content of a .json or YAML file.

    Raises:
        UserError: the file can't be read or parsed, or isn't a dictionary.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text) if path.suffix == ".json" else yaml.load(text, _Loader)
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); pass a run file.") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is no text that can be read as YAML ({type(error).__name__}); repair it.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}; repair the JSON.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_place(error)}; repair the YAML.") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} holds no sections; write calibrate: and quantize: with their options below.")
    return content


def _place(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or "it can't be parsed"
    mark = getattr(error, "problem_mark", None)
    return f": {problem}" if mark is None else f", line {mark.line + 1}: {problem}"
