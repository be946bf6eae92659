"""What several processes take, by sums that are written out here, and by the files of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import genai_quant
from stages.calibration.capture import TextShape
from stages.quantization.preview import sharing
from stages.quantization.preview.sharing import Work, multiply_rate, pass_work, shared_run, writing_work
from stages.quantization.preview.table import SharedRun
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
    attention = 4 * 128 * 64
    assert (plain.forward, plain.back, plain.streams) == (TOKENS * (PRODUCTS + GRAMS + attention), 0.0, 0)
    others = 400 * (64 + 32 + 64 + 16 + 48)
    assert weighed.forward == plain.forward
    assert weighed.back == TOKENS * (2 * PRODUCTS + GRAMS + 3.5 * attention + others)
    assert (plain.batches, plain.statistics) == ((5, 1), 1000)
    assert (plain.sent, weighed.sent) == (TOKENS * 2 * 64 * 4, 2 * TOKENS * 2 * 64 * 4)
    assert pass_work(GROUPS, replace(TEXT, seq_len=None), 1000, weighs=True) is None


def test_text_of_its_own_is_written_by_one_process_before_the_passes() -> None:
    layer = replace(GROUPS[0], sites=(replace(GROUPS[0].sites[0], name="/model/layers.0/attn/q_proj/MatMul"),))
    head = replace(GROUPS[1], sites=(replace(GROUPS[1].sites[0], name="/lm_head/MatMul"),))
    token = 1.3 * 2 * 64 * (32 + 16) + 13 * 4 * 64 * 64 + 700 * 16
    assert writing_work([layer, head], 3, 128) == pytest.approx(3 * 128 * token)
    passes = pass_work(GROUPS, TEXT, 1000, weighs=True, own_windows=3)
    assert passes is not None
    assert passes.writing == writing_work(GROUPS, 3, 128)
    for count in (1, 64):
        without, written = (
            shared_run(replace(work(), calibration=made), count, 1e6, 5, 3).calibrate_seconds
            for made in (replace(passes, writing=0.0), passes)
        )
        assert without is not None
        assert written == pytest.approx(without + passes.writing / 1e6)


def work(*, calibrates: bool = True) -> Work:
    names = [site.name for group in GROUPS for site in group.sites]
    return Work(
        calibration=pass_work(GROUPS, TEXT, 1000, weighs=True) if calibrates else None,
        groups=GROUPS,
        algorithm="awq_lite",
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
    assert both.calibrate_seconds == pytest.approx((made.forward * 4 / 6 + made.back * 3 / 6) / 1e6), "three and one"
    many = shared_run(work(), 64, 1e6, 5, 3)
    assert many.calibrate_seconds == pytest.approx((made.forward * 2 / 6 + made.back / 6) / 1e6), "all at once, twice"


@pytest.mark.parametrize(("width", "timed", "times"), [(64, 256, 4), (300, 300, 1), (4096, 512, 1)])
def test_the_rate_is_that_of_products_as_wide_as_the_model(
    width: int, timed: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, ...]] = []
    matmul = torch.Tensor.__matmul__

    def counted(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        made.append((*left.shape, *right.shape))
        return matmul(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", counted)
    monkeypatch.setattr(sharing, "_WIDEST", 512)
    monkeypatch.setattr(sharing, "seconds_of", lambda work, _: (made.clear(), work(), 2.0)[-1])
    rate = multiply_rate(torch.device("cpu"), width)
    assert made == [(512, timed, timed, timed)] * times
    assert rate == 2 * times * 512 * timed * timed / 2.0


def test_only_the_way_back_runs_the_head_and_draws_labels() -> None:
    site = replace(GROUPS[1].sites[0], name="/lm_head/MatMul")
    groups = [replace(GROUPS[0], sites=(replace(GROUPS[0].sites[0], name="/model/layers.0/attn/q_proj/MatMul"),))]
    head = replace(GROUPS[1], sites=(site,))
    without, whole = (pass_work(each, TEXT, 1000, weighs=True) for each in (groups, [*groups, head]))
    assert without is not None
    assert whole is not None
    grams = 64 * (64 + 256)
    assert whole.forward - without.forward == pytest.approx(TOKENS * grams)
    # 700 for each entry of the vocabulary, 16 here.
    more = 2 * 2 * 64 * 16 + grams + 400 * (64 + 16) + 700 * 16
    assert whole.back - without.back == pytest.approx(TOKENS * more)
    assert (without.streams, whole.streams) == (TOKENS * 64 * 4 * 2,) * 2, "what enters one layer and leaves it"


def test_every_process_reads_the_base_and_weights_are_read_once_by_the_search() -> None:
    alone, both = (shared_run(work(), count, 1e6, 5, 3) for count in (1, 2))
    assert both.read - alone.read == 50_000 + 40_000, "the way back reads the weights again"
    assert both.written == alone.written == 9_000 + 8_000 + 1000 + 2 * TOKENS * 64 * 4
    searching = shared_run(work(calibrates=False), 8, 1e6, 5, 3)
    assert searching.read == 40_000 + 600 + 9_000 + 10_000 + 8_000
    budget = shared_run(replace(work(calibrates=False), spends_budget=True), 8, 1e6, 5, 3)
    assert budget.read - searching.read == 40_600
    assert (alone.sent, both.sent, searching.sent) == (0, 2 * TOKENS * 2 * 64 * 4 // 2, 0)
    assert (alone.memory_others, both.memory_others, both.memory_first) == (None, 3, 5)


def test_what_signround_starts_from_is_shared(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = list[str]()

    def noted(work: Work, count: int, rate: float | None, first: int, others: int) -> SharedRun:
        shared.append(work.algorithm)
        return shared_run(work, count, rate, first, others)

    monkeypatch.setattr("stages.quantization.preview.stages.shared_run", noted)
    config = replace(quantization(tiny_model, tmp_path, "signround"), signround_start="gptq")
    genai_quant.preview(config, calibration(tiny_model, tmp_path))
    assert set(shared) == {"gptq"}


def test_the_cache_is_as_large_as_foreseen(tiny_model: Path, tmp_path: Path) -> None:
    text = replace(calibration(tiny_model, tmp_path), token_weights="auto")
    found = genai_quant.preview(quantization(tiny_model, tmp_path, "awq_lite"), text)
    assert [run.processes for run in found.sharing] == [1, 8, 64]
    assert found.disk.meanwhile == 12 * 32 * 64 * 4 * 3, "two layers and the head read a stream"
    genai_quant.calibrate(text)
    made = sum(file.stat().st_size for file in text.cache_path.glob("*.safetensors"))
    small = 4096 * len(list(text.cache_path.iterdir()))  # headers, tokens, means and weights of tokens and channels
    assert found.disk.calibration <= made <= found.disk.calibration + small
