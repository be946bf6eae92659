"""The support matrix shows the last result of each family, one row a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from scripts.write_tables.support_matrix import FamilyResult, markdown, read_results
from stages.errors import UserError

RESULT = FamilyResult(
    name="nemotron",
    models=("Nemotron-Mini 4B", "Minitron 8B"),
    architecture="Nemotron",
    peculiar="relu(up)^2",
    sites=8,
    fused=8,
    folds={"norm": 4, "value": 2, "mul": 2},
    reasons=("it comes from Pow",),
    against_own_weights=3.2e-7,
    int8_sites=4,
    int8_head=False,
    bits_per_weight=5.4321,
    experts_share=0.0,
    divergence_rounded=0.12345,
    divergence_int4=0.06,
    divergence_mixed=0.03,
)


def test_the_last_line_of_a_family_counts_and_each_model_has_a_row(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    adapter = TypeAdapter(FamilyResult)
    lines = [replace(RESULT, fused=7), replace(RESULT, name="qwen", models=("Qwen",), folds={"norm": 1}), RESULT]
    file.write_text("\n".join(adapter.dump_json(line).decode() for line in lines) + "\n")
    rows = markdown(read_results(file)).splitlines()[2:]
    assert rows[0] == (
        "| Nemotron-Mini 4B | Nemotron: relu(up)^2 | 8 of 8 | 4 | 5.43 | 0.123 / 0.060 / 0.030 "
        "| norms, v_proj, Mul nodes (it comes from Pow) | 3e-07 |"
    )
    assert [row.split(" | ")[0] for row in rows] == ["| Nemotron-Mini 4B", "| Minitron 8B", "| Qwen"]


def test_what_stays_in_moe_nodes_and_an_int8_head_are_said() -> None:
    *_, row = markdown([replace(RESULT, models=("gpt-oss",), experts_share=0.591, int8_head=True)]).splitlines()
    assert "| 8 of 8; MoE nodes keep 59% of the weights | 4 with lm_head |" in row


def test_header_and_rows_have_as_many_cells() -> None:
    assert len({line.count("|") for line in markdown([RESULT]).splitlines()}) == 1


@pytest.mark.parametrize("content", [None, "not json"])
def test_a_file_that_holds_no_results_is_named(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "results.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match="SUPPORT_MATRIX_OUT"):
        read_results(file)
