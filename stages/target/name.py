"""What ``--target`` names: a runtime, and the release of ONNX Runtime that it comes with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from stages.errors import RecipeError

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
        RecipeError: the runtime is unknown, the version is none, or older than any that fuses INT4.
    """
    name, separator, version = text.strip().lower().partition("@")
    runtime = next((known for known in _RUNTIMES if known == name), None)
    if runtime is None:
        raise RecipeError(f"--target {text}: '{name}' is not one of {', '.join(_RUNTIMES)}.")
    if not separator:
        return Target(runtime=runtime, release=_NEWEST, assumed=True)
    match = _VERSION.fullmatch(version)
    if match is None:
        raise RecipeError(f"--target {text}: '{version}' is no version of ONNX Runtime such as 1.24 or 1.24.1.")
    release = (int(match[1]), int(match[2]))
    if release < _OLDEST:
        raise RecipeError(
            f"--target {text}: no release before {_OLDEST[0]}.{_OLDEST[1]} fuses INT4; name that one or a later one."
        )
    return Target(runtime=runtime, release=release)
