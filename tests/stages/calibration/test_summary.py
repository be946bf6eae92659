"""Programs find all that a calibration holds under fixed names, and people find it in the table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from pydantic_core import to_json
from rich.console import Console

from stages.calibration.cache import CacheKey
from stages.calibration.summary import CalibrationSummary, PassSummary, calibration_section

MADE = PassSummary(
    tokenizer="folder",
    matmuls=12,
    as_rows=2,
    partitions=3,
    widened=True,
    unused=(("cuda", "there is none"),),
    seconds=1.25,
)
SUMMARY = CalibrationSummary(
    cache=Path("a [bold] folder"),
    bytes=5_000_000,
    key=CacheKey(
        model_fingerprint="m",
        token_fingerprint="t",
        source="words",
        calibration_windows=9,
        held_out_windows=1,
        seq_len=8,
        providers=("CPUExecutionProvider",),
        token_weights="none",
    ),
    activations=7,
    channels=16,
    made=MADE,
)


def table(summary: CalibrationSummary) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(calibration_section(summary).table)
    return captured.get()


def test_the_record_is_flat_and_without_fingerprints() -> None:
    section = calibration_section(SUMMARY)
    assert section.name == "calibration"
    found = json.loads(to_json(section.record))
    made = found.pop("made")
    assert made["partitions"] == 3
    assert found == {
        "cache": "a [bold] folder",
        "bytes": 5_000_000,
        "expert_rows": False,
        "key_values": False,
        "kv_scales": None,
        "source": "words",
        "calibration_windows": 9,
        "held_out_windows": 1,
        "seq_len": 8,
        "activations": 7,
        "channels": 16,
        "providers": ["CPUExecutionProvider"],
        "token_weights": "none",
    }


def test_the_table_says_how_the_model_ran() -> None:
    printed = table(SUMMARY)
    for words in (
        "a [bold] folder (5 MB)",
        "9 to search with + 1 held out, 8 tokens each",
        "4.5 tokens for each of the 16 input channels of the widest MatMul",
        "7 activations of 12 MatMuls",
        "5 Gram matrices (packed triangles), 2 as the tokens' own rows",
        "the model ran in 3 parts",
        "cuda: there is none",
    ):
        assert words in printed


def test_a_cache_that_was_there_has_no_run_to_tell_of() -> None:
    printed = table(replace(SUMMARY, made=None))
    assert "7 activations" in printed
    assert "MatMuls" not in printed
    assert "seconds" not in printed
