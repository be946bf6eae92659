"""What every command that measures models has in common: its bench, its texts, and the tables that it leaves."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console, Group
from rich.table import Table

from stages.atomic import require_creatable
from stages.config import BenchConfig, EvaluateConfig
from stages.errors import CacheMismatch, UserError
from stages.evaluation.bench import Bench, Record, Run, Yardstick, room_in
from stages.evaluation.compare import prepare_base
from stages.evaluation.overlap import refuse_calibrated
from stages.evaluation.results import Result, TextResults, measured_models, results_table
from stages.fingerprint import fingerprint_model
from stages.json_file import write_whole
from stages.model_directory import locate_model
from stages.observe.cache import find_cache
from stages.screen import Section, unwrapped

TABLE = "table.md"
_WIDE = 1000
"""Columns of a file, in which nothing is to be wrapped."""


def open_bench(config: BenchConfig) -> Bench:
    """The bench of ``config``; its records count for this base model and this calibration.

    Raises:
        UserError: there is no base model, the cache was made from another one, or no folder can be made.
    """
    require_creatable(config.output, option="--output")
    if config.output.is_file():
        raise UserError(f"--output {config.output} is a file; choose a folder.")
    fingerprint = fingerprint_model(locate_model(config.base))
    cache = find_cache(config.cache_path)
    if cache is not None and cache.manifest.key.model_fingerprint != fingerprint:
        raise CacheMismatch(f"--cache_dir {config.cache_path} was made from another model; pass this one's.")
    calibration = "" if cache is None else cache.manifest.key.digest()
    inputs = hashlib.sha256(f"{fingerprint} {calibration}".encode()).hexdigest()
    return Bench(folder=config.output.absolute(), inputs=inputs, retry_failed=config.retry_failed)


def read_yardsticks(config: BenchConfig) -> tuple[Yardstick, ...]:
    """The texts of ``config``, tokenized.

    Raises:
        UserError: a text can't be read, is too short, or was calibrated on.
    """
    yardsticks = []
    for text in config.text:
        request = EvaluateConfig(
            base=config.base, model=(), text=text, windows=config.windows, seq_len=config.seq_len, worst=0
        )
        base = prepare_base(request)
        refuse_calibrated(text, base.windows, config.cache_path)
        yardsticks.append(Yardstick(text=text, base=base))
    return tuple(yardsticks)


def results_of(
    runs: Sequence[Run], records: Mapping[str, Record], yardstick: Yardstick | None, notes: Mapping[str, str]
) -> list[Result]:
    """The results of those ``runs`` that have a record, on one text; None where there is no text."""
    return [
        Result(
            name=run.name,
            record=records[run.name],
            accuracy=None if yardstick is None else records[run.name].accuracy.get(yardstick.key),
            note=notes.get(run.name, ""),
        )
        for run in runs
        if run.name in records
    ]


def publish(
    bench: Bench,
    runs: Sequence[Run],
    records: Mapping[str, Record],
    yardsticks: Sequence[Yardstick],
    notes: Mapping[str, str],
) -> Section:
    """Return a table for each text and every command, and write the same into the bench's folder as table.md.

    ``notes`` are remarks by run name.
    """
    commands = {run.name: run.shown_command for run in runs}
    lines = [f"{name}: {command}" for name, command in commands.items()]
    tables: list[Table] = []
    published: list[TextResults] = []
    for yardstick in yardsticks or (None,):
        results = results_of(runs, records, yardstick, notes)
        tables.append(results_table(_title(bench, yardstick), results))
        published.append(
            TextResults(
                text=None if yardstick is None else yardstick.text,
                base=None if yardstick is None else bench.base_row(yardstick),
                models=measured_models(results, commands),
            )
        )
    with room_in(bench.folder):
        write_whole(bench.folder / TABLE, ("\n".join([*map(_as_markdown, tables), *lines]) + "\n").encode())
    return Section(name="results", table=Group(*tables, unwrapped("\n".join(lines))), record=published)


def raise_failures(records: Mapping[str, Record]) -> None:
    """Raise UserError naming the runs that failed, if any did."""
    failed = [name for name, record in records.items() if record.failure is not None]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(records)} failed ({', '.join(failed)}): the table says why, and NAME.log what they "
            "printed; --retry_failed tries them again."
        )


def _as_markdown(table: Table) -> str:
    page = io.StringIO()
    title, table.title, table.box, table.padding = table.title, None, box.MARKDOWN, (0, 1)
    Console(file=page, width=_WIDE).print(table)
    return f"{title}\n\n{page.getvalue()}"


def _title(bench: Bench, yardstick: Yardstick | None) -> str:
    if yardstick is None:
        return "no text: held-out layer losses alone"
    row = bench.base_row(yardstick)
    if row is None:
        return yardstick.text
    return (
        f"{yardstick.text}: {row.accuracy.tokens} tokens; the base has {row.bytes / 1e6:.1f} MB and perplexity "
        f"{row.accuracy.perplexity:.3f}; * is nowhere beaten"
    )
