"""Read and write plan.toml, a plan that people can edit: one line a site."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stages.errors import OptionError
from stages.records.formats import Granularity, PerBlock, PerChannel, QuantSpec
from stages.records.sites import MatMulSite
from stages.system.json_file import explained, write_whole

PLAN = "plan.toml"
KEEP = "keep"
_FORMAT = re.compile(r"(?:([48])b(16|32|64|128|256)|8ch)(z?)|keep")
_HEADER = """\
# What every weight becomes (keep: it stays). Edit a format and give the file back with --plan.
# 4b32: INT4, a scale for 32 inputs (16 to 256); 4b32z: a zero point too; 8b128: INT8; 8ch: a scale per output channel.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSite:
    """One line: the site's format by label, the loss that was expected of it, and why it was chosen."""

    format: str
    loss: float | None = None
    why: str = ""


def plan_text(sites: Mapping[str, PlannedSite], notes: Sequence[str] = ()) -> str:
    """Return the file's content; ``notes`` are comments at its head."""
    lines = [_line(name, planned) for name, planned in sites.items()]
    return "\n".join([*(f"# {note}" for note in notes), _HEADER, "[sites]", *lines]) + "\n"


def write_plan(path: Path, text: str) -> None:
    """Write a plan, whole or not at all.

    Raises:
        UserError: the file can't be written.
    """
    with explained(f"{path} can't be written", "choose another --weights_path"):
        write_whole(path, text.encode())


def read_plan(path: Path, sites: Sequence[MatMulSite], nodes: Collection[str] = ()) -> dict[str, PlannedSite]:
    """Return the plan in ``path``, in the order of ``sites``, each of which it must name.

    Args:
        path: the file.
        sites: the MatMuls of the model.
        nodes: names of all experts of a node, which it may name.

    Raises:
        OptionError: it can't be read, isn't TOML, has an unreadable format, names an unknown site or leaves one out.
    """
    text, content = _read(path)
    planned = {name: _parsed(path, text, name, fields) for name, fields in content.items()}
    known = {*(site.name for site in sites), *nodes}
    for name in planned:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.1)
            hint = f"; the nearest name is '{nearest[0]}'" if nearest else ""
            raise OptionError(f"{_place(path, text, name)}: the model has no site '{name}'{hint}.")
    missing = [site.name for site in sites if site.name not in planned]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise OptionError(
            f"--plan {path} says nothing about '{missing[0]}'{more}; add a line under [sites] (format = \"keep\" "
            "leaves a site as it is)."
        )
    names = [*(site.name for site in sites), *(name for name in nodes if name in planned)]
    return {name: planned[name] for name in names}


def spec_of(planned: PlannedSite, site: MatMulSite, *, zero_point: bool | None) -> QuantSpec | None:
    """Return the number format that a line means for ``site``; None where it stays as it is.

    Args:
        planned: the line.
        site: which it is about.
        zero_point: whether codes have one, whatever the line says; None: as it says.
    """
    found = _FORMAT.fullmatch(planned.format)
    if found is None or planned.format == KEEP:
        return None
    bits, size, letter = found.groups()
    granularity: Granularity = PerChannel() if size is None else PerBlock(block_size=int(size))
    symmetric = not (letter if zero_point is None else zero_point)
    return QuantSpec(bits=4 if bits == "4" else 8, symmetric=symmetric, granularity=granularity, scale_dtype=site.dtype)


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    format: Annotated[str, Field(pattern=rf"^({_FORMAT.pattern})$")]
    loss: float | None = None
    why: str = ""


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    sites: dict[str, dict[str, object]]


def _read(path: Path) -> tuple[str, dict[str, dict[str, object]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        return text, _File.model_validate(tomllib.loads(text)).sites
    except OSError as error:
        raise OptionError(f"--plan {path} can't be read ({error.strerror}); pass a plan.toml.") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"--plan {path} is not UTF-8 text ({error}); pass a plan.toml.") from error
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"--plan {path} is not valid TOML: {error}; fix that line.") from error
    except RecursionError as error:
        raise OptionError(f"--plan {path} is nested too deeply to be read; flatten it.") from error
    except ValidationError as error:
        raise OptionError(
            f"--plan {path} must hold one table, [sites], with a line for each site; pass a plan.toml that "
            "stages.quantize wrote, or one like it."
        ) from error


def _parsed(path: Path, text: str, name: str, fields: Mapping[str, object]) -> PlannedSite:
    try:
        line = _Line.model_validate(fields)
    except ValidationError as error:
        field = error.errors()[0]["loc"][0]
        raise OptionError(
            f"{_place(path, text, name)}: the {field} of '{name}' is {fields.get(str(field), 'missing')!r}; a line has "
            "a format (4b32, 4b32z, 8b128, 8ch, keep; blocks are powers of two from 16 to 256) and may have a loss (a "
            "number) and a why."
        ) from error
    return PlannedSite(format=line.format, loss=line.loss, why=line.why)


def _place(path: Path, text: str, name: str) -> str:
    """Return the file and, where the name stands in it as we write it, the line."""
    for number, line in enumerate(text.splitlines(), start=1):
        if (name in line or _quoted(name) in line) and not line.lstrip().startswith("#"):
            return f"--plan {path}, line {number}"
    return f"--plan {path}"


def _line(name: str, planned: PlannedSite) -> str:
    parts = [f"format = {_quoted(planned.format)}"]
    if planned.loss is not None:
        parts.append(f"loss = {float(planned.loss)!r}")
    if planned.why:
        parts.append(f"why = {_quoted(planned.why)}")
    return f"{_quoted(name)} = {{ {', '.join(parts)} }}"


def _quoted(text: str) -> str:
    """Return ``text`` as a TOML basic string: JSON's escapes are among TOML's."""
    return json.dumps(text, ensure_ascii=False)
