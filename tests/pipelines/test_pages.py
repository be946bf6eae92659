"""README and docs/ are true: their code blocks run, and what they name exists (see CONTRIBUTING.md, Pages)."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from genai_quant.command import COMMANDS
from scripts import options as of_scripts
from stages.commands import calibrate_options, evaluate_options, options, quantize_options

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
SLOWEST = {"evaluation.md"}
"""Pages whose commands take longest: they run with --all only."""
BLOCK = re.compile(r"(?:^<!-- file: (?P<name>\S+) -->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.M | re.S)
OURS = {
    "stages.calibrate": calibrate_options.CalibrateConfig,
    "stages.quantize": quantize_options.QuantizeConfig,
    "export": quantize_options.ExportConfig,
    "stages.chat": evaluate_options.ChatConfig,
    "stages.evaluate": evaluate_options.EvaluateConfig,
    "stages.sweep": evaluate_options.SweepConfig,
    "stages.inspect": evaluate_options.InspectConfig,
    "stages.report": evaluate_options.ReportConfig,
    "genai_quant": options.RunConfig,
    "scripts.quantize": of_scripts.DropInConfig,
    "scripts.compare_with_peer": of_scripts.PeerConfig,
    "scripts.benchmark": of_scripts.BenchmarkConfig,
    "scripts.held_out_texts": of_scripts.HeldOutTextsConfig,
    "scripts.make_large_model": of_scripts.LargeModelConfig,
    "scripts.write_tables": of_scripts.TablesConfig,
}
OURS |= {f"genai-quant {name}": kind for name, (kind, _) in COMMANDS.items()}
"""Our commands and their options."""
FOREIGN = {
    "--calib",  # a completion that ModelOpt-Windows would have accepted
    "--config_file",
    "--fast",
    "--all",
    "--help",
    "--help_all",
    "--index-url",
    "--multi_gpu",
    "--no-deps",
    "--num_processes",
    "--package-config",
    "--tyro-write-completion",
    "--version",
}
"""Options of other programs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A code block of a page."""

    name: str | None
    """The file that it is written to in place of being run."""
    language: str
    body: str


def blocks_of(page: Path) -> Iterator[Block]:
    for found in BLOCK.finditer(page.read_text(encoding="utf-8")):
        yield Block(name=found["name"], language=found["language"], body=found["body"])


def is_run(block: Block) -> bool:
    return block.name is None and block.language in ("bash", "python")


def lines_of(body: str) -> Iterator[list[str]]:
    """Yield the commands of a shell block as words; comments and continued lines are understood."""
    for line in body.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


@pytest.fixture(scope="module")
def seed_models(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Return what every page finds: models/base, and its calibration of --dataset offline --calib_size 32."""
    from stages.calibration.run import calibrate

    folder = tmp_path_factory.mktemp("pages") / "models"
    shutil.copytree(tiny_model, folder / "base", ignore=shutil.ignore_patterns("cache"))
    calibrate(calibrate_options.CalibrateConfig(onnx_path=folder / "base", dataset="offline", calib_size=32))
    return folder


def run_shell(body: str) -> None:
    """Run each line ``genai-quant NAME OPTIONS [> FILE]``, or ``python -m MODULE``, in this process."""
    for words in lines_of(body):
        words[:1] = ["python", "-m", "genai_quant"] if words[0] == "genai-quant" else words[:1]
        assert words[:2] == ["python", "-m"], f"a block that is run holds only our commands, not: {words}"
        into = Path(words.pop()) if words[-2] == ">" else None
        arguments = words[2:-1] if into else words[2:]
        with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
            if into is not None:
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(into.open("w"))))
            patch.setattr(sys, "argv", arguments)
            module = "stages.inspect.__main__" if arguments[0] == "stages.inspect" else arguments[0]
            assert exit_code(module) == 0, words


def exit_code(module: str) -> int | str:
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.thorough] if page.name in SLOWEST else [], id=page.name)
        for page in PAGES
        if any(map(is_run, blocks_of(page)))
    ],
)
def test_the_code_blocks_of_a_page_run(
    page: Path, seed_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(seed_models, tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    for block in blocks_of(page):
        if block.name is not None:
            Path(block.name).write_text(block.body, encoding="utf-8")
        elif block.language == "bash":
            run_shell(block.body)
        elif block.language == "python":
            exec(compile(block.body, page.name, "exec"), {"__name__": "__main__"})


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_block_that_fails_is_seen() -> None:
    with pytest.raises(AssertionError, match="nothing-is-here"):
        run_shell("python -m stages.inspect nothing-is-here")
    with pytest.raises(AssertionError, match="holds only our commands"):
        run_shell("rm -rf models")


def options_of(config: type) -> set[str]:
    """Return the option names of a command, those of its output included."""
    names = {field.name for field in dataclasses.fields(config) if field.name != "printing"}
    names |= {field.name for field in dataclasses.fields(options.OutputOptions)}
    return {f"--{name}" for name in names} | {f"--no_{name}" for name in names}


def known_option(option: str, names: set[str]) -> bool:
    return option.replace("-", "_").replace("__", "--", 1) in names


ALL_OPTIONS = set().union(*map(options_of, OURS.values()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_of_a_page_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = {option for option in re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text) if not option.endswith("_")}
    assert {option for option in named - FOREIGN if not known_option(option, ALL_OPTIONS)} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_line_of_a_page_takes_its_options(page: Path) -> None:
    for block in blocks_of(page):
        for words in lines_of(block.body) if block.language in ("bash", "console") else ():
            start = words.index("-m") + 1 if "-m" in words else 1
            module = words[start] if "-m" in words else " ".join(words[:2])
            if module in OURS:
                given = {word.partition("=")[0] for word in words[start:] if word.startswith("--")}
                wrong = {option for option in given if not known_option(option, options_of(OURS[module]))}
                assert wrong == set(), f"{module} has no {wrong}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_module_and_path_of_a_page_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    modules = set(re.findall(r"python -m ((?:stages|export|scripts|genai_quant)[\w.]*\w)", text))
    modules |= set(re.findall(r"`((?:stages|scripts)(?:\.\w+)+)`", text))
    assert {module for module in modules if importlib.util.find_spec(module) is None} == set()
    paths = set(re.findall(r"(?<![\w./-])((?:stages|export|scripts|tests|genai_quant)/[\w./-]*\w)", text))
    assert {path for path in paths if not (ROOT / path).exists()} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors_of(file), f"{target}#{anchor}"


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size < 10_240
