"""What people type: options and their help, sizes, targets."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from stages.commands.evaluate_options import SweepConfig
from stages.commands.options import CommandOptions
from stages.commands.parsing import Release, Target, name_bare_words, parse_options, parse_size, parse_target
from stages.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class _Paths:
    cache_dir: Path | None = None
    """A folder. Default: the model's folder, whose name
    (which may be long) is used."""


@dataclass(frozen=True, kw_only=True)
class _Config(_Paths, CommandOptions):
    """Do something."""

    first: int = 3
    """A number."""
    patterns: str = ""
    """Any text."""
    maybe: bool | None = None
    """Yes, no, or undecided."""
    many: tuple[str, ...] = ()
    """Any texts."""


@dataclass(frozen=True, kw_only=True)
class _Choices(_Config):
    """Choose."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A folder."""
    model: Path
    """A model."""
    algo: Literal["awq_lite", "gptq"] = "gptq"
    """An algorithm."""
    several: tuple[Literal["awq_lite", "gptq"], ...] = ("gptq",)
    """Algorithms."""


def test_options_are_parsed_with_those_of_their_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "--first", "4", "--cache-dir", "a", "--quiet"])
    options = parse_options(_Config, "program")
    assert isinstance(options, _Config)
    assert (options.first, options.cache_dir, options.printing.quiet) == (4, Path("a"), True)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("in 5", "--cache_dir in --first 5"),
        ("--quiet in --patterns x 5", "--quiet --cache_dir in --patterns x --first 5"),
        ("--log-level=debug in --first 5", "--log-level=debug --cache_dir in --first 5"),
        ("--cache_dir in 5", "--cache_dir in --first 5"),
        ("--unknown x in", "--unknown x --cache_dir in"),
        ("in -5", "--cache_dir in -5"),
        ("--no_maybe in 5", "--no_maybe --cache_dir in --first 5"),
        ("--maybe in 5", "--maybe --cache_dir in --first 5"),
        ("--many x y --cache_dir in 5", "--many x y --cache_dir in --first 5"),
        ("in --many x --quiet 5", "--cache_dir in --many x --quiet --first 5"),
        ("--maybe True in 5", "--maybe --cache_dir in --first 5"),
        ("in --quiet=true --maybe false", "--cache_dir in --quiet --no_maybe"),
        ("--quiet true.onnx", "--quiet --cache_dir true.onnx"),
    ],
)
def test_bare_words_get_the_names_of_options(typed: str, meant: str) -> None:
    assert name_bare_words(typed.split(), _Config, ("cache_dir", "first")) == meant.split()


def test_a_bare_word_too_many_is_refused() -> None:
    with pytest.raises(OptionError, match="more: --cache_dir and --first are given already"):
        name_bare_words(["place", "more", "--first", "4"], _Config, ("cache_dir", "first"))


@pytest.mark.parametrize("asked", ["-h", "--help", "--help_all", "--help-all"])
def test_help_names_no_empty_default(
    asked: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    with pytest.raises(SystemExit) as left:
        parse_options(_Config, "program", ["--first", "4", asked])
    assert left.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith("usage: program [options] Do something. ")
    assert "A folder. Default: the model's folder, whose name (which may be long) is used." in printed
    assert re.findall(r"Default: \w+", printed) == ["Default: info", "Default: the", "Default: 3"]


def test_none_is_a_word_of_options_that_take_several_values() -> None:
    given = ["--base", "base", "--output", "sweep", "--lm_head", "None", "8"]
    assert parse_options(SweepConfig, "sweep", given).lm_head == (None, "8")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--frst", "4"], "program has no option --frst; did you mean --first?"),
        (["--first", "4", "--cach-dir=x"], "program has no option --cach_dir; did you mean --cache_dir?"),
        (["--xyzzy"], "program has no option --xyzzy; see program --help_all."),
        (["--algo", "awqlite"], "--algo can't be awqlite; did you mean awq_lite?"),
        (["--algo=zzz"], "--algo can't be zzz; choose from awq_lite, gptq."),
        (["--several", "gptq", "gtpq"], "--several can't be gtpq; did you mean gptq?"),
        (["--quiet"], "program needs FOLDER and --model PATH; program --help shows examples."),
        ([], "program needs FOLDER and --model PATH; program --help shows examples."),
    ],
)
def test_typos_are_answered_in_one_sentence_even_where_options_are_missing(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        parse_options(_Choices, "program", given)
    assert left.value.code == 2
    assert capsys.readouterr().err == f"error: {said}\n"


@pytest.mark.parametrize(
    ("text", "target", "label"),
    [
        ("cpu@1.24", Target(runtime="cpu", release=(1, 24)), "cpu@1.24"),
        ("trt-rtx@1.24.1", Target(runtime="trt-rtx", release=(1, 24)), "trt-rtx@1.24"),
        (" CUDA@1.9999 ", Target(runtime="cuda", release=(1, 9999)), "cuda@1.9999"),
    ],
)
def test_a_target_is_a_runtime_and_a_release(text: str, target: Target, label: str) -> None:
    assert parse_target(text) == target
    assert target.label == label


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tpu", ["'tpu'", "cpu, cuda, dml, trt-rtx, webgpu, qnn"]),
        ("", ["''", "cpu, cuda"]),
        ("cpu@", ["''", "1.24.1"]),
        ("cpu@new", ["'new'", "1.24.1"]),
        ("cpu@1", ["'1'"]),
        ("cpu@1.24.1.2", ["'1.24.1.2'"]),
        ("cpu@1.24@2", ["'1.24@2'"]),
        ("cpu@1.19", ["before 1.20"]),
        ("cpu@0.99", ["before 1.20"]),
    ],
)
def test_what_names_no_target_is_refused_in_one_sentence(text: str, words: list[str]) -> None:
    with pytest.raises(OptionError) as refused:
        parse_target(text)
    message = str(refused.value)
    assert message.startswith(f"--target {text}: ")
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("installed", "release", "why"),
    [
        ("1.24.1", (1, 24), "installed here;"),
        ("1.30.0.dev2026", (1, 30), "installed here;"),
        ("1.19.2", (1, 32), "the newest known;"),
        ("1.99.0", (1, 32), "the newest known;"),
    ],
)
def test_a_release_that_nobody_names_is_the_installed_one(
    installed: str, release: Release, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.__version__", installed)
    found = parse_target("cpu")
    assert found.release == release
    assert found.about_release.startswith(why)


def test_what_is_assumed_about_a_release_is_said() -> None:
    assert "rules of 1.32 are assumed" in parse_target("cpu@1.33").about_release
    assert parse_target("cpu@1.32").about_release == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.1GB", 1_100_000_000),
        ("900MB", 900_000_000),
        ("850MiB", 850 * 1024 * 1024),
        ("1.5 gib", 3 * 1024**3 // 2),
        ("12345", 12345),
        (".5kb", 500),
    ],
)
def test_sizes_as_people_write_them(text: str, expected: int) -> None:
    assert parse_size(text, "--target_size") == expected


@pytest.mark.parametrize("text", ["", "big", "1.1.1GB", "-3MB", "4XB", "0MB", "MB"])
def test_what_is_no_size_is_refused_by_the_options_name(text: str) -> None:
    with pytest.raises(OptionError, match="--target_size"):
        parse_size(text, "--target_size")
