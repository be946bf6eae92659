"""Memory decides where the graph is cut, and partitions give the statistics of one pass."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace

import onnxruntime as ort
import psutil
import pytest
import torch
from safetensors.torch import load_file

from stages.calibration.cache import open_cache
from stages.calibration.capture import TextShape, fold_in, memory_limit, partition_bytes
from stages.calibration.run import calibrate
from stages.calibration.statistics import StatisticsAccumulator, StatisticsSize
from stages.calibration.summary import PassSummary
from stages.commands.calibrate_options import PART_OF_FREE_MEMORY, CalibrateConfig
from stages.errors import OptionError, UserError
from stages.model.directory import locate_model
from stages.model.load import fingerprint_model, load_graph
from stages.model.sites import find_groups
from stages.runtime.tap import ActivationTap
from tests.support.full_disk import full_after

CPU = torch.device("cpu")


def capture(base: Path, text: Path, cache: Path, max_memory: str = "1GB") -> PassSummary:
    """Calibrate on one window that is held out and eleven others, and return how it went."""
    config = CalibrateConfig(
        onnx_path=base, dataset=str(text), calib_size=12, seq_len=32, batch_size=5, calibration_eps="cpu",
        max_memory=max_memory, cache_dir=cache, token_weights="none",
    )  # fmt: skip
    made = calibrate(config).made
    assert made is not None
    return made


def test_the_option_is_the_limit_and_must_be_a_size() -> None:
    assert memory_limit("3MB", CPU, 1) == 3_000_000
    with pytest.raises(OptionError, match="--max_memory 'much'"):
        memory_limit("much", CPU, 1)


def test_processes_of_a_machine_share_a_part_of_its_free_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert memory_limit(None, CPU, 1) == 1000 * PART_OF_FREE_MEMORY
    assert memory_limit(None, CPU, 2) == 500 * PART_OF_FREE_MEMORY


def test_on_cuda_the_smaller_free_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100, 2000))
    assert memory_limit(None, torch.device("cuda"), 1) == 100 * PART_OF_FREE_MEMORY


def test_an_activation_costs_its_share_of_the_statistics_and_a_batch(
    tiny_model: Path,
) -> None:
    groups = find_groups(load_graph(locate_model(tiny_model)))
    text = TextShape(calibration_windows=10, held_out_windows=1, seq_len=32, batch_size=2)
    alone, shared = (partition_bytes(groups, text, processes) for processes in (1, 2))
    # 64 channels: a Gram matrix of 320 tokens, 32 tokens' own rows, and a batch of 64 tokens, all float32.
    gram, rows, batch = 64 * 64 * 4, 32 * 64 * 4, 64 * 64 * 4
    first = groups[0].activation
    assert (alone[first], shared[first]) == (gram + rows + batch, (gram + rows) // 2 + batch)
    assert set(alone) == {group.activation for group in groups}


def test_batches_are_added_up_in_order() -> None:
    size = StatisticsSize(in_features=16, tokens=6, itemsize=4)  # so few that rows are kept
    sums = {name: StatisticsAccumulator(name, size, CPU) for name in ("a", "b")}
    batches = {"a": [1.0, 2.0, 3.0], "b": [6.0, 5.0, 4.0]}
    fold_in(sums, {name: [torch.full((2, 16), value) for value in batches[name]] for name in sums}, CPU)
    for name, accumulator in sums.items():
        rows = accumulator.finish().rows
        assert rows is not None
        assert rows[::2, 0].tolist() == batches[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        ("tiny_model", 1e-5),
        # Fused or not, float16 results differ by their rounding, 2^-11.
        ("tiny_model_dml", 4e-3),
        ("tiny_model_bf16", 1e-5),
    ],
)
def test_partitions_give_the_statistics_of_the_whole(
    kind: str,
    tolerance: float,
    request: pytest.FixtureRequest,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = request.getfixturevalue(kind)
    assert capture(base, tiny_text, tmp_path / "whole").partitions == 1
    runs: list[ActivationTap] = []
    original = ActivationTap.run

    def counted(self: ActivationTap, tokens: object, boundary: object) -> object:
        runs.append(self)
        return original(self, tokens, boundary)

    monkeypatch.setattr(ActivationTap, "run", counted)
    partitions = capture(base, tiny_text, tmp_path / "parts", "300kB").partitions
    assert partitions >= 3
    assert len({id(tap) for tap in runs}) == partitions
    # One window held out and eleven to search with, five at a time: four batches for each partition.
    assert len(runs) == 4 * partitions
    whole, in_parts = ({path.name for path in (tmp_path / name).iterdir()} for name in ("whole", "parts"))
    assert in_parts == whole
    fingerprint = fingerprint_model(locate_model(base))
    caches = [open_cache(tmp_path / name, fingerprint) for name in ("whole", "parts")]
    for group in find_groups(load_graph(locate_model(base))):
        expected, found = (cache.read(group.activation) for cache in caches)
        for part in ("calibration", "held_out"):
            one, other = getattr(expected, part), getattr(found, part)
            assert one.num_tokens == other.num_tokens
            size = one.abs_mean.abs().max()
            torch.testing.assert_close(other.abs_mean, one.abs_mean, rtol=0, atol=float(tolerance * size))
            for kept, again in ((one.gram, other.gram), (one.rows, other.rows)):
                assert (kept is None) == (again is None)
                if kept is not None and again is not None:
                    torch.testing.assert_close(again, kept, rtol=0, atol=float(tolerance * kept.abs().max()))


@pytest.mark.slow
def test_no_session_outlives_its_partition(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[weakref.ref[ort.InferenceSession]] = []
    alive: list[int] = []
    original = ActivationTap.run

    def watched(self: ActivationTap, tokens: object, boundary: object) -> object:
        if not any(session() is self.feeds.session for session in opened):
            opened.append(weakref.ref(self.feeds.session))
        gc.collect()
        alive.append(sum(session() is not None for session in opened))
        return original(self, tokens, boundary)

    monkeypatch.setattr(ActivationTap, "run", watched)
    gc.freeze()  # only what is made from here on is looked through each time
    capture(tiny_model, tiny_text, tmp_path / "parts", "300kB")
    assert len(opened) >= 3
    assert set(alive) == {1}


def test_a_disk_that_is_too_small_for_boundary_values_is_named(
    tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    # The tokens take 3 kB, and 5 windows of 32 tokens and 64 channels 40 kB.
    words = rf"hands to the next can't be written to {tmp_path} \(.*\); free space there, .* or raise --max_memory"
    with full_after(6000), pytest.raises(UserError, match=words):
        capture(tiny_model, tiny_text, tmp_path / "parts", "150kB")
    assert list(tmp_path.iterdir()) == []


def test_the_smaller_form_of_each_statistics_is_kept(tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    """64 and 96 channels; 352 tokens to search with, so Gram matrices; 32 held out, which are kept as rows."""
    assert capture(tiny_model, tiny_text, tmp_path / "cache").as_rows == 0
    file = load_file(tmp_path / "cache" / "0000.safetensors")
    assert file["calibration.gram_triangle"].shape == (32, 65)
    assert file["held_out.rows"].shape == (32, 64)
