"""Run the command lines inside the test process and keep what a person would see."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from stages.commands.output import Section


@dataclass(frozen=True, slots=True)
class Commands:
    """The programs; each call returns (exit code, what was printed)."""

    capsys: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch

    def calibrate(self, *arguments: object) -> tuple[int, str]:
        from stages import calibrate
        from stages.commands.calibrate_options import CalibrateConfig

        return self.run(CalibrateConfig, calibrate.command, arguments)

    def quantize(self, *arguments: object) -> tuple[int, str]:
        """Run stage two and show all, for no runtime in particular unless ``arguments`` name a target."""
        from stages import quantize
        from stages.commands.quantize_options import QuantizeConfig

        named = any(str(each).startswith("--target") and not str(each).startswith("--target_") for each in arguments)
        target = () if named else ("--target", "any")
        return self.run(QuantizeConfig, quantize.command, (*arguments, *target, "--verbose"))

    def export(self, *arguments: object) -> tuple[int, str]:
        from export import __main__ as export
        from stages.commands.quantize_options import ExportConfig

        return self.run(ExportConfig, export.command, arguments)

    def drop_in(self, *arguments: object) -> tuple[int, str]:
        from scripts.drop_in.run import calibrate_and_quantize
        from scripts.options import DropInConfig

        return self.run(DropInConfig, calibrate_and_quantize, arguments)

    def sweep(self, *arguments: object) -> tuple[int, str]:
        from stages import sweep
        from stages.commands.evaluate_options import SweepConfig

        return self.run(SweepConfig, sweep.command, arguments)

    def compare(self, *arguments: object) -> tuple[int, str]:
        from scripts.compare_with_peer import compare_with_peer
        from scripts.options import PeerConfig

        return self.run(PeerConfig, compare_with_peer, arguments)

    def evaluate(self, *arguments: object) -> tuple[int, str]:
        from stages import evaluate
        from stages.commands.evaluate_options import EvaluateConfig

        return self.run(EvaluateConfig, evaluate.command, arguments)

    def report(self, *arguments: object) -> tuple[int, str]:
        from stages.commands.evaluate_options import ReportConfig
        from stages.report import __main__ as report

        return self.run(ReportConfig, report.command, arguments)

    def run(
        self, config: type, command: Callable[[object], Iterable[Section]], arguments: tuple[object, ...]
    ) -> tuple[int, str]:
        """Run any other command."""
        from stages.commands.run import run_command

        self.monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
        self.monkeypatch.setenv("COLUMNS", "400")
        self.capsys.readouterr()
        code = 0
        try:
            run_command(config, command, "program")
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = self.capsys.readouterr()
        return code, printed.out + printed.err
