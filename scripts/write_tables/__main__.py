"""Write measured results into the tables of README and docs/: ``python -m scripts.write_tables``.

Results lie in docs/results; a table stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``, and nothing else of a page
is touched.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from pydantic import TypeAdapter

from scripts.architectures.matrix import read_cells
from scripts.benchmarks.figures import Benchmark
from scripts.options import TablesConfig
from scripts.peers.comparison import read_comparison
from scripts.write_tables import tables
from scripts.write_tables.results import (
    ArchitecturesResult,
    BenchmarkResult,
    ComparisonResult,
    FamiliesResult,
    Result,
    TimesResult,
    provenance,
    read_results,
    save_result,
    without_commands,
)
from scripts.write_tables.support_matrix import read_results as read_families
from stages.commands.output import Section
from stages.commands.run import run_command
from stages.errors import UserError
from stages.system.json_file import explained, write_whole

ROOT = Path(__file__).parents[2]
_LOGGER = logging.getLogger(__name__)
_RESULTS = "docs/results"
_BLOCKS: dict[str, dict[str, Callable[[Sequence[Result]], str]]] = {
    "README.md": {"results": tables.readme_results, "times": tables.readme_times},
    "docs/benchmarks.md": {"accuracy": tables.accuracy, "cost": tables.cost},
    "docs/model-support.md": {"architectures": tables.architectures, "families": tables.families},
}


def write_tables(config: TablesConfig) -> Iterable[Section]:
    """Add the results that ``config`` names and write all tables.

    Raises:
        UserError: results can't be read, or a page lacks a table's place.
    """
    for result in new_results(config):
        save_result(result, ROOT / _RESULTS)
    for page, text in pages_with_tables(ROOT).items():
        write_whole(page, text.encode())
        _LOGGER.info("wrote %s", page)
    return ()


def pages_with_tables(root: Path) -> dict[Path, str]:
    """Return the text that each page with tables should have.

    Args:
        root: the repository, with docs/results.

    Raises:
        UserError: results or a page can't be read, or a page lacks a table's place.
    """
    results = read_results(root / _RESULTS)
    pages = {}
    for name, blocks in _BLOCKS.items():
        text = (root / name).read_text(encoding="utf-8")
        for block, table_of in blocks.items():
            text = fill(text, block, table_of(results), name)
        pages[root / name] = text
    return pages


def fill(text: str, block: str, content: str, page: str) -> str:
    """Return ``text`` with ``content`` between the markers of a block.

    Args:
        text: a whole page.
        block: the name in the markers.
        content: Markdown.
        page: the page's name, for messages.

    Raises:
        UserError: the page doesn't have the two markers exactly once.
    """
    place = re.compile(rf"(?<=^<!-- {block} -->\n).*?(?=^<!-- /{block} -->$)", re.MULTILINE | re.DOTALL)
    filled, found = place.subn(lambda _: f"{content}\n", text)
    if found != 1:
        raise UserError(
            f"{page} needs one line <!-- {block} --> and one <!-- /{block} -->; put them where the table goes."
        )
    return filled


def new_results(config: TablesConfig) -> Iterator[Result]:
    """Yield what the folders and files that ``config`` names hold, with today's provenance.

    Raises:
        UserError: one can't be read.
    """
    if config.compare is not None:
        comparison = without_commands(read_comparison(config.compare))
        yield ComparisonResult(title=config.title, provenance=provenance(ROOT), comparison=comparison)
    if config.benchmark is not None:
        yield BenchmarkResult(
            title=config.title, provenance=provenance(ROOT), benchmark=_read_benchmark(config.benchmark)
        )
    if config.families is not None:
        yield FamiliesResult(provenance=provenance(ROOT), families=tuple(read_families(config.families)))
    if config.architectures is not None:
        from scripts.architectures.configs import ARCHITECTURES

        measured = provenance(ROOT)
        yield ArchitecturesResult(
            # The builder reads configurations through it.
            provenance=replace(measured, versions=(*measured.versions, f"transformers {version('transformers')}")),
            cells=read_cells(config.architectures),
            described={one.name: (one.models, one.peculiar) for one in ARCHITECTURES},
        )
    if config.times:
        yield TimesResult(provenance=provenance(ROOT), seconds=config.times)


def _read_benchmark(folder: Path) -> Benchmark:
    file = folder / "benchmark.json"
    with explained(f"{file} can't be read", "pass the --output of scripts.benchmark"):
        found = TypeAdapter(Benchmark).validate_json(file.read_bytes())
    # Command lines hold paths of one machine.
    return replace(found, commands=tuple(replace(command, command="") for command in found.commands))


if __name__ == "__main__":
    run_command(TablesConfig, write_tables, "python -m scripts.write_tables")
