"""Print the support matrix as Markdown: ``python -m scripts.support_matrix RESULTS.jsonl``.

tests/pipelines/test_families.py writes the results, one JSON line a family, into the file that SUPPORT_MATRIX_OUT
names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import TypeAdapter, ValidationError

from stages.commands.options import CommandOptions
from stages.commands.output import Section, unwrapped
from stages.commands.run import run_command
from stages.errors import UserError

_PLACES = {"norm": "norms", "value": "v_proj", "linear": "up_proj", "mul": "Mul nodes"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyResult:
    """What the test of one model family measured."""

    name: str
    models: tuple[str, ...]
    """Released models of this architecture."""
    architecture: str
    peculiar: str
    sites: int
    """Quantized MatMuls of the mixed model."""
    fused: int
    int8_sites: int
    int8_head: bool
    """Whether lm_head is one of them."""
    bits_per_weight: float
    """Codes and scales of the quantized MatMuls."""
    experts_share: float
    """Part of the base's weights that stays inside MoE nodes, 0 to 1."""
    folds: dict[str, int]
    """Input scales by the place that took them: norm, value, linear, or mul where a node remained."""
    reasons: tuple[str, ...]
    """Why Mul nodes remained."""
    against_own_weights: float
    """Relative error of the logits against the base graph with the same dequantized weights: of folding only."""
    divergence_rounded: float
    """Mean KL(base || model) over tokens, nats: INT4 rounded to nearest."""
    divergence_int4: float
    """The same of the default search in INT4."""
    divergence_mixed: float
    """The same of the default search with INT8 where the mixed rule says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixConfig(CommandOptions):
    """Print the support matrix of a test run."""

    results: Annotated[Path, tyro.conf.Positional]
    """The file that SUPPORT_MATRIX_OUT named."""


def read_results(path: Path) -> list[FamilyResult]:
    """Read the results in the file, the last one of each family.

    Raises:
        UserError: the file can't be read or holds something else.
    """
    lines = TypeAdapter(FamilyResult)
    try:
        found = [lines.validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValidationError) as error:
        raise UserError(
            f"RESULTS {path} can't be read ({error}); run tests/pipelines/test_families.py with "
            f"SUPPORT_MATRIX_OUT={path}."
        ) from error
    return list({result.name: result for result in found}.values())


def markdown(results: list[FamilyResult]) -> str:
    """Return the table with one row for each released model."""
    header = [
        "| model | architecture | fused | INT8 | bits a weight | KL: rounding / INT4 / mixed | input scales go into "
        "| error of folding |",
        f"|{' --- |' * 8}",
    ]
    return "\n".join([*header, *(_row(model, result) for result in results for model in result.models)])


def _row(model: str, result: FamilyResult) -> str:
    places = ", ".join(_PLACES[how] for how in _PLACES if result.folds.get(how))
    experts = f"; MoE nodes keep {result.experts_share:.0%} of the weights" if result.experts_share else ""
    divergences = (result.divergence_rounded, result.divergence_int4, result.divergence_mixed)
    cells = (
        model,
        f"{result.architecture}: {result.peculiar}",
        f"{result.fused} of {result.sites}{experts}",
        f"{result.int8_sites}{' with lm_head' if result.int8_head else ''}",
        f"{result.bits_per_weight:.2f}",
        " / ".join(f"{divergence:.3f}" for divergence in divergences),
        places + "".join(f" ({reason})" for reason in result.reasons),
        f"{result.against_own_weights:.0e}",
    )
    return f"| {' | '.join(cells)} |"


def show_matrix(config: MatrixConfig) -> Iterable[Section]:
    """Print the table to standard output."""
    results = read_results(config.results)
    return (Section(name="families", table=unwrapped(markdown(results)), record=results),)


if __name__ == "__main__":
    run_command(MatrixConfig, show_matrix, "python -m scripts.support_matrix")
