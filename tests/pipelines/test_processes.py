"""Sharing windows and groups among processes: what each does, and that the result is one process's, bit for bit.

Where accelerate's launcher itself matters, it starts them; elsewhere they are forked, without seconds of imports.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.support import forked
from tests.support.written import contents

LAUNCH = [
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no",
]  # fmt: skip
DIES = """
import os, sys
from stages.quantization.weights.store import QuantizedStore
write, written = QuantizedStore.write, []
def write_two(self, *arguments):
    if os.environ["RANK"] == "1" and len(written) == 2:
        os._exit(9)
    written.append(arguments)
    return write(self, *arguments)
QuantizedStore.write = write_two
from stages.commands.quantize_options import QuantizeConfig
from stages.commands.run import run_command
from stages.quantize import command
run_command(QuantizeConfig, command, "python -m stages.quantize")
"""
DIES_CALIBRATING = """
import os
from stages.runtime.tap import ActivationTap
run, times = ActivationTap.run, []
def run_two(self, *arguments):
    if os.environ["RANK"] == "1" and len(times) == 2:
        os._exit(9)
    times.append(1)
    return run(self, *arguments)
ActivationTap.run = run_two
from stages.calibrate import command
from stages.commands.calibrate_options import CalibrateConfig
from stages.commands.run import run_command
run_command(CalibrateConfig, command, "python -m stages.calibrate")
"""
DIES_WEIGHING = """
import os
from stages.calibration import capture
from stages.calibration.end_loss import back_pass
from stages.calibration.on_disk import unfinished
capture.SAVED_EVERY = back_pass.SAVED_EVERY = unfinished._COST = 0.0
back = back_pass.EndLossPass._batch_back
def last_dies(self, place, *arguments):
    if os.environ["RANK"] == "1" and place == 0:
        os._exit(9)
    return back(self, place, *arguments)
back_pass.EndLossPass._batch_back = last_dies
from stages.calibrate import command
from stages.commands.calibrate_options import CalibrateConfig
from stages.commands.run import run_command
run_command(CalibrateConfig, command, "python -m stages.calibrate")
"""
LATE = """
import io, os, re, sys
from collections import Counter
from pathlib import Path
shared, first, looks = sys.argv.pop(1), os.environ["RANK"] == "0", Counter()
of_others = re.compile("partial/[0-9]{4}[.]safetensors$|/[0-9]{4}[.].+[.]safetensors$" if first else "")
def late(look):
    def looked(path, *arguments, **options):
        name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
        if name.startswith(shared) and not name.endswith("partial") and of_others.search(name):
            looks[name] += 1
            if looks[name] < 6:
                raise FileNotFoundError(2, "No such file or directory", name)
        return look(path, *arguments, **options)
    return looked
os.stat, io.open = late(os.stat), late(io.open)
import runpy
runpy.run_module("stages.quantize", run_name="__main__", alter_sys=True)
"""
LOSES = """
import os
from stages.quantization.weights.store import QuantizedStore
from stages.system.shared_folder import wait_for
wait_for.__kwdefaults__["patience"] = 0.5
write = QuantizedStore.write
def write_and_lose(store, index, solved):
    write(store, index, solved)
    if os.environ["RANK"] == "1":
        store.group_file(index).unlink()
QuantizedStore.write = write_and_lose
import runpy
runpy.run_module("stages.quantize", run_name="__main__", alter_sys=True)
"""
LOST = "Another process of this launch has ended ("
EXCHANGES = """
import os
import torch
from stages.system.distributed import join_processes
processes = join_processes()
numbers = torch.zeros(2, dtype=torch.int64) if processes.is_first else torch.ones(1, dtype=torch.int64)
mine = {"often": numbers}
mine |= {"rare": torch.tensor([0.5], dtype=torch.float16)} if processes.is_first else {}
for found in processes.exchange(mine, {"often": 0, "rare": 1, "never": 1}).values():
    os.write(1, f"{processes.index} {[tensor.tolist() for tensor in found]}\\n".encode())
