"""Run the command lines inside the test process and keep what a person would see.

Each method imports its own program, for the others cost seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from stages.screen import Screen


@dataclass(frozen=True, slots=True)
class Commands:
    """The programs; each call returns (exit code, what was printed)."""

    capsys: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch

    def calibrate(self, *arguments: object) -> tuple[int, str]:
        from stages.calibrate import calibrate
        from stages.config import CalibrateConfig

        return self.run(CalibrateConfig, calibrate, arguments)

    def quantize(self, *arguments: object) -> tuple[int, str]:
        from stages.config import QuantizeConfig
        from stages.quantize import quantize

        return self.run(QuantizeConfig, quantize, arguments)

    def export(self, *arguments: object) -> tuple[int, str]:
        from export.__main__ import export
        from stages.config import ExportConfig

        return self.run(ExportConfig, export, arguments)

    def drop_in(self, *arguments: object) -> tuple[int, str]:
        from scripts.drop_in import quantize_in_one_go
        from scripts.options import DropInConfig

        return self.run(DropInConfig, quantize_in_one_go, arguments)

    def sweep(self, *arguments: object) -> tuple[int, str]:
        from stages.config import SweepConfig
        from stages.sweep import sweep

        return self.run(SweepConfig, sweep, arguments)

    def compare(self, *arguments: object) -> tuple[int, str]:
        from scripts.compare_with_peer import compare_with_peer
        from scripts.options import PeerConfig

        return self.run(PeerConfig, compare_with_peer, arguments)

    def evaluate(self, *arguments: object) -> tuple[int, str]:
        from stages.config import EvaluateConfig
        from stages.evaluate import evaluate_models

        return self.run(EvaluateConfig, evaluate_models, arguments)

    def report_page(self, *arguments: object) -> tuple[int, str]:
        from stages.config import ReportConfig
        from stages.report_page import report_page

        return self.run(ReportConfig, report_page, arguments)

    def run(
        self, config: type, command: Callable[[object, Screen], None], arguments: tuple[object, ...]
    ) -> tuple[int, str]:
        """Run any command, also one that has no method here."""
        from stages.cli import run_command

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
