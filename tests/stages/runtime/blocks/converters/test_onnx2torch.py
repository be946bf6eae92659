"""onnx2torch is imported whatever torchvision is like; where it is missing, the message says how to install it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stages.errors import UserError
from stages.runtime.blocks.converters.onnx2torch import import_onnx2torch

_SCRIPT = """
import importlib.util, sys
from stages.runtime.blocks.converters.onnx2torch import import_onnx2torch
print(import_onnx2torch().convert.__name__, sorted(name for name in sys.modules if name.startswith("torchvision")))
print(importlib.util.find_spec("torchvision") is not None)
"""


@pytest.mark.slow
@pytest.mark.parametrize("error", ["RuntimeError('operator torchvision::nms does not exist')", "ImportError('none')"])
def test_a_torchvision_that_cannot_be_imported_is_ignored(error: str, tmp_path: Path) -> None:
    """Afterwards nothing is left that others would take for it."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(f"raise {error}\n", encoding="utf-8")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {_SCRIPT}"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path.cwd())
    assert run.stdout.split("\n")[:2] == ["convert []", "True"], run.stderr


def test_a_missing_onnx2torch_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx2torch", None)
    with pytest.raises(UserError, match=r"pip install --no-deps onnx2torch==\d"):
        import_onnx2torch.__wrapped__()
