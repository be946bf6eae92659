"""The summary says in a few lines what a person needs, however many sites there are."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from export.fold import FoldOutcome
from export.forms.embedding import TableOutcome
from export.run import ExportSummary
from export.summary import export_table
from stages.records.results import DataFileUse, SiteError, TableError, UnfusedSite, VerifyReport
from stages.records.sites import UnquantizedWeights
from tests.support.embeddings import plan_of


def mul(reason: str) -> FoldOutcome:
    return FoldOutcome(activation="x", sites=("s",), how="mul", reason=reason)


SUMMARY = ExportSummary(
    onnx_file=Path("out/model.onnx"),
    bytes_before=400_000_000,
    bytes_after=100_000_000,
    folds=(
        FoldOutcome(activation="a", sites=("q", "k"), how="norm"),
        FoldOutcome(activation="b", sites=("d",), how="none"),
        *[mul("the activation is also read by Softmax '/x/[a]'")] * 40,
    ),
    kept=(("lm_head", "excluded by --exclude"),),
    report=VerifyReport(
        sites=43,
        data=DataFileUse(file_bytes=5000, referenced_bytes=4000, padding_bytes=1000),
        fused=42,
        unfused=(UnfusedSite(site="q", reason="block size 8 is not a power of two from 16 to 256"),),
        worst_exact=SiteError(site="up", exact=2e-7, default=1e-3),
        worst_default=SiteError(site="down", exact=1e-7, default=6e-3),
    ),
)


def text(summary: ExportSummary) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(export_table(summary))
    return console.file.getvalue()


def test_figures_and_reasons_are_counted() -> None:
    shown = text(SUMMARY)
    for part in (
        "400.0 MB -> 100.0 MB (4.00x smaller)",
        "1 in norms, 40 as Mul nodes",
        "40 x the activation is also read by Softmax '/x/[a]'",
        "1 x excluded by --exclude",
        "42 of 43 sites run as MatMulNBits",
        "block size 8 is not a power of two from 16 to 256: q",
        "2.0e-07 at accuracy level 1 (up)",
        "6.0e-03 at the runtime's default level (down)",
        "5,000 bytes: 4,000 in tensors, 1,000 padding",
    ):
        assert part in shown
    assert len(shown.splitlines()) < 20


def test_an_embedding_says_what_it_does_to_the_size() -> None:
    outcome = TableOutcome(plan=plan_of(1000, 64), bytes_before=113_000_000, bytes_after=16_000_000, still_read_by=())
    assert "INT4 block 16, 113.0 MB -> 16.0 MB" in text(replace(SUMMARY, tables=(outcome,)))
    shared = replace(outcome, plan=plan_of(1000, 64, bits=8, shared_with="/lm_head/MatMul"))
    shown = " ".join(text(replace(SUMMARY, tables=(shared,))).split())
    assert "INT8 block 16, one table of 16.0 MB for it and /lm_head/MatMul in place of 113.0 MB" in shown
    tied = replace(outcome, still_read_by=("/lm_head/MatMul",), plan=plan_of(1000, 64, form="dq"))
    shown = text(replace(SUMMARY, tables=(tied,)))
    assert "16.0 MB beside the original's 113.0 MB, which stays because /lm_head/MatMul reads it too" in shown
    assert "dequantizes this whole table for every token" in shown
    assert SUMMARY.report is not None
    measured = replace(SUMMARY.report, tables=(TableError(table="embed", error=4e-8),))
    assert "4.0e-08 (embed)" in text(replace(SUMMARY, report=measured))


def test_weights_that_nothing_reaches_are_named_with_their_size() -> None:
    experts = UnquantizedWeights(
        op_type="MoE", weights=("fc1", "fc2", "fc3"), num_bytes=31_000_000, share=0.923, reason="experts, because"
    )
    shown = text(replace(SUMMARY, unreached=(experts,)))
    assert "MoE: fc1 and 2 more (31.0 MB, 92% of the base's weights): experts, because" in shown
    assert "1 x excluded by --exclude" in shown


def test_unfused_sites_are_named_and_cut_short() -> None:
    assert SUMMARY.report is not None
    unfused = tuple(UnfusedSite(site=f"site{index}", reason="why") for index in range(5))
    shown = text(replace(SUMMARY, report=replace(SUMMARY.report, unfused=unfused)))
    assert "why: site0, site1, site2 and 2 more" in shown


def test_many_reasons_are_cut_short() -> None:
    shown = text(replace(SUMMARY, folds=tuple(mul(f"reason {index}") for index in range(9))))
    assert shown.count("reason ") == 3
    assert "and 6 more reasons" in shown


def test_what_was_not_verified_is_said() -> None:
    assert "--verify off" in text(replace(SUMMARY, report=None))
    assert SUMMARY.report is not None
    skipped = replace(SUMMARY.report, fused=None, skipped=("fusion: no kernel",))
    shown = text(replace(SUMMARY, report=skipped))
    assert "fusion: no kernel" in shown
    assert "MatMulNBits" not in shown


def test_an_output_that_grew_says_so() -> None:
    assert "1.25x larger" in text(replace(SUMMARY, bytes_after=500_000_000))
