"""Take a tiny model of each architecture the whole way: ``python -m scripts.architectures --output models/matrix``."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from scripts.architectures.matrix import BUILDS, Cell, append_cell, read_cells
from scripts.options import ArchitecturesConfig
from stages.commands.output import Section
from stages.commands.run import run_command
from stages.errors import UserError
from stages.system.atomic import atomic_directory
from stages.system.json_file import write_whole

_LOGGER = logging.getLogger(__name__)
_SECONDS = 600
"""The longest that one model may take."""
RESULTS = "architectures.jsonl"


def take_all(config: ArchitecturesConfig) -> Iterator[Section]:
    """Take the models that ``config`` names the whole way, but for those whose result is there, one after the other.

    Each runs in a process of its own: a runtime that crashes is a result too.
    """
    from scripts.architectures.configs import ARCHITECTURES

    folder = config.output.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    # Code that stands in for a repository's is copied there by transformers.
    os.environ |= {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    results = folder / RESULTS
    known = {(cell.architecture, cell.build) for cell in read_cells(results)} if results.exists() else set()
    names = [one.name for one in ARCHITECTURES]
    for name in config.names or names:
        if name not in names:
            raise UserError(f"--names {name} is no architecture of the builder's; choose of {', '.join(names)}.")
        for build in BUILDS:
            if (name, build) not in known or config.again:
                cell = _in_a_process(name, build, folder)
                append_cell(cell, results)
                _LOGGER.info(
                    "%s, %s: %s", name, build, f"{cell.stopped_at}: {cell.reason}" if cell.stopped_at else "ok"
                )
    yield from ()


def _in_a_process(name: str, build: str, folder: Path) -> Cell:
    context = multiprocessing.get_context("fork")
    theirs, ours = context.Pipe()
    process = context.Process(target=_work, args=(name, build, folder, theirs))
    process.start()
    theirs.close()
    try:
        cell: Cell = ours.recv() if ours.poll(_SECONDS) else _unfinished(name, build, "took too long")
    except EOFError:
        process.join()
        if process.exitcode is None or process.exitcode >= 0:
            raise RuntimeError(f"{name}, {build}: see the traceback above") from None
        cell = _unfinished(name, build, f"the process was ended by signal {-process.exitcode}")
    process.kill()
    process.join()
    return cell


def _unfinished(name: str, build: str, reason: str) -> Cell:
    return Cell(architecture=name, build=build, stopped_at="quantize", reason=reason)


def _work(name: str, build: str, folder: Path, answers: multiprocessing.connection.Connection) -> None:
    import torch

    from scripts.architectures.cell import Work, take_the_whole_way
    from scripts.architectures.configs import ARCHITECTURES
    from scripts.architectures.random_models import save_architecture
    from scripts.architectures.tokenizer import train_tokenizer

    torch.set_num_threads(1)
    (architecture,) = (one for one in ARCHITECTURES if one.name == name)
    text, tokenizer, source = folder / "text.txt", folder / "tokenizer", folder / "hf" / name
    if not text.exists():
        words = "\n\n\n".join(topics[topic] for topic in sorted(topics))[:100_000]
        train_tokenizer(words).save_pretrained(tokenizer)
        write_whole(text, words.encode())
    if not source.exists():
        with atomic_directory(source, overwrite=False, option="--output") as partial:
            save_architecture(architecture, partial, tokenizer)
    made = folder / "models"
    shutil.rmtree(made, ignore_errors=True)
    answers.send(
        take_the_whole_way(Work(architecture=architecture, build=build, source=source, text=text, folder=made))
    )
    shutil.rmtree(made, ignore_errors=True)


if __name__ == "__main__":
    # Forked processes find all of it imported.
    import transformers

    import stages.evaluation.run
    import stages.quantization.run
    import stages.runtime.blocks.chain  # noqa: F401

    transformers.logging.set_verbosity_error()
    run_command(ArchitecturesConfig, take_all, "python -m scripts.architectures")
