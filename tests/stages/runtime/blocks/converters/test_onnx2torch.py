"""onnx2torch is imported whatever torchvision is like; where it is missing, the message says how to install it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stages.errors import UserError
from stages.runtime.blocks.converters.onnx2torch import import_onnx2torch

_ERRORS = ("RuntimeError('operator torchvision::nms does not exist')", "ImportError('none')")
_SCRIPT = """
import importlib.util, sys
from stages.runtime.blocks.converters.onnx2torch import import_onnx2torch
for folder in sys.argv[1:]:
    for name in [name for name in sys.modules if name.startswith("onnx2torch")]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    found = import_onnx2torch.__wrapped__()
    print(found.convert.__name__, sorted(name for name in sys.modules if name.startswith("torchvision")))
    print(importlib.util.find_spec("torchvision").origin)
"""


@pytest.mark.slow
def test_a_torchvision_that_cannot_be_imported_is_ignored(tmp_path: Path) -> None:
    """Afterwards nothing is left that others would take for it."""
    files = [tmp_path / str(place) / "torchvision" / "__init__.py" for place in range(len(_ERRORS))]
    for file, error in zip(files, _ERRORS, strict=True):
        file.parent.mkdir(parents=True)
        file.write_text(f"raise {error}\n", encoding="utf-8")
    command = [sys.executable, "-c", _SCRIPT, *(str(file.parents[1]) for file in files)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path.cwd())
    assert run.stdout.splitlines() == [line for file in files for line in ("convert []", str(file))], run.stderr


def test_a_missing_onnx2torch_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx2torch", None)
    with pytest.raises(UserError, match=r"pip install --no-deps onnx2torch==\d"):
        import_onnx2torch.__wrapped__()