"""


def options(base: Path, cache: Path, output: Path) -> list[str]:
    return [
        "--onnx_path", str(base), "--cache_dir", str(cache), "--output_path", str(output), "--block_size", "16",
        "--algo", "awq_gptq", "--device", "cpu",
    ]  # fmt: skip


def launch(command: list[str]) -> subprocess.CompletedProcess[str]:
    # One thread each, as the launcher gives its processes: sums depend on how many threads share them.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": "0"}
    return subprocess.run([*LAUNCH, *command], capture_output=True, text=True, check=False, env=environment)


def weights_of(output: Path) -> dict[str, dict[str, tuple[str, bytes]]]:
    """Every tensor's type and bytes; the files' headers also hold seconds."""
    folder = output.with_name(f"{output.name}.weights")
    return {
        file.name: {name: (str(array.dtype), array.tobytes()) for name, array in load_file(file).items()}
        for file in sorted(folder.glob("*.safetensors"))
    }


def report_of(output: Path) -> list[dict[str, object]]:
    lines = (output.with_name(f"{output.name}.weights") / "report.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_cache: Path) -> Path:
    """What one process makes."""
    output = tmp_path_factory.mktemp("alone") / "int4"
    done = forked.run(["-m", "stages.quantize", *options(tiny_model, tiny_cache, output)])
    assert done.returncode == 0, done.stderr
    return output


def calibration(base: Path, text: Path, cache: Path, *more: str) -> list[str]:
    return [
        "-m", "stages.calibrate", "--onnx_path", str(base), "--dataset", str(text), "--calib_size", "12", "--seq_len",
        "32", "--batch_size", "2", "--cache_dir", str(cache), "--device", "cpu", "--calibration_eps", "cpu", *more,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        # 1 window held out and 11 to search with, two at a time: the last turn leaves a process without a batch.
        ("tiny_model_dml", ()),
        pytest.param("tiny_model", ("--max_memory", "300kB"), marks=pytest.mark.thorough),
    ],
    ids=["fp16", "in parts"],
)
def test_two_processes_calibrate_as_one_does(
    kind: str, more: tuple[str, ...], tiny_text: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(kind)
    arguments = partial(calibration, base, tiny_text)
    alone = forked.run(arguments(tmp_path / "one", *more))
    assert alone.returncode == 0, alone.stderr
    both = forked.run(arguments(tmp_path / "two", *more), processes=2)
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("calibration cache") == 1, "the first process alone prints"
    assert ("parts, one after the other" in both.stdout) == bool(more)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    again = forked.run(arguments(tmp_path / "two", *more), processes=2)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("already holds") == 1


@pytest.mark.slow
def test_one_of_two_processes_writes_the_calibration_text(tiny_model: Path, tmp_path: Path) -> None:
    done = forked.run(calibration(tiny_model, Path("self"), tmp_path / "cache"), processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("384 of 384 tokens in") == 1
    (text,) = tmp_path.glob("*.jsonl")
    written = [json.loads(line)["tokens"] for line in text.read_text(encoding="utf-8").splitlines()]
    used = load_file(tmp_path / "cache" / "tokens.safetensors")
    assert [*used["calibration"].tolist(), *used["held_out"].tolist()] == written


@pytest.mark.slow
def test_a_launch_that_starts_one_process_is_named() -> None:
    """accelerate starts several processes on a machine without GPUs only with --multi_gpu."""
    launcher = [part for part in LAUNCH[1:] if part != "--multi_gpu"]
    done = forked.run([*launcher, "-m", "stages.calibrate", "--onnx_path", "nowhere"])
    assert "accelerate started one process" in " ".join(done.stderr.split())
    assert "nowhere" in done.stderr


@pytest.mark.thorough
@pytest.mark.slow
def test_experts_that_get_other_tokens_in_each_batch_are_shared_too(tmp_path: Path) -> None:
    """Processes hand over tensors of different shapes and types, and some have none."""
    script = tmp_path / "exchanges.py"
    script.write_text(EXCHANGES)
    done = launch([str(script)])
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", "0 [[0, 0], [1]]", "1 [[0.5]]", "1 []"], done.stdout


@pytest.mark.slow
def test_a_process_that_dies_leaves_no_cache_and_the_next_run_makes_it(
    tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    script = tmp_path / "dies.py"
    script.write_text(DIES_CALIBRATING)
    arguments = calibration(tiny_model, tiny_text, tmp_path / "cache")[2:]
    dead = forked.run([str(script), *arguments], processes=2, machines=2)
    assert dead.returncode == 9, dead.stderr
    assert LOST in " ".join(dead.stderr.split())
    assert not (tmp_path / "cache").exists()
    done = forked.run(calibration(tiny_model, tiny_text, tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "dies.py"]


@pytest.mark.slow
def test_one_process_goes_on_where_two_were_stopped(tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    """One of them dies on the way back, in the last layer: the head and the layer behind it are done."""
    script = tmp_path / "dies.py"
    script.write_text(DIES_WEIGHING)
    arguments = partial(calibration, tiny_model, tiny_text)
    whole = forked.run(arguments(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    dead = forked.run([str(script), *arguments(tmp_path / "cache")[2:]], processes=2, machines=2)
    assert dead.returncode == 9, dead.stderr
    assert LOST in " ".join(dead.stderr.split())
    assert not (tmp_path / "cache").exists()
    done = forked.run(arguments(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert "after all windows; tokens are weighed in 2 of 3 layers" in " ".join(done.stderr.split())
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "dies.py", "whole"]


@pytest.mark.slow
def test_two_processes_make_what_one_makes(alone: Path, tiny_model: Path, tiny_cache: Path, tmp_path: Path) -> None:
    output = tmp_path / "int4"
    done = forked.run(["-m", "stages.quantize", *options(tiny_model, tiny_cache, output)], processes=2)
    assert done.returncode == 0, done.stderr
    assert weights_of(output) == weights_of(alone)
    assert report_of(output) == report_of(alone)
    for name in ("model.onnx", "model.onnx.data"):
        assert (output / name).read_bytes() == (alone / name).read_bytes()
    assert done.stdout.count("written to") == 1, "the first process alone exports and prints"
    assert "the first of 2" in done.stderr
    again = forked.run(["-m", "stages.quantize", *options(tiny_model, tiny_cache, output)], processes=2)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("is there already") == 1


@pytest.mark.slow
def test_groups_of_a_process_that_died_are_left_to_the_next_run(
    alone: Path, tiny_model: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    output, script = tmp_path / "int4", tmp_path / "dies.py"
    script.write_text(DIES)
    dead = forked.run([str(script), *options(tiny_model, tiny_cache, output)], processes=2, machines=2)
    assert dead.returncode == 9
    assert LOST in " ".join(dead.stderr.split()), "the process on the other machine says why it ends"
    assert dead.stderr.count("error: ") == 1
    assert not output.exists()
    assert 2 <= len(weights_of(output)) < len(weights_of(alone))
    done = forked.run(["-m", "stages.quantize", *options(tiny_model, tiny_cache, output)], processes=2)
    assert done.returncode == 0, done.stderr
    assert weights_of(output) == weights_of(alone)
    assert (output / "model.onnx.data").read_bytes() == (alone / "model.onnx.data").read_bytes()


@pytest.mark.slow
@pytest.mark.thorough
def test_files_that_other_machines_see_late_change_nothing(tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    """Each machine is told several times that a file isn't there which the other one wrote."""
    script = tmp_path / "late.py"
    script.write_text(LATE)

    def arguments(folder: Path) -> list[str]:
        calibrated = calibration(tiny_model, tiny_text, folder / "cache")[4:-4]  # no device twice
        return [*options(tiny_model, folder / "cache", folder / "int4"), *calibrated]

    alone = forked.run(["-m", "stages.quantize", *arguments(tmp_path / "alone")])
    assert alone.returncode == 0, alone.stderr
    shared = tmp_path / "shared"
    done = forked.run([str(script), str(shared), *arguments(shared)], processes=2, machines=2)
    assert done.returncode == 0, done.stderr
    assert contents(shared / "cache") == contents(tmp_path / "alone" / "cache")
    assert weights_of(shared / "int4") == weights_of(tmp_path / "alone" / "int4")
    assert report_of(shared / "int4") == report_of(tmp_path / "alone" / "int4")


