"""``genai-quant``: the commands under one name, its version, whole runs, completion, and the wheel that contains it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import tyro

import genai_quant
from genai_quant.base_models.options import BaseModelConfig
from genai_quant.command import main
from stages.commands.calibrate_options import CalibrateConfig
from stages.commands.evaluate_options import ChatConfig, EvaluateConfig, InspectConfig, ReportConfig, SweepConfig
from stages.commands.options import RunConfig
from stages.commands.quantize_options import ExportConfig, QuantizeConfig

ROOT = Path(__file__).parent.parent.parent
COMMANDS = {
    "base-model": BaseModelConfig,
    "calibrate": CalibrateConfig,
    "quantize": QuantizeConfig,
    "export": ExportConfig,
    "run": RunConfig,
    "chat": ChatConfig,
    "evaluate": EvaluateConfig,
    "sweep": SweepConfig,
    "inspect": InspectConfig,
    "report": ReportConfig,
}


class Program:
    """The console command, run inside the test process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: object) -> tuple[int, str]:
        """Return (exit code, what was printed)."""
        self._monkeypatch.setattr(sys, "argv", ["genai-quant", *map(str, arguments)])
        self._monkeypatch.setenv("COLUMNS", "400")
        self._capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = self._capsys.readouterr()
        return code, printed.out + printed.err


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Program:
    return Program(capsys, monkeypatch)


