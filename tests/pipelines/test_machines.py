"""accelerate launch on two machines of two processes each, which are two launchers with ports of their own here.

Whatever dies in the middle, the others say so, and one process afterwards finishes with the bytes it makes alone.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.pipelines.test_processes import LOST, calibration, contents, options, report_of, weights_of
from tests.support import forked

MACHINE = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_machines: 2
num_processes: 4
machine_rank: {rank}
main_process_ip: 127.0.0.1
main_process_port: {port}
"""
STOPS = """
import os, signal, sys, time
from pathlib import Path
folder, module = Path(sys.argv.pop(1)), sys.argv.pop(1)
from stages.quantization.weights.store import QuantizedStore
from stages.runtime.tap import ActivationTap
owner, name = (ActivationTap, "run") if module == "stages.calibrate" else (QuantizedStore, "write")
original, rank, steps = getattr(owner, name), os.environ["RANK"], []
def second_stops(*arguments):
    steps.append(1)
    if len(steps) == 2 and rank in os.environ["DIE"].split():
        os.kill(os.getpid(), signal.SIGKILL)
    if len(steps) == 2 and rank in os.environ["STALL"].split():
        (folder / f"stalled-{rank}").touch()
        time.sleep(600)
    return original(*arguments)
setattr(owner, name, second_stops)
import runpy
sys.argv[0] = module
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
pytestmark = [pytest.mark.slow, pytest.mark.thorough, pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """Two launchers."""

    folder: Path
    launchers: tuple[subprocess.Popen[bytes], ...]

    def kill(self, machine: int) -> None:
        """Kill a machine's launcher and processes, all at once."""
        with suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self.launchers[machine].pid)
            for process in (launcher, *launcher.children(recursive=True)):
                process.kill()

    def wait(self) -> list[int]:
        return [launcher.wait(300) for launcher in self.launchers]

    def said(self, machine: int) -> str:
        return " ".join((self.folder / f"{machine}.log").read_text(encoding="utf-8").split())


def start(folder: Path, command: Sequence[str], *, die: str = "", stall: str = "") -> Machines:
    """Start ``command`` on both machines; processes ``die`` and ``stall`` do so at their second step."""
    folder.mkdir()
    script = folder / "stops.py"
    script.write_text(STOPS)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DIE": die, "STALL": stall}
    launchers = []
    for rank in range(2):
        config = folder / f"machine{rank}.yaml"
        config.write_text(MACHINE.format(rank=rank, port=port))
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), str(script)]
        with (folder / f"{rank}.log").open("wb") as log:
            launchers.append(
                subprocess.Popen([*launch, str(folder), *command], stdout=log, stderr=log, env=environment)
            )
    return Machines(folder=folder, launchers=tuple(launchers))


def stop(machines: Machines, what: str) -> list[int]:
    """Let it come to its end: a machine is killed once one of its processes stalls; a process dies by itself."""
    if what.startswith("machine"):
        machine = int(what[-1])
        ends = time.monotonic() + 300
        while not list(machines.folder.glob("stalled-*")) and time.monotonic() < ends:
            time.sleep(0.1)
        machines.kill(machine)
    try:
        return machines.wait()
    finally:
        for machine in (0, 1):
            machines.kill(machine)


STOPPED = pytest.mark.parametrize(
    ("what", "how", "survivor"),
    [
        ("process 3", {"die": "3"}, 0),
        ("process 0", {"die": "0"}, 1),
        ("machine 1", {"stall": "2 3"}, 0),
        ("machine 0", {"stall": "0 1"}, 1),
    ],
    ids=["process 3", "process 0", "machine 1", "machine 0"],
)


@pytest.fixture(scope="module")
def alone(tiny_model: Path, tiny_cache: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration and an output that one process made."""
    folder = tmp_path_factory.mktemp("alone")
    text = calibration(tiny_model, tiny_text, folder / "cache")
    for command in (text, ["-m", "stages.quantize", *options(tiny_model, tiny_cache, folder / "int4")]):
        done = forked.run(command)
        assert done.returncode == 0, done.stderr
    return folder


@STOPPED
def test_calibration(
    what: str, how: dict[str, str], survivor: int, alone: Path, tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    command = calibration(tiny_model, tiny_text, tmp_path / "shared" / "cache", "--batch_size", "1")
    machines = start(tmp_path / "machines", command[1:], **how)
    codes = stop(machines, what)
    assert 0 not in codes
    assert LOST in machines.said(survivor)
    assert not (tmp_path / "shared" / "cache").exists()
    done = forked.run(calibration(tiny_model, tiny_text, tmp_path / "shared" / "cache"))
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "shared" / "cache") == contents(alone / "cache")
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["cache"]


@STOPPED
def test_search(
    what: str, how: dict[str, str], survivor: int, alone: Path, tiny_model: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    output = tmp_path / "shared" / "int4"
    command = ["stages.quantize", *options(tiny_model, tiny_cache, output)]
    machines = start(tmp_path / "machines", command, **how)
    codes = stop(machines, what)
    assert 0 not in codes
    assert LOST in machines.said(survivor)
    assert not output.exists()
    found = weights_of(output)
    assert 5 <= len(found) < len(weights_of(alone / "int4")), "all finished what they had begun"
    again = start(tmp_path / "again", command)
    assert again.wait() == [0, 0], again.said(0)
    assert "groups are there already" in again.said(0)
    assert weights_of(output) == weights_of(alone / "int4")
    assert report_of(output) == report_of(alone / "int4")
    for name in ("model.onnx", "model.onnx.data"):
        assert (output / name).read_bytes() == (alone / "int4" / name).read_bytes()
