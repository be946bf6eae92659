"""Calls with arguments of other types, dtypes or sizes than they say fail, as every test relies on."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch
from beartype.roar import BeartypeCallHintViolation

from stages.quantization.search.affine import BlockParameters, join, round_to_storage

BLOCKS = torch.zeros(2, 3)


def test_legal_calls_pass() -> None:
    parameters = BlockParameters(scales=round_to_storage(BLOCKS, "float16"), zero_points=BLOCKS)
    assert parameters.scales.shape == (2, 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda: round_to_storage(BLOCKS, "float8"),
        lambda: round_to_storage(BLOCKS.int(), "float16"),
        lambda: join(torch.zeros(3), 3),
        lambda: BlockParameters(scales=BLOCKS, zero_points=torch.zeros(2, 4)),
    ],
    ids=["a type", "a dtype", "a number of axes", "sizes that disagree"],
)
def test_others_fail(call) -> None:
    with pytest.raises(BeartypeCallHintViolation):
        call()


def test_modules_with_checks_leave_no_compiled_code_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "checked_here"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("def double(number: int) -> int:\n    return 2 * number\nprint(double(2))\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    with jaxtyping.install_import_hook("checked_here", "beartype.beartype"):
        runpy.run_module("checked_here", run_name="__main__")
    command = [sys.executable, "-m", "checked_here"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr
