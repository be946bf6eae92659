"""Turn what a person types into values: options of a command line, sizes such as 1.1GB, targets such as cpu@1.24."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, cast, get_args

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

from stages.errors import OptionError

Runtime = Literal["cpu", "cuda", "dml", "trt-rtx", "webgpu", "qnn"]
Release = tuple[int, int]
"""Major and minor version of ONNX Runtime; what is fused has never changed with a patch."""

_RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
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
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)([a-z]*)")
_VERSION = re.compile(r"(\d+)\.(\d+)(?:\.\d+)?")

_HELP = ConstructorRegistry()
_REWRITTEN = object()
"""Marks options whose help is already being rewritten."""


def parse_options(options_type: object, program: str, description: str | None = None) -> object:
    """Return ``sys.argv`` as ``options_type``; leave with the help text or an error, as tyro does.

    Args:
        options_type: a dataclass of options, or a union of them, of which each is a subcommand.
        program: what people typed, for the help text.
        description: what the help text begins with; None: the docstring of ``options_type``.
    """
    parsed: object = tyro.cli(
        cast(type, options_type), prog=program, description=description, use_underscores=True, registry=_HELP
    )
    return parsed


@_HELP.struct_rule
def _readable_help(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Show docstrings as paragraphs, where tyro keeps their line breaks, and no default where it is None or empty."""
    if _REWRITTEN in info.markers or not dataclasses.is_dataclass(info.type):
        return None
    spec = ConstructorRegistry.get_struct_spec(dataclasses.replace(info, markers=(*info.markers, _REWRITTEN)))
    assert isinstance(spec, StructConstructorSpec)
    fields = tuple(
        dataclasses.replace(
            field,
            type=cast(type, Annotated[field.type, tyro.conf.arg(help_behavior_hint=_default_hint)]),
            helptext=_paragraph(field.helptext),
        )
        for field in spec.fields
    )
    return dataclasses.replace(spec, fields=fields)


def _default_hint(default: str) -> str:
    return "" if default in ("None", "''", "") else f"(default: {default})"


def _paragraph(text: str | Callable[[], str | None] | None) -> Callable[[], str]:
    return lambda: " ".join(((text() if callable(text) else text) or "").split())


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
    assumed: bool = False
    """Whether nobody named the release."""

    @property
    def label(self) -> str:
        """Return the target as it is typed: cpu@1.24."""
        return f"{self.runtime}@{self.release[0]}.{self.release[1]}"

    @property
    def about_release(self) -> str:
        """Say what a person should know about the release whose rules are used; often nothing."""
        if self.assumed:
            return "the newest release known; --target runtime@version names another"
        if self.release > _NEWEST:
            return f"newer than any known: the rules of {_NEWEST[0]}.{_NEWEST[1]} are assumed"
        return ""


def parse_target(text: str) -> Target:
    """Return the target that ``cpu``, ``cuda@1.24`` or ``dml@1.24.1`` names; without a version the newest release.

    Raises:
        OptionError: the runtime is unknown, the version is invalid, or older than any that fuses INT4.
    """
    name, separator, version = text.strip().lower().partition("@")
    runtime = next((known for known in _RUNTIMES if known == name), None)
    if runtime is None:
        raise OptionError(f"--target {text}: '{name}' is not one of auto, any, {', '.join(_RUNTIMES)}.")
    if not separator:
        return Target(runtime=runtime, release=_NEWEST, assumed=True)
    match = _VERSION.fullmatch(version)
    if match is None:
        raise OptionError(f"--target {text}: '{version}' is not a version of ONNX Runtime such as 1.24 or 1.24.1.")
    release = (int(match[1]), int(match[2]))
    if release < _OLDEST:
        raise OptionError(
            f"--target {text}: no release before {_OLDEST[0]}.{_OLDEST[1]} fuses INT4; name that one or a later one."
        )
    return Target(runtime=runtime, release=release)
