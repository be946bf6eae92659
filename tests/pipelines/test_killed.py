"""kill -9 at random moments: the same command then finishes, with the same bytes, and nothing temporary is left.

One moment for each command by default; KILLS=20 tries as many of each.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.support import forked

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")

KILLS = int(os.environ.get("KILLS", "1"))
_OUTPUTS = {"quantize": "int4", "export": "again"}
_POLL = 0.002
_NOT_OURS = frozenset({"log.txt", ".ses", "seconds.json"})
"""The second is ONNX Runtime's own, in the folder for temporary files."""
_STAGES = ("calibrate", "quantize", "export")


@dataclass(frozen=True)
class Workshop:
    """One folder that commands work in; everything else that they may write to is in it too."""

    folder: Path
    base: Path
    text: Path

    @property
    def temporary(self) -> Path:
        return self.folder / "tmp"

    def calibrate(self) -> list[str]:
        return [
            "stages.calibrate", "--onnx_path", str(self.base), "--dataset", str(self.text), "--calib_size", "24",
            "--seq_len", "32", "--batch_size", "1", "--calibration_eps", "cpu", "--device", "cpu",
            "--cache_dir", str(self.folder / "cache"), "--max_memory", "300kB",
        ]  # fmt: skip

    def quantize(self) -> list[str]:
        return [
            "stages.quantize", "--onnx_path", str(self.base), "--cache_dir", str(self.folder / "cache"), "--algo",
            "awq_gptq", "--block_size", "16", "--device", "cpu", "--output_path", str(self.folder / "int4"),
        ]  # fmt: skip

    def export(self) -> list[str]:
        return [
            "export", "--onnx_path", str(self.base), "--weights_path", str(self.folder / "int4.weights"),
            "--output_path", str(self.folder / "again"),
        ]  # fmt: skip

    def start(self, module: Sequence[str]) -> BaseProcess:
        self.temporary.mkdir(exist_ok=True)
        log, environment = self.folder / "log.txt", {"TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"}
        log.unlink(missing_ok=True)
        return forked.start(["-m", *module], log, log, environment)

    def has_output(self, name: str) -> bool:
        return name in _OUTPUTS and (self.folder / _OUTPUTS[name]).exists()

    def finish(self, module: Sequence[str]) -> None:
        process = self.start(module)
        process.join()
        assert process.exitcode == 0, (self.folder / "log.txt").read_text()

    def kill_at(self, module: Sequence[str], moment: float) -> bool:
        """Kill it ``moment`` seconds after it first wrote something; whether it was still running then."""
        before = self.state()
        process = self.start(module)
        while process.is_alive() and self.state() == before:
            time.sleep(_POLL)
        time.sleep(moment)
        running = process.is_alive()
        if running:
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return running

    def state(self) -> list[tuple[str, int]]:
        found = []
        for path in sorted(self.folder.rglob("*")):
            with contextlib.suppress(FileNotFoundError):  # renamed between listing and asking
                if path.name not in _NOT_OURS:
                    found.append((str(path), path.stat().st_size))
        return found

    def contents(self) -> dict[str, object]:
        """Every file by its path; of quantized weights the tensors, of reports all but seconds."""
        # A lock file that a killed run left holds nothing, and goes with the next run.
        files = [path for path in sorted(self.folder.rglob("*")) if path.is_file() and path.name not in _NOT_OURS]
        files = [path for path in files if path.suffix != ".lock"]
        return {str(path.relative_to(self.folder)): self._content(path) for path in files}

    def _content(self, path: Path) -> object:
        if path.suffix not in (".md", ".json"):
            return _content(path)
        # Of the command; what was killed behind its output is made again with --overwrite.
        text = path.read_text().replace(str(self.folder), "FOLDER").replace(" --overwrite", "")
        text = text.replace('"overwrite": true', '"overwrite": false')
        return text if path.suffix == ".md" else _without_times(json.loads(text))


def _content(path: Path) -> object:
    if path.parent.suffix == ".weights" and path.suffix == ".safetensors":
        return {name: array.tobytes() for name, array in load_file(path).items()}
    if path.name == "report.jsonl":
        lines = (json.loads(line) for line in path.read_text().splitlines())
        return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    if path.name == "report.html":
        return "made of report.json alone, seconds among it"
    return path.read_bytes()


def _without_times(value: object) -> object:
    if isinstance(value, dict):
        # The output's README names the folder, which is longer in one place than in another.
        times = {"seconds", "folder_bytes", *(["made"] if isinstance(value.get("made"), str) else [])}
        return {key: _without_times(each) for key, each in value.items() if key not in times}
    return [_without_times(each) for each in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Workshop]:
    """What the folder holds behind each command when nothing stops it; under "" before all."""
    states = {"": Workshop(tmp_path_factory.mktemp("nothing"), tiny_model, tiny_text)}
    for before, name in pairwise(("", *_STAGES)):
        shop = Workshop(tmp_path_factory.mktemp(name), tiny_model, tiny_text)
        shutil.copytree(states[before].folder, shop.folder, dirs_exist_ok=True)
        shop.finish(getattr(shop, name)())
        states[name] = shop
    return states


@pytest.mark.slow
@pytest.mark.parametrize(("before", "name"), list(pairwise(("", *_STAGES))))
def test_a_killed_command_is_finished_by_the_next_run(
    before: str, name: str, undisturbed: dict[str, Workshop], tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    moments = random.Random(f"{name} {KILLS}")
    expected = undisturbed[name].contents()
    killed, longest = 0, 1.5
    while killed < KILLS:
        shop = Workshop(tmp_path / "work", tiny_model, tiny_text)
        shutil.copytree(undisturbed[before].folder, shop.folder)
        command = getattr(shop, name)()
        if shop.kill_at(command, moments.uniform(0, longest)):
            killed += 1
        else:
            longest *= 0.7  # it was done already
        if not shop.has_output(name):  # with its last name it is whole, and never written to again
            shop.finish(command)
        elif name == "quantize" and not (shop.folder / "int4.weights" / "report" / "report.html").exists():
            shop.finish([*command, "--overwrite"])  # the report comes after the model
        assert shop.contents() == expected
        shutil.rmtree(shop.folder)
