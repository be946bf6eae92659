"""Measure every algorithm on one base model: ``python -m scripts.measure_algorithms --base DIR --output DIR``.

Each variant is quantized by the real command in a process of its own, whose seconds and peak memory the operating
system reports; then all are compared with the base on the same text at accuracy level 1.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

from scripts.options import MeasureConfig
from stages.atomic import whole_file
from stages.cli import progress_bar, run_command
from stages.config import Algorithm, EvaluateConfig, LmHead, beside
from stages.errors import UserError
from stages.evaluation.compare import Report, evaluate, load_report, prepare, save_report
from stages.quantized_store import REPORT, open_store
from stages.report import bits_per_weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to quantize the base model."""

    algo: Algorithm
    block_size: int
    zero_point: bool
    mixed: bool
    int8_block_size: int | None
    lm_head: LmHead | None
    column_major: bool

    @property
    def name(self) -> str:
        mixed = "-mixed" if self.mixed else ""
        mixed += f"-int8b{self.int8_block_size}" if self.int8_block_size is not None else ""
        head = f"-head{self.lm_head}" if self.lm_head is not None else ""
        zero_point = "-zp" if self.zero_point else ""
        return f"{self.algo}-b{self.block_size}{zero_point}{mixed}{head}{'-col' if self.column_major else ''}"

    @property
    def arguments(self) -> list[str]:
        """The options of stages.quantize that make this variant."""
        arguments = [f"--algo={self.algo}", f"--block_size={self.block_size}"]
        arguments += ["--use_zero_point"] if self.zero_point else []
        arguments += ["--enable_mixed_quant"] if self.mixed else []
        arguments += [f"--int8_block_size={self.int8_block_size}"] if self.int8_block_size is not None else []
        arguments += [f"--lm_head={self.lm_head}"] if self.lm_head is not None else []
        return arguments + (["--use_column_major"] if self.column_major else [])


def variants_of(config: MeasureConfig) -> list[Variant]:
    """Every combination of the options once; where nothing is INT8, its block size makes no difference."""
    combinations = itertools.product(
        config.block_size,
        config.zero_point,
        config.enable_mixed_quant,
        config.int8_block_size,
        config.lm_head,
        config.use_column_major,
        config.algo,
    )
    return list(
        dict.fromkeys(
            Variant(
                algo=algo,
                block_size=block_size,
                zero_point=zero_point,
                mixed=mixed,
                int8_block_size=int8_block_size if mixed or lm_head == "8" else None,
                lm_head=lm_head,
                column_major=column_major,
            )
            for block_size, zero_point, mixed, int8_block_size, lm_head, column_major, algo in combinations
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a run of stages.quantize took: the search alone, the whole process, and its peak memory."""

    search_seconds: float
    total_seconds: float
    peak_bytes: int


_COSTS = TypeAdapter(Cost)


def run(config: MeasureConfig, console: Console) -> None:
    """Quantize all variants, evaluate them on each text, print one table a text."""
    variants = variants_of(config)
    config.output.mkdir(parents=True, exist_ok=True)
    with progress_bar(console) as progress:
        task = progress.add_task("quantize", total=len(variants))
        costs = []
        for variant in variants:
            progress.update(task, description=variant.name)
            costs.append(_measured_run(config, variant))
            progress.advance(task)
    for text in config.text:
        report = _evaluated(config, variants, text, console)
        bits = [bits_per_weight(open_store(beside(config.output / variant.name, ".weights"))) for variant in variants]
        Console().print(_table(text, variants, costs, bits, report))


def _measured_run(config: MeasureConfig, variant: Variant) -> Cost:
    """Run stages.quantize for one variant, or read what an earlier run measured."""
    kept = config.output / f"{variant.name}.cost.json"
    if kept.is_file():
        return _COSTS.validate_json(kept.read_bytes())
    folder = config.output / variant.name
    cache = config.cache_dir or beside(config.base, ".calibration")
    command = [sys.executable, "-m", "stages.quantize", f"--onnx_path={config.base}", f"--output_path={folder}"]
    command += [*variant.arguments, f"--cache_dir={cache}", "--overwrite"]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    messages = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise UserError(f"{variant.name}: stages.quantize failed: {messages.strip().splitlines()[-1]}")
    cost = Cost(
        search_seconds=_search_seconds(beside(folder, ".weights")),
        total_seconds=time.perf_counter() - started,
        peak_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    )
    with whole_file(kept) as partial:
        partial.write_bytes(_COSTS.dump_json(cost))
    return cost


def _search_seconds(weights: Path) -> float:
    lines = (weights / REPORT).read_text(encoding="utf-8").splitlines()
    return float(sum(json.loads(line)["seconds"] for line in lines))


def _evaluated(config: MeasureConfig, variants: list[Variant], text: str, console: Console) -> Report:
    kept = config.output / f"evaluation-{Path(text).stem}.json"
    prepared = prepare(
        EvaluateConfig(
            base=config.base,
            model=tuple(config.output / variant.name for variant in variants),
            text=text,
            windows=config.windows,
            seq_len=config.seq_len,
        )
    )
    report = load_report(kept, prepared.comparison)
    if report is None:
        with progress_bar(console) as progress:
            report = evaluate(prepared, progress)
        save_report(report, kept)
    return report


def _table(text: str, variants: list[Variant], costs: list[Cost], bits: list[float], report: Report) -> Table:
    base, *rows = report.rows
    table = Table(title=f"{text}: {base.accuracy.tokens} tokens, base perplexity {base.accuracy.perplexity:.3f}")
    table.add_column("variant")
    for heading in ("search s", "total s", "peak MB", "bits a weight", "MB", "perplexity", "KL (nats)", "same top-1"):
        table.add_column(heading, justify="right")
    for variant, cost, width, row in zip(variants, costs, bits, rows, strict=True):
        table.add_row(
            variant.name,
            f"{cost.search_seconds:.1f}",
            f"{cost.total_seconds:.1f}",
            f"{cost.peak_bytes / 1e6:.0f}",
            f"{width:.3f}",
            f"{row.bytes / 1e6:.1f}",
            f"{row.accuracy.perplexity:.3f}",
            f"{row.accuracy.mean_divergence:.5f}",
            f"{row.accuracy.top1_agreement:.2%}",
        )
    return table


if __name__ == "__main__":
    run_command(MeasureConfig, run, "python -m scripts.measure_algorithms")
