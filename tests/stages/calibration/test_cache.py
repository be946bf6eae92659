import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.calibration.cache import CacheKey, CalibrationCache, find_cache, new_cache, open_cache
from stages.calibration.statistics import scaled
from stages.errors import CacheMismatch, UserError
from stages.quantization.search.objective import full_gram
from stages.records.results import ActivationStats, SearchStats, TokenWeights
from tests.stages.quantization.search.problems import gram_stats, row_stats
from tests.support.full_disk import full_after

KEY = CacheKey(
    model_fingerprint="m" * 64,
    token_fingerprint="t" * 64,
    source="words",
    calibration_windows=3,
    held_out_windows=1,
    seq_len=8,
    providers=("CPUExecutionProvider",),
    token_weights="none",
)
STATS = ActivationStats(calibration=gram_stats(torch.randn(30, 6)), held_out=row_stats(torch.randn(4, 6)))


def _write(folder: Path, key: CacheKey = KEY, *, overwrite: bool = False) -> CalibrationCache:
    with new_cache(folder, key, ["/x"], overwrite=overwrite) as writer:
        writer.write("/x", STATS)
        writer.write_tokens(np.zeros((3, 8), np.int64), np.ones((1, 8), np.int64))
    found = find_cache(folder)
    assert found is not None
    return found


def test_statistics_come_back_exactly(tmp_path: Path) -> None:
    stats = _write(tmp_path / "cache").read("/x")
    assert STATS.calibration.gram is not None
    assert stats.calibration.gram is not None
    # A product may differ from its mirror image in the last bit; what lies below the diagonal is kept.
    assert torch.equal(stats.calibration.gram.tril(), STATS.calibration.gram.tril())
    assert torch.equal(stats.calibration.gram, stats.calibration.gram.T)
    assert torch.equal(stats.calibration.abs_mean, STATS.calibration.abs_mean)
    assert stats.calibration.num_tokens == 30
    assert stats.held_out.gram is None
    assert stats.held_out.rows is not None
    assert STATS.held_out.rows is not None
    assert torch.equal(stats.held_out.rows, STATS.held_out.rows)


def test_what_a_failed_block_wrote_is_there_the_next_time(tmp_path: Path) -> None:
    def stopped_half_way() -> None:
        with new_cache(tmp_path / "cache", KEY, ["/x"], overwrite=False) as writer:
            writer.write("/x", STATS)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped_half_way()
    assert find_cache(tmp_path / "cache") is None
    with new_cache(tmp_path / "cache", KEY, ["/x"], overwrite=False) as writer:
        assert (writer.folder / writer.files["/x"]).is_file()


def test_a_full_disk_is_a_message_and_leaves_no_cache(tmp_path: Path) -> None:
    words = rf"can't be written to {tmp_path} \(.*File too large.*\); free space there, or .*--cache_dir"
    with full_after(100), pytest.raises(UserError, match=words):
        _write(tmp_path / "cache")
    assert find_cache(tmp_path / "cache") is None


def test_an_existing_cache_is_replaced_only_when_asked(tmp_path: Path) -> None:
    _write(tmp_path / "cache")
    with pytest.raises(UserError, match="already exists"):
        _write(tmp_path / "cache", replace(KEY, seq_len=9))
    assert _write(tmp_path / "cache", replace(KEY, seq_len=9), overwrite=True).manifest.key.seq_len == 9
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_another_models_cache_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "cache")
    with pytest.raises(CacheMismatch, match="made from another model"):
        open_cache(tmp_path / "cache", "other")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"seq_len": 9}, "windows of 8 tokens), and .* windows of 9 tokens) is asked for"),
        ({"token_fingerprint": "x"}, "other text of"),
        ({"model_fingerprint": "x", "seq_len": 9}, "made from another model"),
        ({"providers": ("Other",)}, "this run has Other"),
    ],
)
def test_difference_is_in_words(change: dict[str, Any], words: str) -> None:
    assert re.search(words.replace(")", r"\)"), KEY.difference(replace(KEY, **change)))
    assert bool(KEY.difference(replace(KEY, **change))) == bool(words)


@pytest.mark.parametrize("earlier", [1, 2])
def test_caches_of_earlier_versions_are_refused_with_the_reason(tmp_path: Path, earlier: int) -> None:
    cache = _write(tmp_path / "cache")
    manifest = (cache.folder / "manifest.json").read_text()
    (cache.folder / "manifest.json").write_text(manifest.replace('"format": 3', f'"format": {earlier}'))
    with pytest.raises(CacheMismatch, match="count all tokens alike; run stages"):
        find_cache(cache.folder)


@pytest.mark.parametrize("content", [b"{", b'{"format": 3}', b'{"format": 99, "key": 3, "files": {}}'])
def test_a_damaged_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    cache = _write(tmp_path / "cache")
    (cache.folder / "manifest.json").write_bytes(content)
    with pytest.raises(CacheMismatch, match="another version or is damaged"):
        find_cache(cache.folder)


def test_a_truncated_statistics_file_is_refused(tmp_path: Path) -> None:
    cache = _write(tmp_path / "cache")
    file = cache.folder / cache.manifest.files["/x"]
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(CacheMismatch, match="is missing or damaged"):
        cache.read("/x")


def test_a_cache_that_another_run_replaces_is_not_mixed_with_what_was_read(tmp_path: Path) -> None:
    cache = _write(tmp_path / "cache")
    cache.read("/x")
    _write(tmp_path / "cache", replace(KEY, seq_len=9), overwrite=True)
    for read in (cache.read, cache.read_for_search):
        with pytest.raises(CacheMismatch, match="cache was replaced or removed while it was read; run"):
            read("/x")


def test_no_cache_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(CacheMismatch, match=r"run stages\.calibrate first"):
        open_cache(tmp_path, "m")


def test_a_search_reads_weighted_statistics_where_there_are_some(tmp_path: Path) -> None:
    channels = {"/a": torch.tensor([0.5, 1.5])}
    weights = TokenWeights(calibration=torch.rand(3, 8), held_out=torch.rand(1, 8))
    with new_cache(tmp_path / "cache", KEY, ["/x", "/y"], overwrite=False) as writer:
        writer.write("/x", STATS)
        writer.write("/y", STATS)
        twice = ActivationStats(calibration=scaled(STATS.calibration, 4.0), held_out=scaled(STATS.held_out, 4.0))
        writer.write_weighted("/x", SearchStats(tokens=twice, channel_weights=channels, token_weights=weights))
    cache = find_cache(tmp_path / "cache")
    assert cache is not None
    found, plain = cache.read_for_search("/x"), cache.read_for_search("/y")
    torch.testing.assert_close(full_gram(found.tokens.calibration), 4 * full_gram(STATS.calibration))
    torch.testing.assert_close(full_gram(found.tokens.held_out), 4 * full_gram(STATS.held_out))
    assert found.token_weights is not None
    assert torch.equal(found.token_weights.held_out, weights.held_out)
    assert torch.equal(found.channel_weights["/a"], channels["/a"])
    torch.testing.assert_close(full_gram(plain.tokens.calibration), full_gram(STATS.calibration))
    assert plain.token_weights is None
