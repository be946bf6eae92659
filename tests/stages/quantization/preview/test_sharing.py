"""What several processes take, by sums that are written out here, and by the files of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import genai_quant
from stages.calibration.capture import TextShape
from stages.quantization.preview.sharing import Work, pass_work, shared_run
from tests.stages.quantization.preview.configs import calibration, quantization
from tests.stages.quantization.search.problems import random_layer

GROUPS = [
    replace(random_layer(0, in_features=64, widths=widths).problem.group, activation=f"{widths}")
    for widths in ((32,), (16, 48))
]
TEXT = TextShape(calibration_windows=9, held_out_windows=1, seq_len=128, batch_size=2)
TOKENS = 10 * 128
PRODUCTS = 2 * 64 * (32 + 16 + 48)
GRAMS = 2 * 64 * (64 + 256)


def test_passes_multiply_weights_and_add_up_gram_matrices() -> None:
    plain, weighed = (pass_work(GROUPS, TEXT, 1000, weighs=weighs) for weighs in (False, True))
    assert plain is not None
    assert weighed is not None
    assert (plain.forward, plain.back, plain.streams) == (TOKENS * (PRODUCTS + GRAMS), 0.0, 0)
    assert (weighed.forward, weighed.back) == (plain.forward, TOKENS * (2 * PRODUCTS + GRAMS))
    assert (plain.batches, plain.statistics) == ((5, 1), 1000)
    assert plain.sent == TOKENS * 2 * 64 * 4
    assert pass_work(GROUPS, replace(TEXT, seq_len=None), 1000, weighs=True) is None


def work(*, calibrates: bool = True) -> Work:
    names = [site.name for group in GROUPS for site in group.sites]
    return Work(
        calibration=pass_work(GROUPS, TEXT, 1000, weighs=True) if calibrates else None,
        groups=GROUPS,
        seconds=dict.fromkeys(names, 6.0),
        base=50_000,
        sites=40_000,
        statistics=600,
        spends_budget=False,
        weights=9_000,
        output=8_000,
    )


def test_processes_share_the_search_and_the_forward_passes() -> None:
    alone, both = (shared_run(work(), count, 1e6, 5, 3) for count in (1, 2))
    assert (alone.search_seconds, both.search_seconds) == (6.0 + 2 * 6.0, 2 * 6.0)
    made = work().calibration
    assert made is not None
    assert alone.calibrate_seconds == pytest.approx((made.forward + made.back) / 1e6)
    assert both.calibrate_seconds == pytest.approx((made.forward * 4 / 6 + made.back) / 1e6), "three turns and one"
    many = shared_run(work(), 64, 1e6, 5, 3)
    assert many.calibrate_seconds == pytest.approx((made.forward * 2 / 6 + made.back) / 1e6), "all at once, twice"


def test_every_process_reads_the_base_and_weights_are_read_once_by_the_search() -> None:
    alone, both = (shared_run(work(), count, 1e6, 5, 3) for count in (1, 2))
    assert both.read - alone.read == 50_000
    assert both.written == alone.written == 9_000 + 8_000 + 1000 + TOKENS * 64 * 4
    searching = shared_run(work(calibrates=False), 8, 1e6, 5, 3)
    assert searching.read == 40_000 + 600 + 9_000 + 10_000 + 8_000
    budget = shared_run(replace(work(calibrates=False), spends_budget=True), 8, 1e6, 5, 3)
    assert budget.read - searching.read == 40_600
    assert (alone.sent, both.sent, searching.sent) == (0, TOKENS * 2 * 64 * 4 // 2, 0)
    assert (alone.memory_others, both.memory_others, both.memory_first) == (None, 3, 5)


def test_the_cache_is_as_large_as_foreseen(tiny_model: Path, tmp_path: Path) -> None:
    text = replace(calibration(tiny_model, tmp_path), token_weights="auto")
    found = genai_quant.preview(quantization(tiny_model, tmp_path, "awq_lite"), text)
    assert [run.processes for run in found.sharing] == [1, 8, 64]
    assert found.disk.meanwhile == 12 * 32 * 64 * 4 * 3, "two layers and the head read a stream"
    genai_quant.calibrate(text)
    made = sum(file.stat().st_size for file in text.cache_path.glob("*.safetensors"))
    small = 4096 * len(list(text.cache_path.iterdir()))  # headers, tokens, means and weights of tokens and channels
    assert found.disk.calibration <= made <= found.disk.calibration + small
