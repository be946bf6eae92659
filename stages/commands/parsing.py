"""Turn what a person types into values: options of a command line, sizes such as 1.1GB, targets such as cpu@1.24."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, NoReturn, TypeVar, cast, get_args, get_origin, get_type_hints

import tyro
from rich.console import Console
from rich.text import Text

from stages.commands.help import HELP, HELP_ALL, Option, help_text, options_of
from stages.commands.output import print_message, write_out
from stages.errors import OptionError, UserError

Runtime = Literal["cpu", "cuda", "dml", "trt-rtx", "webgpu", "qnn"]
Release = tuple[int, int]
"""Major and minor version of ONNX Runtime; what is fused has never changed with a patch."""

_RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
RUN_EXPERTS: frozenset[Runtime] = frozenset({"cpu", "cuda", "trt-rtx", "webgpu"})
"""Runtimes with a QMoE that reads what is written here."""
_OLDEST: Release = (1, 20)
"""The first release that fuses INT4 DequantizeLinear and MatMul (microsoft/onnxruntime#21374)."""
_NEWEST: Release = (1, 32)
"""The newest release whose rules are known."""
RELEASES: tuple[Release, ...] = tuple((1, minor) for minor in range(_OLDEST[1], _NEWEST[1] + 1))
"""Those whose rules are known, the oldest first."""

_UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
}  # fmt: skip
_TRUTH = {"true": True, "false": False}
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)([a-z]*)")
_VERSION = re.compile(r"(\d+)\.(\d+)(?:\.\d+)?")

Options = TypeVar("Options")


