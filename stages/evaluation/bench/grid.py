"""List the points of a sweep: every combination of stages.quantize options once, each with its command."""

from __future__ import annotations

import itertools
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from stages.commands.calibrate_options import DECIDE_TEXT
from stages.commands.evaluate_options import SweepGrid
from stages.commands.options import default_folder, require
from stages.commands.parsing import parse_words
from stages.commands.quantize_options import ROUNDED, Algorithm, LmHead, PerChannelWord, QuantizeConfig
from stages.errors import OptionError
from stages.evaluation.bench.runs import Run
from stages.system.paths import file_name, split_line

_OF_CACHE = frozenset({*DECIDE_TEXT, "cache_dir"})
"""Options about the calibration, which all points share."""
_OF_SWEEP = frozenset({"onnx_path", "output_path", "weights_path", "overwrite", "no_overwrite"})
"""Options that the sweep itself sets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One combination of options.

    Raises:
        OptionError: ``options`` can't be split, or set what all points share.
    """

    algo: Algorithm
    block_size: int | None
    zero_point: bool | None
    mixed: bool
    int8_block_size: int | PerChannelWord | None
    lm_head: LmHead | None
    column_major: bool
    options: str
    """Further options of stages.quantize, without their dashes."""

    def __post_init__(self) -> None:
        option = f"--options '{self.options}'"
        for name in (word.partition("=")[0].replace("-", "_") for word in self._further):
            require(
                name.removeprefix("no_") not in _OF_CACHE,
                f"{option} sets {name}, and all points of a sweep share one calibration; make another one "
                "(stages.calibrate --cache_dir) and pass it to another sweep.",
            )
            require(name not in _OF_SWEEP, f"{option} sets {name}, which the sweep itself does; leave it out.")

    @property
    def _further(self) -> list[str]:
        """Return ``options`` word by word."""
        try:
            return split_line(self.options)
        except ValueError as error:
            raise OptionError(f"--options {self.options} has a quotation mark without its partner; add it.") from error

    @property
    def name(self) -> str:
        """Return the name of the folder, which differs between the points of a grid."""
        parts = [
            self.algo,
            f"b{self.block_size}" if self.block_size is not None else "",
            {True: "zp", False: "nozp", None: ""}[self.zero_point],
            "mixed" if self.mixed else "",
            f"int8b{self.int8_block_size}" if self.int8_block_size is not None else "",
            f"head{self.lm_head}" if self.lm_head is not None else "",
            "col" if self.column_major else "",
            re.sub(r"[^A-Za-z0-9_.]+", "-", self.options).strip("-"),
        ]
        return file_name("-".join(filter(None, parts)))

    @property
    def arguments(self) -> tuple[str, ...]:
        """Return the options of stages.quantize that make this point."""
        arguments = [f"--algo={self.algo}"]
        arguments += [f"--block_size={self.block_size}"] if self.block_size is not None else []
        arguments += {True: ["--use_zero_point"], False: ["--no_use_zero_point"], None: []}[self.zero_point]
        arguments += ["--enable_mixed_quant"] if self.mixed else []
        arguments += [f"--int8_block_size={self.int8_block_size}"] if self.int8_block_size is not None else []
        arguments += [f"--lm_head={self.lm_head}"] if self.lm_head is not None else []
        arguments += ["--use_column_major"] if self.column_major else []
        return (*arguments, *(f"--{option}" for option in self._further))

    def run(self, base: Path, output: Path, cache: Path) -> Run:
        """Return the run that makes this point in a folder of its own.

        Args:
            base: the base model.
            output: the sweep's folder.
            cache: the calibration cache.
        """
        folder = output.absolute() / self.name
        places = (f"--onnx_path={base.absolute()}", f"--output_path={folder}", f"--cache_dir={cache.absolute()}")
        # --overwrite replaces what an interrupted run left.
        command = (sys.executable, "-m", "stages.quantize", *places, *self.arguments, "--overwrite")
        return Run(name=self.name, command=command, model=folder, weights=default_folder(folder, ".weights"))

    def config(self, base: Path, output: Path, cache: Path) -> QuantizeConfig:
        """Return the options that this point's command gives.

        Args:
            base: the base model.
            output: the sweep's folder.
            cache: the calibration cache.

        Raises:
            OptionError: ``options`` names one that doesn't exist.
        """
        _, _, program, *words = self.run(base, output, cache).command
        try:
            return parse_words(QuantizeConfig, program, words)
        except OptionError as error:
            raise OptionError(f"--options '{self.options}': {error}") from error

    @property
    def may_have_int8(self) -> bool:
        """Return whether weights may be INT8: by name, by default in lm_head, or as open formats are spread."""
        spreads = None in (self.block_size, self.zero_point) and self.algo not in ROUNDED
        return self.mixed or spreads or self.lm_head not in ("4", "none") or bool(self.options)


def points_of(grid: SweepGrid) -> list[Point]:
    """Return every combination once; INT8 block sizes differ only where something may be INT8.

    Raises:
        OptionError: an entry of ``options`` can't be split, or sets what all points share.
    """
    combinations = itertools.product(
        grid.block_size,
        grid.use_zero_point,
        grid.enable_mixed_quant,
        grid.int8_block_size,
        grid.lm_head,
        grid.use_column_major,
        grid.options,
        grid.algo,
    )
    points = (
        Point(
            algo=algo,
            block_size=block_size,
            zero_point=zero_point,
            mixed=mixed,
            int8_block_size=int8_block_size,
            lm_head=lm_head,
            column_major=column_major,
            options=options,
        )
        for block_size, zero_point, mixed, int8_block_size, lm_head, column_major, options, algo in combinations
    )
    return list(
        dict.fromkeys(point if point.may_have_int8 else replace(point, int8_block_size=None) for point in points)
    )
