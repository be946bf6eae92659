"""Make the table of supported model families from the results of tests/pipelines/models/test_families.py.

The test writes one JSON line a family into the file that SUPPORT_MATRIX_OUT names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

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
    """Relative error of the logits against the base graph with the same dequantized weights: folding alone."""
    divergence_rounded: float
    """Mean KL(base || model) over tokens, nats: INT4 rounded to nearest."""
    divergence_int4: float
    """The same of the default search in INT4."""
    divergence_mixed: float
    """The same of the default search with INT8 where the mixed rule says."""


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
            f"--families {path} can't be read ({error}); run tests/pipelines/models/test_families.py with "
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
