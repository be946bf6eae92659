"""Coverage-guided fuzzing of our loaders: ``python -m scripts.fuzz --base DIR --weights_path DIR --output DIR``.

Each target gets its part of the time in a process of its own. A loader may take what it is given or refuse it with a
UserError; an exception of any other kind, a crash, a hang or a swollen process is a finding, kept in --output.
Needs Linux and ``pip install '.[fuzz]'``. Use a small model: every run reads all of it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from scripts.fuzzing.targets import make_targets
from scripts.options import FuzzConfig
from stages.commands.output import Section
from stages.commands.progress import status
from stages.commands.run import run_command
from stages.errors import UserError

_EXECUTIONS = re.compile(r"stat::number_of_executed_units:\s*(\d+)")
_COVERAGE = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)")
_LIMITS = ("-rss_limit_mb=4096", "-timeout=30", "-max_len=1048576", "-print_final_stats=1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one target's process said."""

    name: str
    executions: int
    coverage: str
    finding: str
    """The exception's line; empty where nothing was found."""


def fuzz(config: FuzzConfig) -> Iterator[Section]:
    """Fuzz every target, show what was done, and fail where something was found."""
    with tempfile.TemporaryDirectory() as scratch:
        names = tuple(make_targets(config.base, config.cache_path, config.weights_path, Path(scratch)))
    chosen = config.target or names
    unknown = [name for name in chosen if name not in names]
    if unknown:
        raise UserError(f"--target {unknown[0]} is none of {', '.join(names)}; pass one of these.")
    config.output.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for name in chosen:
        with status(name):
            outcomes.append(_fuzz(config, name, max(1, config.seconds // len(chosen))))
    yield Section(name="fuzzing", table=_table(outcomes), record=outcomes)
    found = [outcome.name for outcome in outcomes if outcome.finding]
    if found:
        raise UserError(f"Something was found in {', '.join(found)}; NAME.log in {config.output} says what.")


def _fuzz(config: FuzzConfig, name: str, seconds: int) -> Outcome:
    folders = map(str, (config.base, config.cache_path, config.weights_path))
    limits = (*_LIMITS, f"-max_total_time={seconds}", f"-artifact_prefix={config.output}/{name}.")
    command = (sys.executable, "-m", "scripts.fuzzing.one_target", name, *folders, *limits)
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    (config.output / f"{name}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    said = done.stdout + done.stderr
    executions = _EXECUTIONS.findall(said)
    coverage = _COVERAGE.findall(said)
    return Outcome(
        name=name,
        executions=int(executions[-1]) if executions else 0,
        coverage="cov {} features {} corpus {}".format(*coverage[-1]) if coverage else "-",
        finding="" if done.returncode == 0 else _finding(said, done.returncode),
    )


def _finding(said: str, code: int) -> str:
    lines = [line for line in said.splitlines() if re.match(r"\w+(\.\w+)*(Error|Exception|Violation)\b|==\d+==", line)]
    return lines[0] if lines else f"exit code {code}"


def _table(outcomes: list[Outcome]) -> Table:
    table = Table(title="fuzzing")
    for heading in ("target", "executions", "coverage", "found"):
        table.add_column(heading, overflow="fold")
    for outcome in outcomes:
        table.add_row(outcome.name, f"{outcome.executions:,}", outcome.coverage, outcome.finding or "nothing")
    return table


if __name__ == "__main__":
    run_command(FuzzConfig, fuzz, "python -m scripts.fuzz")
