"""No file that we read can run code: no pickle anywhere, and a model's own Python only where it is asked for."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bad_input.edits import gone, written
from tests.bad_input.row import USUAL
from tests.support.commands import Commands
from tests.support.syntax import nodes_of

_ROOT = Path(__file__).parents[2]
_FILES = sorted([*_ROOT.glob("stages/**/*.py"), *_ROOT.glob("export/**/*.py"), *_ROOT.glob("scripts/**/*.py")])
_PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
_LOADERS = {"torch.load", "np.load", "numpy.load", "torch.jit.load", "eval", "exec"}


def _unsafe(text: str) -> Iterator[str]:
    """Yield imports that unpickle, and calls that load or run what they are given without saying that it is data."""
    for node in nodes_of(text):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (name for name in names if name.split(".")[0] in _PICKLES)
    for call in nodes_of(text):
        if not isinstance(call, ast.Call) or (name := ast.unparse(call.func)) not in _LOADERS:
            continue
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        if given.get("allow_pickle") != "False" and given.get("weights_only") != "True":
            yield name


def test_nothing_unpickles_or_runs_text() -> None:
    offenders = {str(path): found for path in _FILES if (found := [*_unsafe(path.read_text("utf-8"))])}
    assert _FILES
    assert not offenders


@pytest.mark.parametrize(
    ("line", "unsafe"),
    [
        ("import pickle", True),
        ("from joblib.numpy_pickle import load", True),
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(path, weights_only=True)", False),
        ("np.load(path, allow_pickle=False)", False),
        ("exec(text)", True),
        ("json.load(file)", False),
    ],
)
def test_what_is_unsafe(line: str, unsafe: bool) -> None:
    assert bool([*_unsafe(line)]) == unsafe


def test_foreign_code_is_trusted_only_by_option() -> None:
    """Check that a library which is told to trust is told what the option says, or no."""
    for path in _FILES:
        for call in nodes_of(path.read_text(encoding="utf-8")):
            for word in call.keywords if isinstance(call, ast.Call) else ():
                if word.arg == "trust_remote_code":
                    assert ast.unparse(word.value).endswith(("trust_remote_code", "False")), path


@pytest.mark.parametrize(("option", "runs"), [((), False), (("--trust_remote_code",), True)])
def test_a_tokenizers_own_code_runs_only_when_asked(
    option: tuple[str, ...], runs: bool, work_folder: Path, commands: Commands
) -> None:
    gone("base/tokenizer.json")(work_folder)
    config = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    written("base/tokenizer_config.json", json.dumps(config))(work_folder)
    written("base/own.py", f'open({str(work_folder / "ran")!r}, "w").close()\nclass Own: pass\n')(work_folder)
    code, printed = commands.calibrate(*USUAL["calibrate"], *option)
    assert code == 2
    assert "Traceback" not in printed
    assert (work_folder / "ran").exists() == runs
