"""An expert's statistics are those of the rows that the router sent it, and of some of its whole layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from stages.calibration.cache import CacheKey, CalibrationCache, find_cache, new_cache
from stages.calibration.capture import PRIOR
from stages.calibration.expert_statistics import ExpertStatistics, seen_by
from stages.calibration.row_files import RowsWriter
from stages.errors import CacheMismatch
from stages.model.weights import read_weight, to_torch
from stages.records.results import TokenStats
from stages.records.sites import Projection
from stages.runtime.blocks.experts import activated, route
from tests.support.mixtures import EXPERTS, HIDDEN, INNER, mixture, the_layer

CPU = torch.device("cpu")
COUNTS = {"calibration": 200, "held_out": 50}
KEY = CacheKey(
    model_fingerprint="0", token_fingerprint="0", source="random", calibration_windows=20, held_out_windows=5,
    seq_len=10, providers=("CPUExecutionProvider",), token_weights="none", expert_rows=True,
)  # fmt: skip
NOBODY = 4
"""An expert that the scores never choose."""


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, torch.Tensor]]:
    rng = np.random.default_rng(1)
    x = {part: torch.from_numpy(rng.standard_normal((n, HIDDEN)).astype(np.float32)) for part, n in COUNTS.items()}
    scores = {
        part: torch.from_numpy(rng.standard_normal((n, EXPERTS)).astype(np.float32)) for part, n in COUNTS.items()
    }
    for part in scores.values():
        part[:, NOBODY] = -100
    return {"x": x, "scores": scores}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, rows: dict[str, dict[str, torch.Tensor]]) -> CalibrationCache:
    folder = tmp_path_factory.mktemp("experts") / "cache"
    with new_cache(folder, KEY, [], list(rows), overwrite=False) as writer:
        for name, parts in rows.items():
            file = RowsWriter(writer.folder / writer.rows[name], name, COUNTS)
            for part, numbers in parts.items():
                file.add(part, numbers)
    found = find_cache(folder)
    assert found is not None
    return found


def gram(stats: TokenStats) -> torch.Tensor:
    if stats.gram is not None:
        return stats.gram
    assert stats.rows is not None
    return stats.rows.T @ stats.rows / stats.num_tokens


@pytest.mark.parametrize("expert", range(EXPERTS))
def test_each_matrix_gets_the_gram_matrix_of_its_own_rows_and_the_layers(
    expert: int, cache: CalibrationCache, rows: dict[str, dict[str, torch.Tensor]]
) -> None:
    model = mixture().model()
    layer = the_layer(model)
    statistics = ExpertStatistics(model, [layer], cache, CPU)
    fc1, fc2 = layer.sites[2 * expert : 2 * expert + 2]
    bias = model.graph.initializers["gate_up.bias"].const_value
    assert bias is not None
    for site, inputs in ((fc1, HIDDEN), (fc2, INNER)):
        found = statistics.read(site.activation)
        for part, stats in (("calibration", found.tokens.calibration), ("held_out", found.tokens.held_out)):
            x, routed = rows["x"][part], route(rows["scores"][part], layer.routing)
            read = x
            if site is fc2:
                hidden = x @ read_weight(model, fc1, CPU).T + to_torch(bias.numpy()[expert])
                read = activated(hidden, layer.activation)
            total, own = torch.zeros(inputs, inputs), 0
            for token in range(COUNTS[part]):
                for place in range(2):
                    if routed.experts[token, place] == expert:
                        total += routed.weights[token, place] ** 2 * torch.outer(read[token], read[token])
                        own += 1
            seen = seen_by(rows["scores"][part].numpy(), layer, site, None)
            assert seen.own == own
            usual = routed.weights.square().mean()
            drawn = seen.tokens[own:]
            assert len(drawn) == len(set(drawn.tolist())) == min(inputs // PRIOR, COUNTS[part])
            total += usual * read[drawn].T @ read[drawn]
            assert stats.num_tokens == own + len(drawn)
            assert torch.allclose(gram(stats), total / stats.num_tokens, rtol=1e-4, atol=1e-5)
        assert (found.own_tokens == 0) == (expert == NOBODY)


@pytest.mark.parametrize("projection", ["fc1", "fc2"])
def test_tokens_weigh_what_the_end_loss_says_and_the_whole_is_in_nats(
    projection: Projection, rows: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    model = mixture().model()
    layer = the_layer(model)
    routed = {part: route(scores, layer.routing) for part, scores in rows["scores"].items()}
    generator = torch.Generator().manual_seed(2)
    counts = {
        part: torch.zeros(COUNTS[part], EXPERTS).scatter(
            1, each.experts, torch.rand(each.experts.shape, generator=generator)
        )
        for part, each in routed.items()
    }
    sites = layer.of(projection)
    channels = {"calibration": torch.rand(EXPERTS, sites[0].out_features, generator=generator)}
    channels["calibration"][NOBODY] = 0
    kept = {**rows, layer.token_weights(projection): counts, layer.channel_weights(projection): channels}
    with new_cache(tmp_path / "cache", KEY, [], list(kept), overwrite=False) as writer:
        for name, parts in kept.items():
            file = RowsWriter(
                writer.folder / writer.rows[name], name, {part: len(each) for part, each in parts.items()}
            )
            for part, numbers in parts.items():
                file.add(part, numbers)
    cache = find_cache(tmp_path / "cache")
    assert cache is not None
    statistics = ExpertStatistics(model, [layer], cache, CPU)
    for index, site in enumerate(sites):
        found = statistics.read(site.activation)
        seen = seen_by(rows["scores"]["calibration"].numpy(), layer, site, counts["calibration"].numpy())
        if index == NOBODY:
            assert (seen.own, float(found.channel_weights[site.name].sum())) == (0, 0)
            assert bool(found.tokens.calibration.abs_mean.any()), "those of the whole layer are there"
            continue
        own = counts["calibration"][:, index][counts["calibration"][:, index] > 0]
        assert torch.equal(seen.weights[: seen.own], own)
        prior = torch.tensor([float(counts["calibration"][token].sum()) / 2 for token in seen.tokens[seen.own :]])
        torch.testing.assert_close(seen.weights[seen.own :], prior)
        wanted = channels["calibration"][index]
        torch.testing.assert_close(found.channel_weights[site.name], wanted / wanted.mean())
        if projection == "fc1":
            x = rows["x"]["calibration"][seen.tokens]
            total = (x * seen.weights[:, None]).T @ x / len(x) / own.mean() * wanted.mean()
            torch.testing.assert_close(gram(found.tokens.calibration), total, rtol=1e-4, atol=1e-6)


def test_a_cache_without_the_rows_is_refused_with_what_to_do(cache: CalibrationCache) -> None:
    model: ir.Model = mixture().model()
    lacking = replace(cache, manifest=replace(cache.manifest, rows={}))
    statistics = ExpertStatistics(model, [the_layer(model)], lacking, CPU)
    assert not statistics.has("x")
    with pytest.raises(CacheMismatch, match=r"no rows of 'x', which experts read; .* or leave the experts"):
        statistics.read(the_layer(model).sites[0].activation)


def test_a_cache_with_rows_serves_where_none_are_wanted_and_not_the_other_way_round() -> None:
    without = replace(KEY, expert_rows=False)
    assert KEY.difference(without) == ""
    assert "--expert_rows" in without.difference(KEY)
