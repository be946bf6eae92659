"""Time one model once, in a process of its own.

Run as ``python -m stages.evaluation.speed_round MODEL REQUEST.json ROUND.json``.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from stages.errors import UserError
from stages.runtime.genai import cannot_run, open_genai

OPTION = "--speed"
_WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedRequest:
    """The prompt and settings of every round of every model."""

    prompt: tuple[int, ...]
    """Token ids."""
    new_tokens: int
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Seconds that one process measured."""

    load: float
    prompt: float
    """From the prompt to the first new token."""
    decode: float
    """For all new tokens after the first."""


REQUESTS = TypeAdapter(SpeedRequest)
ROUNDS = TypeAdapter(Round)


def time_round(folder: Path, request: SpeedRequest) -> Round:
    """Time loading the model and answering the prompt, after a few tokens of warm-up.

    Raises:
        UserError: onnxruntime-genai isn't installed, or the model can't be run by it here.
    """
    started = time.perf_counter()
    session = open_genai(folder, OPTION, request.threads)
    loaded = time.perf_counter()
    for _ in session.generate(request.prompt[:_WARM_UP_TOKENS], _WARM_UP_TOKENS, past_the_end=True):
        pass
    prompted = time.perf_counter()
    tokens = session.generate(request.prompt, request.new_tokens, past_the_end=True)
    next(tokens)
    first = time.perf_counter()
    for _ in tokens:
        pass
    return Round(load=loaded - started, prompt=first - prompted, decode=time.perf_counter() - first)


def main(folder: str, request: str, answer: str) -> None:
    """Measure what the file ``request`` asks for, and write the file ``answer``."""
    try:
        found = time_round(Path(folder), REQUESTS.validate_json(Path(request).read_bytes()))
    except RuntimeError as error:
        sys.exit(f"error: {cannot_run(Path(folder), OPTION, error)}")
    except UserError as error:
        sys.exit(f"error: {error}")
    Path(answer).write_bytes(ROUNDS.dump_json(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