def parse_options(options_type: type[Options], program: str, arguments: Sequence[str] | None = None) -> Options:
    """Return a command line as ``options_type``; leave with the help text, or with code 2 and an error.

    Args:
        options_type: a dataclass of options; ``positional`` in it are those whose names may be left out.
        program: what people typed, for the help text.
        arguments: the words behind ``program``; None: those of ``sys.argv``.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if any(word in (*HELP, *HELP_ALL) for word in given):
        whole = any(word in HELP_ALL for word in given)
        write_out(help_text(options_type, program, whole=whole) + "\n")
        sys.exit(0)
    try:
        return parse_words(options_type, program, given)
    except OptionError as error:
        leave_with(error)


def parse_words(options_type: type[Options], program: str, words: Sequence[str]) -> Options:
    """Return the words behind ``program`` as ``options_type``; leave with code 2 where a value is of another type.

    Raises:
        OptionError: an option is unknown or missing, or a word is none of its choices.
    """
    positional: tuple[str, ...] = getattr(options_type, "positional", ())
    given = name_bare_words(words, options_type, positional)
    _refuse_typos(options_of(options_type), program, given, positional)
    parsed: object = tyro.cli(cast(type, options_type), prog=program, use_underscores=True, args=given)
    return cast(Options, parsed)


def leave_with(error: UserError) -> NoReturn:
    """Print an error in the command line itself, and leave with code 2."""
    print_message(Console(stderr=True), Text(f"error: {error}"))
    sys.exit(2)


def suggestion(word: str, known: Iterable[str], otherwise: str) -> str:
    """Return a question about the closest of ``known`` to ``word``, or ``otherwise`` where none is close."""
    spelled = {name.lower(): name for name in sorted(known)}
    close = difflib.get_close_matches(word.lower(), spelled, 1)
    return f"did you mean {spelled[close[0]]}?" if close else otherwise


def _refuse_typos(options: Sequence[Option], program: str, arguments: Sequence[str], positional: Sequence[str]) -> None:
    """Raise OptionError where an option doesn't exist, or where a word isn't among the choices of its option."""
    named = {name: option for option in options for name in (option.name, *option.aliases)}
    given: set[str] = set()
    known = {*named, *(f"no_{name}" for name in named)}
    for index, word in enumerate(arguments):
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--"):
            continue
        if name not in known:
            fix = suggestion(f"--{name}", [f"--{one}" for one in named], f"see {program} --help_all.")
            raise OptionError(f"{program} has no option --{name}; {fix}")
        given.add(name)
        if name in named and (choices := named[name].choices):
            words = [value] if equals else list(takewhile(lambda one: one[:1] != "-", arguments[index + 1 :]))
            _refuse_words(name, choices, words if named[name].takes_many else words[:1])
    has_words = any(not word.startswith("-") for word in arguments)
    missing = [
        one.as_usage(positional)
        for one in options
        if one.is_required and (not has_words if one.is_bare else one.name not in given)
    ]
    if missing:
        raise OptionError(f"{program} needs {' and '.join(missing)}; {program} --help shows examples.")


def _refuse_words(option: str, choices: Sequence[str], words: Sequence[str]) -> None:
    """Raise OptionError where one of the words that follow an option is none of its choices."""
    for word in words:
        if word not in choices:
            fix = suggestion(word, choices, f"choose from {', '.join(choices)}.")
            raise OptionError(f"--{option} can't be {word}; {fix}")


def name_bare_words(arguments: Sequence[str], options_type: type, names: Sequence[str]) -> list[str]:
    """Return ``arguments`` with an option before each bare word: the first of ``names`` that isn't given yet.

    A word is bare where no option takes it as its value; an unknown option counts as taking one. ``--option False`` of
    one that is on or off becomes ``--no_option``.

    Args:
        arguments: the words of a command line.
        options_type: a dataclass of options.
        names: options that a bare word may be the value of, in this order.

    Raises:
        OptionError: there are more bare words than ``names`` that aren't given.
    """
    most_values = _most_values(options_type)
    arguments = _without_truth(arguments, {name for name, most in most_values.items() if f"no_{name}" in most_values})
    given = [word[2:].partition("=")[0].replace("-", "_") for word in arguments if word.startswith("--")]
    left, named, values = [name for name in names if name not in given], list[str](), 0.0
    for word in arguments:
        if values:
            values -= 1
            if not word.startswith("--") or values < math.inf:
                named.append(word)
                continue
        if names and not word.startswith("-"):
            if left:
                named.append(f"--{left.pop(0)}")
            elif most_values[names[-1]] < math.inf:
                taken = " and ".join(f"--{name}" for name in names)
                raise OptionError(
                    f"{word}: {taken} are given already; leave the word out, or write its option before it."
                )
            named.append(word)
            continue
        named.append(word)
        option, equals, _ = word[2:].partition("=")
        takes_values = word.startswith("--") and not equals
        values = most_values.get(option.replace("-", "_"), 1.0) if takes_values else 0.0
    return named


def _without_truth(arguments: Sequence[str], switches: Collection[str]) -> list[str]:
    """Return ``arguments`` with ``--option True`` as ``--option`` and ``--option=false`` as ``--no_option``."""
    left, words = list(arguments[::-1]), list[str]()
    while left:
        word = left.pop()
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if word.startswith("--") and name in switches:
            if not equals and left and left[-1].lower() in _TRUTH:
                value = left.pop()
            if value.lower() in _TRUTH:
                word = f"--{name}" if _TRUTH[value.lower()] else f"--no_{name}"
        words.append(word)
    return words


def _most_values(options_type: type) -> dict[str, float]:
    """Return the options of a dataclass and of those in it, with how many values each takes at most."""
    found: dict[str, float] = {"help": 0.0}
    for name, hint in get_type_hints(options_type).items():
        if dataclasses.is_dataclass(hint):
            found |= _most_values(cast(type, hint))
        elif hint in (bool, bool | None):
            found |= {name: 0.0, f"no_{name}": 0.0}
        else:
            found[name] = math.inf if get_origin(hint) is tuple else 1.0
    return found


def parse_size(text: str, option: str) -> int:
    """Return the bytes of a size such as 1.1GB (10^9) or 850MiB (2^20); a bare number counts bytes.

    Raises:
        OptionError: ``text`` isn't a size, or is zero.
    """
    match = _SIZE.fullmatch(text.strip().replace(" ", "").lower())
    number = float(match[1]) * _UNITS[match[2]] if match is not None and match[2] in _UNITS else 0.0
    if not 1 <= number < math.inf:
        raise OptionError(f"{option} '{text}' is not a size; write one such as 1.1GB, 900MB or 850MiB.")
    return int(number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A runtime at a release of ONNX Runtime."""

    runtime: Runtime
    release: Release
    release_because: str = ""
    """Why it is this release, where nobody named one."""

    @property
    def label(self) -> str:
        """Return the target as it is typed: cpu@1.24."""
        return f"{self.runtime}@{self.release[0]}.{self.release[1]}"

    @property
    def about_release(self) -> str:
        """Say what a person should know about the release whose rules are used; often nothing."""
        if self.release_because:
            return f"{self.release_because}; --target runtime@version names another"
        if self.release > _NEWEST:
            return f"newer than any known: the rules of {_NEWEST[0]}.{_NEWEST[1]} are assumed"
        return ""


def parse_target(text: str) -> Target:
    """Return the target that ``cpu``, ``cuda@1.24`` or ``dml@1.24.1`` names.

    Without a version it is the installed release of ONNX Runtime, or the newest known where the rules don't know that.

    Raises:
        OptionError: the runtime is unknown, the version is invalid, or older than any that fuses INT4.
    """
    name, separator, version = text.strip().lower().partition("@")
    runtime = next((known for known in _RUNTIMES if known == name), None)
    if runtime is None:
        raise OptionError(f"--target {text}: '{name}' is not one of auto, any, {', '.join(_RUNTIMES)}.")
    if not separator:
        return _unnamed_release(runtime)
    match = _VERSION.fullmatch(version)
    if match is None:
        raise OptionError(f"--target {text}: '{version}' is not a version of ONNX Runtime such as 1.24 or 1.24.1.")
    release = (int(match[1]), int(match[2]))
    if release < _OLDEST:
        raise OptionError(
            f"--target {text}: no release before {_OLDEST[0]}.{_OLDEST[1]} fuses INT4; name that one or a later one."
        )
    return Target(runtime=runtime, release=release)


def _unnamed_release(runtime: Runtime) -> Target:
    import onnxruntime  # here, since most commands parse no target

    match = _VERSION.match(onnxruntime.__version__)
    installed = None if match is None else (int(match[1]), int(match[2]))
    if installed in RELEASES:
        return Target(runtime=runtime, release=installed, release_because="installed here")
    return Target(runtime=runtime, release=_NEWEST, release_because="the newest known")