@pytest.mark.slow
def test_files_that_a_shared_folder_loses_are_one_sentence(tiny_model: Path, tiny_cache: Path, tmp_path: Path) -> None:
    script = tmp_path / "loses.py"
    script.write_text(LOSES)
    done = forked.run([str(script), *options(tiny_model, tiny_cache, tmp_path / "int4")], processes=2, machines=2)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "was written by another process of this run and isn't to be seen" in " ".join(done.stderr.split())
    assert not (tmp_path / "int4").exists()


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a disk of so many kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("small_disk", [40, 200, 400, 600, 780], indirect=True)
def test_a_shared_folder_that_is_full_is_one_sentence(small_disk: Path, tiny_model: Path, tiny_text: Path) -> None:
    calibrated = calibration(tiny_model, tiny_text, small_disk / "cache")[4:-4]  # no device twice
    arguments = [*options(tiny_model, small_disk / "cache", small_disk / "int4"), *calibrated]
    done = forked.run(["-m", "stages.quantize", *arguments], processes=2, machines=2)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert any("can't be written" in line for line in errors)
    assert all("can't be written" in line or LOST in line for line in errors)
    assert not (small_disk / "int4").exists()
    assert list(small_disk.rglob("*partial*")) == []


@pytest.mark.slow
def test_bad_input_is_said_once(tiny_model: Path, tiny_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "int4").mkdir()
    (tmp_path / "int4" / "mine.txt").write_text("")
    command = ["-m", "stages.quantize", *options(tiny_model, tiny_cache, tmp_path / "int4")]
    done = forked.run(command, processes=2)
    assert done.returncode != 0
    assert done.stderr.count("already exists") == 1