def _options(help_text: str) -> set[str]:
    listed = "\n".join(re.findall(r"^  \S.*", help_text, re.MULTILINE))
    return set(re.findall(r"(?<!\S)--[a-z]\w*", listed))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_the_options_of_its_module(
    command: str, program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed = program(command, "--help_all")
    assert code == 0
    with pytest.raises(SystemExit):
        tyro.cli(COMMANDS[command], prog="x", use_underscores=True, args=["--help"])
    parsed = {option for option in _options(capsys.readouterr().out) if not option.startswith("--no_")}
    assert parsed - {"--help"} == {option for option in _options(printed) if not option.startswith("--no_")}


def test_the_program_alone_names_its_commands_and_options(program: Program) -> None:
    code, printed = program("--help")
    assert code == 0
    assert all(f"\n  {command} " in printed for command in COMMANDS)
    assert "--version" in printed
    assert program() == program("-h") == (code, printed)


def test_an_unknown_command_names_the_nearest(program: Program) -> None:
    assert program("quantise") == (2, "error: genai-quant has no command quantise; did you mean quantize?\n")


def test_help_is_about_what_was_typed() -> None:
    start = [sys.executable, "-m", "genai_quant", "run", "-h"]
    done = subprocess.run(start, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m genai_quant run CONFIG [options]\n")


@pytest.mark.parametrize("start", [["genai-quant"], ["python", "-m", "genai_quant"]])
def test_the_version_is_printed(start: list[str]) -> None:
    program = [sys.executable, *start[1:]] if len(start) > 1 else [str(Path(sys.executable).with_name(start[0]))]
    if not Path(program[0]).exists():
        pytest.skip("the console command isn't installed")
    done = subprocess.run([*program, "--version"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"genai-quant {version('genai-quant')}\n"
    assert genai_quant.__version__ == version("genai-quant")


def test_an_unknown_option_names_the_nearest(program: Program) -> None:
    code, printed = program("quantize", "--blok_size", 32)
    assert code == 2
    assert printed == "error: genai-quant quantize has no option --blok_size; did you mean --block_size?\n"


ENTRIES = (
    "genai_quant",
    "export",
    *(f"stages.{name}" for name in ("calibrate", "quantize", "chat", "evaluate", "sweep", "inspect", "report")),
)


HELPS = """
import runpy, sys
for module, argument, code in eval(sys.argv[1]):
    sys.argv = ["program", argument]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        assert stop.code == code, f"{module} {argument}: {stop.code}"
    else:
        raise AssertionError(f"{module} {argument} goes on")
    heavy = {"torch", "transformers", "onnxruntime", "datasets"} & set(sys.modules)
    assert not heavy, f"{module} {argument} imports {heavy}"
"""


def test_help_and_errors_in_options_do_not_wait_for_heavy_packages() -> None:
    """In one process: the first that imports a heavy package is named."""
    given = [(module, *wanted) for module in ENTRIES for wanted in (("--help", 0), ("--no_such_option", 2))]
    command = [sys.executable, "-W", "ignore", "-c", HELPS, repr(given)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_bad_input_is_one_sentence(program: Program, tmp_path: Path) -> None:
    code, printed = program("inspect", tmp_path / "nothing")
    assert code == 2
    assert printed.startswith("error: ")
    assert "does not exist" in printed


def _completed(script: Path, *words: str) -> set[str]:
    """Return what bash offers after ``words``."""
    line = " ".join(f'"{word}"' for word in words)
    source = f"source '{script}'; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _tyro_genai_quant"
    done = subprocess.run(
        ["bash", "-c", f'{source}; printf "%s\\n" "${{COMPREPLY[@]}}"'], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_and_values(program: Program, tmp_path: Path) -> None:
    script = tmp_path / "genai-quant.bash"
    code, printed = program("--tyro-write-completion", "bash", script)
    assert code == 0, printed
    assert _completed(script, "genai-quant", "") >= set(COMMANDS)
    assert _completed(script, "genai-quant", "qu") == {"quantize"}
    for command in ("calibrate", "quantize", "export", "run", "evaluate", "sweep", "report"):
        wanted = _options(program(command, "--help_all")[1]) - {"--help_all"}
        offered = _completed(script, "genai-quant", command, "--")
        assert {name.replace("-", "_") for name in wanted} <= {name.replace("-", "_") for name in offered}, command
    assert _completed(script, "genai-quant", "quantize", "--algo", "awq_") == {
        "awq_clip",
        "awq_full",
        "awq_gptq",
        "awq_lite",
    }


@pytest.mark.parametrize(("shell", "mark"), [("zsh", "#compdef genai-quant"), ("fish", "--command 'genai-quant'")])
def test_other_shells_get_a_script(shell: str, mark: str, program: Program, tmp_path: Path) -> None:
    script = tmp_path / "completion"
    code, printed = program("--tyro-write-completion", shell, script)
    assert code == 0, printed
    text = script.read_text(encoding="utf-8")
    assert mark in text
    assert all(command in text for command in COMMANDS)
    # One candidate a line: a line break in a description would make a candidate of its rest.
    assert "--execution_provider" in text
    assert not re.search(r"description': (['\"]).*?\\n.*?\1, 'type'", text)
    if shutil.which(shell):
        subprocess.run([shell, "-n", str(script)], check=True)


def _run_file(folder: Path, model: Path, text: Path, *more: str) -> Path:
    file = folder / "run.yaml"
    lines = [
        "calibrate:",
        f"  onnx_path: {model}",
        f"  dataset: {text}",
        "  calib_size: 4",
        "  seq_len: 32",
        f"  cache_dir: {folder / 'cache'}",
        "quantize:",
        f"  output_path: {folder / 'int4'}",
        "  block_size: 16",
        *more,
    ]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


@pytest.mark.slow
def test_a_whole_run(program: Program, tiny_model: Path, tiny_text: Path, unseen_text: Path, tmp_path: Path) -> None:
    file = _run_file(
        tmp_path, tiny_model, tiny_text, "  algo: awq_lite",
        "export:", f"  output_path: {tmp_path / 'nbits'}", "  weight_operator: matmul_nbits",
        "evaluate:", f"  text: {unseen_text}", "  windows: 2", "  seq_len: 32",
    )  # fmt: skip
    code, printed = program("run", file, "--dry_run")
    assert code == 0, printed
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml"}
    code, printed = program("run", file)
    assert code == 0, printed
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml", "cache", "int4", "int4.weights", "nbits"}
    for heading in ("calibration cache", "MatMulNBits", "KL", f"genai-quant chat {tmp_path / 'int4'}"):
        assert heading in printed
    assert "awq_lite INT4 block 16" not in printed, "a detail"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.onnx*")}
    shutil.rmtree(tmp_path / "nbits")
    code, printed = program("run", file)
    assert code == 0, printed
    assert f"{tmp_path / 'int4'} is there already, made with exactly these options." in printed
    assert "search: " not in printed
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.onnx*")}
    assert {path for path in before if after[path] == before[path]} == {
        path for path in before if path.parent.name == "int4"
    }
    file.write_text(file.read_text(encoding="utf-8").replace("block_size: 16", "block_size: 32"), encoding="utf-8")
    code, printed = program("run", file)
    assert code == 2
    assert f"--output_path {tmp_path / 'int4'} already exists" in printed


def test_rounding_leaves_stage_one_out(program: Program, tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    code, printed = program("run", _run_file(tmp_path, tiny_model, tiny_text, "  algo: rtn_dq"))
    assert code == 0, printed
    assert "rtn_dq rounds without calibration data: stage one is left out." in printed
    assert not (tmp_path / "cache").exists()


def test_a_wrong_key_is_one_sentence(program: Program, tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    code, printed = program("run", _run_file(tmp_path, tiny_model, tiny_text, "  algoo: rtn_dq"))
    assert code == 2
    assert printed.splitlines() == [f"error: {tmp_path / 'run.yaml'}: quantize has no option algoo; did you mean algo?"]


@pytest.mark.slow
def test_a_wheel_brings_the_command(tmp_path: Path) -> None:
    """Built from a copy, so that nothing is left beside the sources, and run from the installed files alone."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("genai_quant", "stages", "export"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools.build_meta import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    wanted = [path for room in ("genai_quant", "stages", "export") for path in (source / room).rglob("*")]
    missing = {path.relative_to(source).as_posix() for path in wanted if path.is_file()} - names
    assert not missing
    assert any(name.endswith("licenses/LICENSE") for name in names)
    (points,) = (tmp_path / "installed").glob("*.dist-info/entry_points.txt")
    assert "genai-quant = genai_quant.command:main" in points.read_text(encoding="utf-8")
    start = "import sys, stages; from genai_quant.command import main; print(stages.__path__); main()"
    done = subprocess.run(
        [sys.executable, "-c", start, "inspect", str(tmp_path / "nothing")],
        cwd=tmp_path / "installed", env={"PYTHONPATH": str(tmp_path / "installed"), "PATH": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert str(tmp_path / "installed" / "stages") in done.stdout
    assert "does not exist" in done.stderr
