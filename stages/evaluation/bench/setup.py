"""What every command that measures models has in common: its bench, its texts, and the tables that it leaves."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from numpy.lib.stride_tricks import sliding_window_view
from rich import box
from rich.console import Console, Group
from rich.table import Table

from stages.calibration.cache import find_cache
from stages.commands.evaluate_options import BenchConfig, EvaluateConfig
from stages.commands.output import Section, unwrapped
from stages.errors import CacheMismatch, UserError
from stages.evaluation.bench.results import Result, TextResults, measured_models, results_table
from stages.evaluation.bench.runs import EvaluationText, Record, Run, RunFolder, room_in
from stages.evaluation.compare import prepare_base
from stages.model.directory import locate_model
from stages.model.load import fingerprint_model
from stages.system.atomic import require_creatable
from stages.system.json_file import write_whole

_RUN = 16
"""Tokens. Ordinary prose repeats hardly any run of this length; set phrases are shorter."""


_TOLERATED = 0.05
"""Share of common runs up to which a text counts as another one: boilerplate and quotations repeat."""


def common_share(tokens: Int64[np.ndarray, "windows L"], others: Int64[np.ndarray, "others M"]) -> float:
    """Share of the runs of 16 tokens in ``tokens`` that ``others`` hold as well, 0 to 1."""
    known = {run.tobytes() for window in others for run in _runs(window)}
    found = [run.tobytes() in known for window in tokens for run in _runs(window)]
    return sum(found) / max(1, len(found))


def _runs(window: Int64[np.ndarray, " L"]) -> np.ndarray:
    return sliding_window_view(window, _RUN) if len(window) >= _RUN else np.empty((0, _RUN), window.dtype)


def refuse_calibrated(text: str, tokens: Int64[np.ndarray, "windows L"], cache: Path) -> None:
    """Raise UserError where ``tokens`` of ``text`` are, for more than a twentieth, those that ``cache`` was made of.

    A cache that doesn't exist has seen nothing.
    """
    found = find_cache(cache)
    if found is None:
        return
    share = common_share(tokens, np.concatenate(found.read_tokens()))
    if share > _TOLERATED:
        raise UserError(
            f"--text {text}: {share:.0%} of its runs of {_RUN} tokens were calibrated on ({cache}); pass text that "
            "calibration never saw."
        )


TABLE = "table.md"


_WIDE = 1000
"""Columns of a file, in which nothing is to be wrapped."""


def open_run_folder(config: BenchConfig) -> RunFolder:
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
    return RunFolder(folder=config.output.absolute(), inputs=inputs, retry_failed=config.retry_failed)


def read_evaluation_texts(config: BenchConfig) -> tuple[EvaluationText, ...]:
    """The texts of ``config``, tokenized.

    Raises:
        UserError: a text can't be read, is too short, or was calibrated on.
    """
    evaluation_texts = []
    for text in config.text:
        request = EvaluateConfig(
            base=config.base, model=(), text=text, windows=config.windows, seq_len=config.seq_len, worst=0
        )
        base = prepare_base(request)
        refuse_calibrated(text, base.windows, config.cache_path)
        evaluation_texts.append(EvaluationText(text=text, base=base))
    return tuple(evaluation_texts)


def results_of(
    runs: Sequence[Run], records: Mapping[str, Record], evaluation_text: EvaluationText | None, notes: Mapping[str, str]
) -> list[Result]:
    """The results of those ``runs`` that have a record, on one text; None where there is no text."""
    return [
        Result(
            name=run.name,
            record=records[run.name],
            accuracy=None if evaluation_text is None else records[run.name].accuracy.get(evaluation_text.key),
            note=notes.get(run.name, ""),
        )
        for run in runs
        if run.name in records
    ]


def publish(
    run_folder: RunFolder,
    runs: Sequence[Run],
    records: Mapping[str, Record],
    evaluation_texts: Sequence[EvaluationText],
    notes: Mapping[str, str],
) -> Section:
    """Return a table for each text and every command, and write the same into the bench's folder as table.md.

    ``notes`` are remarks by run name.
    """
    commands = {run.name: run.shown_command for run in runs}
    lines = [f"{name}: {command}" for name, command in commands.items()]
    tables: list[Table] = []
    published: list[TextResults] = []
    for evaluation_text in evaluation_texts or (None,):
        results = results_of(runs, records, evaluation_text, notes)
        tables.append(results_table(_title(run_folder, evaluation_text), results))
        published.append(
            TextResults(
                text=None if evaluation_text is None else evaluation_text.text,
                base=None if evaluation_text is None else run_folder.base_row(evaluation_text),
                models=measured_models(results, commands),
            )
        )
    with room_in(run_folder.folder):
        write_whole(run_folder.folder / TABLE, ("\n".join([*map(_as_markdown, tables), *lines]) + "\n").encode())
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


def _title(run_folder: RunFolder, evaluation_text: EvaluationText | None) -> str:
    if evaluation_text is None:
        return "no text: held-out layer losses alone"
    row = run_folder.base_row(evaluation_text)
    if row is None:
        return evaluation_text.text
    return (
        f"{evaluation_text.text}: {row.accuracy.tokens} tokens; the base has {row.bytes / 1e6:.1f} MB and perplexity "
        f"{row.accuracy.perplexity:.3f}; * is nowhere beaten"
    )
