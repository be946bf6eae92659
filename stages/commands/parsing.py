"""Sizes as people write them: 1.1GB, 900MB, 850MiB."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

from stages.errors import OptionError

_UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
}  # fmt: skip


_AMOUNT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)([a-z]*)")


def parse_size(text: str, option: str) -> int:
    """Bytes of an amount such as 1.1GB (10^9) or 850MiB (2^20); a bare number counts bytes.

    Raises:
        OptionError: ``text`` is no such amount, or zero.
    """
    match = _AMOUNT.fullmatch(text.strip().replace(" ", "").lower())
    number = float(match[1]) * _UNITS[match[2]] if match is not None and match[2] in _UNITS else 0.0
    if not 1 <= number < math.inf:
        raise OptionError(f"{option} '{text}' is no size; write one such as 1.1GB, 900MB or 850MiB.")
    return int(number)


Runtime = Literal["cpu", "cuda", "dml", "trt-rtx", "webgpu", "qnn"]


Release = tuple[int, int]
"""Major and minor version of ONNX Runtime; what is fused has never changed with a patch."""


_RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)


_OLDEST: Release = (1, 20)
"""The first release that fuses INT4 DequantizeLinear and MatMul (microsoft/onnxruntime#21374)."""


_NEWEST: Release = (1, 32)
"""The newest release whose rules were looked at."""


RELEASES: tuple[Release, ...] = tuple((1, minor) for minor in range(_OLDEST[1], _NEWEST[1] + 1))
"""Those whose rules are known, the oldest first."""


_VERSION = re.compile(r"(\d+)\.(\d+)(?:\.\d+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A runtime at a release of ONNX Runtime; ``assumed`` says that nobody named the release."""

    runtime: Runtime
    release: Release
    assumed: bool = False

    @property
    def label(self) -> str:
        """cpu@1.24"""
        return f"{self.runtime}@{self.release[0]}.{self.release[1]}"

    @property
    def about_release(self) -> str:
        """What a person should know about the release that the rules are taken from; often nothing."""
        if self.assumed:
            return "the newest release known; --target runtime@version names another"
        if self.release > _NEWEST:
            return f"newer than any looked at: the rules of {_NEWEST[0]}.{_NEWEST[1]} are assumed"
        return ""


def parse_target(text: str) -> Target:
    """``cpu``, ``cuda@1.24`` or ``dml@1.24.1``; without a version the newest release known.

    Raises:
        OptionError: the runtime is unknown, the version is none, or older than any that fuses INT4.
    """
    name, separator, version = text.strip().lower().partition("@")
    runtime = next((known for known in _RUNTIMES if known == name), None)
    if runtime is None:
        raise OptionError(f"--target {text}: '{name}' is not one of {', '.join(_RUNTIMES)}.")
    if not separator:
        return Target(runtime=runtime, release=_NEWEST, assumed=True)
    match = _VERSION.fullmatch(version)
    if match is None:
        raise OptionError(f"--target {text}: '{version}' is no version of ONNX Runtime such as 1.24 or 1.24.1.")
    release = (int(match[1]), int(match[2]))
    if release < _OLDEST:
        raise OptionError(
            f"--target {text}: no release before {_OLDEST[0]}.{_OLDEST[1]} fuses INT4; name that one or a later one."
        )
    return Target(runtime=runtime, release=release)
