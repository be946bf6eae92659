"""Run command lines in processes forked from one that has imported torch, ONNX Runtime and the stages already.

A new interpreter imports for seconds before it runs a tiny model for one. multiprocessing's fork server, itself a new
interpreter, imports once; what a command prints, its exit code and a kill -9 are those of a process of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

_PRELOADED = [
    "accelerate",
    "torch.distributed.distributed_c10d",
    "transformers.models.auto.tokenization_auto",
    "export.run",
    "export.card.write",
    "stages.calibration.run",
    "stages.evaluate",
    "stages.quantization.plan.plan",
    "stages.quantization.preview.preview",
    "stages.quantization.run",
    "stages.report.result",
    "tests.support.forked",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What a person sees of processes that have ended."""

    returncode: int
    """That of the first which failed."""
    stdout: str
    stderr: str


def start(command: Sequence[str], stdout: Path, stderr: Path, environment: Mapping[str, str]) -> BaseProcess:
    """Start ``command`` as the leader of a process group of its own.

    Args:
        command: -m MODULE OPTIONS, or SCRIPT OPTIONS.
        stdout, stderr: files that it prints to, perhaps one for both; a terminal's is one, too.
        environment: variables beside those of this process.
    """
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    context.set_forkserver_preload(_PRELOADED)
    process = context.Process(target=_become, args=(command, stdout, stderr, os.environ | environment))
    process.start()
    return process


def run(command: Sequence[str], processes: int = 1, machines: int = 1) -> Ended:
    """Run ``command``, as ``start`` takes it, in one process, or in several as a launcher does.

    When one of several fails the others of its machine are ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(Path(folder, f"stdout-{rank}"), Path(folder, f"stderr-{rank}")) for rank in range(processes)]
        launched = zip(outputs, _launch(processes, machines), strict=True)
        failure = _await([start(command, *files, variables) for files, variables in launched], machines)
        stdout, stderr = ("".join(map(_read, files)) for files in zip(*outputs, strict=True))
    return Ended(returncode=failure, stdout=stdout, stderr=stderr)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _await(processes: Sequence[BaseProcess], machines: int) -> int:
    """Wait for all; return the exit code of the first that failed, or 0."""
    failure, here = 0, len(processes) // machines
    running = {process.sentinel: (process, rank // here) for rank, process in enumerate(processes)}
    while running:
        for sentinel in wait(list(running)):
            ended, machine = running.pop(sentinel)
            ended.join()
            failure = failure or ended.exitcode or 0
            for other, place in running.values() if ended.exitcode else ():
                if place == machine:
                    other.terminate()
    return failure


def _launch(processes: int, machines: int) -> list[dict[str, str]]:
    """Return the variables by which each process finds the others; one alone gets none."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    here = processes // machines
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": here, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = range(processes) if processes > 1 else ()
    each = [shared | {"RANK": rank, "LOCAL_RANK": rank % here} for rank in ranks] or [dict[str, object]()]
    return [{"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in one.items()} for one in each]


def _become(command: Sequence[str], stdout: Path, stderr: Path, environment: dict[str, str]) -> None:
    """Be ``command`` from here on."""
    import torch

    if sys.platform != "win32":
        os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    for path, descriptor in ((stdout, 1), (stderr, 2)):
        # A terminal among them shall not end with the process, whose last words may not have been read yet.
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOCTTY", 0), 0o666)
        os.dup2(file, descriptor)
        os.close(file)
    if command[0] == "-m":
        sys.argv = list(command[1:])
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        runpy.run_path(command[0], run_name="__main__")
