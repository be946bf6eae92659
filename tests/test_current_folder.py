"""Nothing in the current folder stands in for a package of ours, of Python's, or of a library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages.system.measured_process import run_measured

ROOT = Path(__file__).parent.parent
NAMES = ("stages", "export", "genai_quant", "torch", "json", "pathlib", "onnx", "yaml", "tyro", "pip")


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go to a folder whose files are called as packages are; importing one ends the program."""
    folder = tmp_path / "work"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"raise SystemExit('imported {name}.py')", encoding="utf-8")
    monkeypatch.chdir(folder)
    # As installed: not found through the current folder.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return folder


@pytest.mark.parametrize("module", ["stages.quantize", "stages.inspect", "export", "genai_quant"])
def test_python_m_does_not_look_in_the_current_folder(module: str, hostile: Path) -> None:
    # Of two packages of one name Python takes that one, before anything of ours is run.
    (hostile / f"{module.partition('.')[0]}.py").unlink()
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def test_children_do_not_look_in_the_current_folder(hostile: Path, tmp_path: Path) -> None:
    command = (sys.executable, "-m", "stages.evaluation.speed_round", "model", "missing.json", "answer")
    with pytest.raises(Exception, match=r"missing\.json"):
        run_measured(command, tmp_path / "log")


def test_children_find_a_clone_that_is_not_installed(tmp_path: Path) -> None:
    """The current folder is the clone; -S leaves out installed packages, ours among them."""
    for name in ("errors.py", "__init__.py", "system"):
        source, target = ROOT / "stages" / name, tmp_path / "clone" / "stages" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    start = (
        "import sys; from pathlib import Path; from stages.system.measured_process import run_measured; "
        "run_measured((sys.executable, '-S', '-c', 'import stages; print(stages.__file__)'), Path('log'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = f"import sys; sys.path[0] = {str(tmp_path / 'clone')!r}; {start}"
    subprocess.run([sys.executable, "-S", "-c", program], cwd=tmp_path / "clone", env=environment, check=True)
    assert (tmp_path / "clone" / "log").read_text().strip() == str(tmp_path / "clone" / "stages" / "__init__.py")


def test_a_script_beside_a_file_of_our_name_is_told_so(hostile: Path) -> None:
    (hostile / "script.py").write_text("import genai_quant\ngenai_quant.quantize\n", encoding="utf-8")
    for name in set(NAMES) - {"stages"}:
        (hostile / f"{name}.py").unlink()
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: {hostile / 'stages.py'} hides the package stages of genai-quant; rename that file."
    )
