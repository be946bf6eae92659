"""One loader under libFuzzer: ``python -m scripts.fuzzing.one_target NAME BASE CACHE WEIGHTS [libFuzzer's flags]``.

libFuzzer ends its process, so scripts.fuzz starts one of these for each target.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["stages"]):
    from scripts.fuzzing.targets import Target, make_targets

_BY_LIBFUZZER = 0.3


def fuzz(target: Target, flags: list[str]) -> None:
    """Never returns: libFuzzer exits, with 0 where nothing was found."""

    def mutated(data: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        if random.random() < _BY_LIBFUZZER:
            return bytes(atheris.Mutate(data, max_size))
        # Corpus entries drift away from what parses; the good file is where structure is.
        start = target.seed if random.random() < 0.5 else data
        return target.mutate(start, random)[:max_size]

    atheris.Setup([sys.argv[0], *flags], lambda data: bool(target.survives(data)) and None, custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    name, *folders = sys.argv[1:5]
    base, cache, weights = map(Path, folders)
    with tempfile.TemporaryDirectory() as folder:
        fuzz(make_targets(base, cache, weights, Path(folder))[name], sys.argv[5:])
