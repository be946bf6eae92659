"""List the points of a sweep: every combination of stages.quantize options once, each with its command."""

from __future__ import annotations

import itertools
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from stages.commands.evaluate_options import SweepGrid
from stages.commands.options import default_folder
from stages.commands.quantize_options import Algorithm, LmHead, PerChannelWord, QuantizeConfig
from stages.evaluation.bench.runs import Run
from stages.system.paths import file_name, split_line


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One combination of options."""

    algo: Algorithm
    block_size: int | None
    zero_point: bool | None
    mixed: bool
    int8_block_size: int | PerChannelWord | None
    lm_head: LmHead | None
    column_major: bool
    options: str
    """Further options of stages.quantize, without their dashes."""

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
        return (*arguments, *(f"--{option}" for option in split_line(self.options)))

    def config(self, base: Path, output: Path, cache: Path) -> QuantizeConfig:
        """Return these options without those of ``options``.

        Args:
            base: the base model.
            output: the sweep's folder.
            cache: the calibration cache.
        """
        return QuantizeConfig(
            onnx_path=base,
            output_path=output / self.name,
            cache_dir=cache,
            algo=self.algo,
            block_size=self.block_size,
            use_zero_point=self.zero_point,
            enable_mixed_quant=self.mixed,
            int8_block_size=self.int8_block_size,
            lm_head=self.lm_head,
            use_column_major=self.column_major,
            overwrite=True,
        )

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


def points_of(grid: SweepGrid) -> list[Point]:
    """Return every combination once; INT8 block sizes differ only where something may be INT8."""
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
    return list(
        dict.fromkeys(
            Point(
                algo=algo,
                block_size=block_size,
                zero_point=zero_point,
                mixed=mixed,
                # --options may name INT8 sites too.
                int8_block_size=int8_block_size if mixed or lm_head == "8" or options else None,
                lm_head=lm_head,
                column_major=column_major,
                options=options,
            )
            for block_size, zero_point, mixed, int8_block_size, lm_head, column_major, options, algo in combinations
        )
    )
