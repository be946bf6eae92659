"""Make a command's help from its options: examples first, then the options in groups, what is rarely needed at the end.

``--help`` shows the first sentence and the default of each option that most people need; ``--help_all`` shows all.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

from stages.commands.output import as_called
from stages.commands.tables import wrapped

HELP, HELP_ALL = ("-h", "--help"), ("--help_all", "--help-all")
_ADVANCED = "advanced"
_GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "model": (
            "source", "onnx_path", "output_path", "base", "model", "path", "config", "report", "output",
            "shape", "layers", "precision", "execution_provider", "prompt", "system",
            "max_new_tokens", "temperature",
            "compare", "benchmark", "families", "times", "title", "overwrite", "dry_run",
        ),
        "text": ("dataset", "calib_size", "seq_len", "text", "windows", "generate", "lm_eval_tasks"),
        "formats": (
            "target", "block_size", "lm_head", "embedding", "use_zero_point", "layers_8bit",
            "accuracy_level", "options",
        ),
        "search": ("algo", "refine", "distill", "device", "ort", "modelopt"),
        "budget": ("target_size", "target_bpw"),
        "output": (
            "evaluate", "verify", "speed", "report", "results", "keep", "no_evaluation", "retry_failed", "worst",
            "quiet", "verbose", "json",
        ),
    }
)  # fmt: skip
"""The options that --help shows, in its order; all others are advanced."""
_BARE_WORDS: Mapping[str, str] = MappingProxyType(
    {"onnx_path": "BASE", "output_path": "OUTPUT", "base": "BASE", "model": "MODEL [...]"}
)
"""What stands for options whose names may be left out."""
_NAMES_WIDTH, _WIDEST = 24, 100
_FEW = 12
"""Options up to which --help shows all of a command's."""
_SENTENCE = re.compile(r"(?<=[.!?]) +(?=[A-Z0-9-]|\w+: )")
_WORDS: Mapping[object, str] = MappingProxyType({int: "INT", float: "NUMBER", str: "TEXT", bool: "True|False"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option of a command."""

    name: str
    hint: object
    """Its type."""
    text: str
    """Its docstring in one line."""
    default: object
    """``dataclasses.MISSING`` where it has none."""
    is_bare: bool
    """Whether its value stands without the option's name."""
    metavar: str | None
    aliases: tuple[str, ...]

    @property
    def is_required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def takes_many(self) -> bool:
        return get_origin(self.hint) is tuple

    @property
    def choices(self) -> tuple[str, ...]:
        """Return the words that it takes; none where it takes others too."""
        parts = _parts(self.hint)
        if not all(part is NoneType or get_origin(part) is Literal for part in parts):
            return ()
        return tuple(str(word) for part in parts for word in (get_args(part) or (None,)))

    @property
    def value(self) -> str:
        """Return what stands for its value: PATH, INT, {a,b}."""
        if self.metavar is not None:
            return self.metavar
        return "" if self.hint in (bool, bool | None) else _value(self.hint)

    def spelled(self, positional: Sequence[str]) -> str:
        """Return the option with its value, as the list of options shows it."""
        if self.is_bare:
            return self.name.upper()
        is_on = (self.hint, self.default) == (bool, True)
        off = f", --no_{self.name}" if is_on or self.hint == bool | None else ""
        word = f"{_BARE_WORDS[self.name]}, " if self.name in positional else ""
        return " ".join(filter(None, (f"{word}--{self.name}{off}", self.value)))

    def as_usage(self, positional: Sequence[str]) -> str:
        """Return the option with its value as people must type it."""
        if self.is_bare:
            return self.name.upper()
        return _BARE_WORDS[self.name] if self.name in positional else f"--{self.name} {self.value}"

    def explained(self, *, whole: bool) -> str:
        """Return its docstring, or the first sentence of that, with its default."""
        sentences = _SENTENCE.split(self.text)
        shown = sentences if whole else [*sentences[:1], *(one for one in sentences[1:] if one.startswith("Default"))]
        given = self.default in (dataclasses.MISSING, None, "", (), False) or isinstance(self.default, dict)
        if not given and "efault" not in self.text:
            shown.append(f"Default: {_default(self.default)}.")
        return " ".join(shown)


def options_of(options_type: type) -> tuple[Option, ...]:
    """Return the options of a dataclass, those of the dataclasses in it among them."""
    spec = ConstructorRegistry.get_struct_spec(
        StructTypeInfo.make(options_type, default=tyro.MISSING, in_union_context=False)
    )
    assert isinstance(spec, StructConstructorSpec)
    texts = {field.name: field.helptext for field in spec.fields}
    hints, found = get_type_hints(options_type, include_extras=True), list[Option]()
    for field in dataclasses.fields(options_type):
        hint, marks = _unwrapped(hints[field.name])
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            found += options_of(hint)
            continue
        text = texts[field.name]
        factory = field.default_factory
        found.append(
            Option(
                name=field.name,
                hint=hint,
                text=" ".join(((text() if callable(text) else text) or "").split()),
                default=field.default if factory is dataclasses.MISSING else factory(),
                is_bare=any(mark is tyro.conf.Positional for mark in marks),
                metavar=next((mark.metavar for mark in marks if getattr(mark, "metavar", None)), None),
                aliases=tuple(name.strip("-") for mark in marks for name in getattr(mark, "aliases", None) or ()),
            )
        )
    return tuple(found)


def help_text(options_type: type, program: str, *, whole: bool, width: int | None = None) -> str:
    """Return the help of a command.

    Args:
        options_type: the dataclass of its options, whose docstring says what it does, whose ``examples`` hold the
            words behind ``program``, and whose ``positional`` are the options whose names may be left out.
        program: what people type.
        whole: show every option, and all that is known of each.
        width: columns of the terminal; None: as many as it has.
    """
    width = min(width or shutil.get_terminal_size().columns, _WIDEST)
    options, positional = options_of(options_type), getattr(options_type, "positional", ())
    what = as_called(" ".join((options_type.__doc__ or "").split()), program)
    lines = [*wrapped(_usage(options, program, positional), width), "", *wrapped(what, width)]
    examples: tuple[str, ...] = getattr(options_type, "examples", ())
    if examples:
        lines += ["", "examples:"]
        lines += [line for example in examples for line in _command_line(f"{program} {example}".rstrip(), width)]
    hidden = () if whole or len(options) <= _FEW else dict(_grouped(options)).get(_ADVANCED, ())
    for group, members in _grouped(options):
        if members != hidden:
            lines += ["", f"{group}:"]
            for option in members:
                lines += _beside(option.spelled(positional), as_called(option.explained(whole=whole), program), width)
    shortened = any(option.explained(whole=True) != option.explained(whole=False) for option in options)
    if not whole and (hidden or shortened):
        more = f", and {len(hidden)} more" if hidden else ""
        lines += ["", *wrapped(f"{program} --help_all explains these options in full{more}.", width)]
    return "\n".join(lines)


def listing(entries: Mapping[str, str], width: int | None = None) -> Iterator[str]:
    """Yield lines with each name and what it stands for beside it.

    Args:
        entries: explanation by name.
        width: columns of the terminal; None: as many as it has.
    """
    width = min(width or shutil.get_terminal_size().columns, _WIDEST)
    for name, text in entries.items():
        yield from _beside(name, text, width)


def first_sentence(options_type: type) -> str:
    """Return the first sentence of a command's docstring."""
    return _SENTENCE.split(" ".join((options_type.__doc__ or "").split()))[0]


def _usage(options: Sequence[Option], program: str, positional: Sequence[str]) -> str:
    needed = [option for option in options if option.is_required]
    needed.sort(key=lambda option: not (option.is_bare or option.name in positional))
    return " ".join(["usage:", program, *(option.as_usage(positional) for option in needed), "[options]"])


def _command_line(text: str, width: int) -> Iterator[str]:
    """Yield a command in lines that a shell reads as one."""
    *most, last = wrapped(text, width - 6)
    for number, line in enumerate([*(f"{line} \\" for line in most), last]):
        yield f"{'  ' if number == 0 else '    '}{line}"


def _grouped(options: Sequence[Option]) -> list[tuple[str, list[Option]]]:
    """Return the groups that have members; an option that must be given is never an advanced one."""
    known = {name: group for group, names in _GROUPS.items() for name in names}
    groups: dict[str, list[Option]] = {group: [] for group in (*_GROUPS, _ADVANCED)}
    for option in options:
        groups[known.get(option.name, "model" if option.is_required else _ADVANCED)].append(option)
    for group, names in _GROUPS.items():
        groups[group].sort(key=lambda option: names.index(option.name) if option.name in names else len(names))
    return [(group, members) for group, members in groups.items() if members]


def _beside(name: str, text: str, width: int) -> Iterator[str]:
    """Yield ``text`` in a column beside ``name``, or below it where that is long."""
    lines = wrapped(text, width - _NAMES_WIDTH)
    if len(name) + 4 > _NAMES_WIDTH:
        yield from (f"  {line}" for line in wrapped(name, width - 2))
    else:
        yield f"  {name}".ljust(_NAMES_WIDTH) + lines.pop(0)
    yield from (" " * _NAMES_WIDTH + line for line in lines)


def _unwrapped(hint: object) -> tuple[object, tuple[Any, ...]]:
    """Return a type without its marks, and those."""
    if get_origin(hint) is Annotated:
        inner, marks = _unwrapped(get_args(hint)[0])
        return inner, (*get_args(hint)[1:], *marks)
    return hint, ()


def _alternatives(hint: object) -> tuple[object, ...]:
    """Return the types that a value may have: of a union its members, of a tuple its items'."""
    hint, _ = _unwrapped(hint)
    if get_origin(hint) is tuple:
        return _alternatives(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return tuple(part for each in get_args(hint) for part in _alternatives(each))
    return (hint,)


def _parts(hint: object) -> list[object]:
    """Return the types that people type a value of: None only where it is one of several."""
    return [part for part in _alternatives(hint) if part is not NoneType or get_origin(hint) is tuple]


def _value(hint: object) -> str:
    one = "|".join(dict.fromkeys(map(_word, _parts(hint))))
    return f"{one} [...]" if get_origin(hint) is tuple else one


def _word(hint: object) -> str:
    if get_origin(hint) is Literal:
        return f"{{{','.join(str(word) for word in get_args(hint))}}}"
    if get_origin(hint) is dict:
        return "NAME VALUE [...]"
    return "None" if hint is NoneType else _WORDS.get(hint, "PATH")


def _default(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(str(each) or "''" for each in value)
    return "on" if value is True else str(value)
