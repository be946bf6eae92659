"""Compare models with their base: ``python -m scripts.evaluate --base DIR --model DIR [DIR ...]``."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from stages.cli import progress_bar, run_command
from stages.config import EvaluateConfig
from stages.evaluation.compare import ModelRow, Report, evaluate, load_report, prepare, save_report
from stages.widen import WIDENED_BECAUSE


def run(config: EvaluateConfig, console: Console) -> None:
    """Show the report of an equal comparison if --json holds one; else evaluate, save and show."""
    prepared = prepare(config)
    report = load_report(config.json, prepared.comparison) if config.json is not None else None
    if report is None:
        with progress_bar(console) as progress:
            report = evaluate(prepared, progress)
        if config.json is not None:
            save_report(report, config.json)
    Console().print(_table(report))


def _table(report: Report) -> Table:
    base = report.rows[0]
    table = Table(title=f"{base.accuracy.tokens} predicted tokens, compared with {base.name}")
    table.add_column("model")
    for heading in ("perplexity", "KL (nats)", "same top-1", "MB", "size"):
        table.add_column(heading, justify="right")
    for row in report.rows:
        table.add_row(*_cells(row, base))
    if widened := [row.name for row in report.rows if row.widened]:
        table.caption = f"{', '.join(widened)} ran {WIDENED_BECAUSE}"
    return table


def _cells(row: ModelRow, base: ModelRow) -> tuple[str, ...]:
    accuracy = row.accuracy
    return (
        row.name,
        f"{accuracy.perplexity:.3f}",
        f"{accuracy.mean_divergence:.5f}",
        f"{accuracy.top1_agreement:.2%}",
        f"{row.bytes / 1e6:.1f}",
        f"{row.bytes / base.bytes:.1%}",
    )


if __name__ == "__main__":
    run_command(EvaluateConfig, run, "python -m scripts.evaluate")
