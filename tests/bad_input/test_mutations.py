"""Every loader takes a damaged file or refuses it with a sentence: some hundred seeded cases."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.bad_input.mutations import mutate_bytes, mutate_json, mutate_onnx, mutate_safetensors, mutate_text
from tests.bad_input.targets import Target, make_targets

_CASES = {"parquet": 3, "jsonl": 15, "graph": 60, "table": 15}
_NAMES = ("graph", "genai_config", "manifest", "statistics", "tokens", "recipe", "weights", "table", "plan", "text")


@pytest.fixture(scope="module")
def targets(
    tiny_model: Path, tiny_cache: Path, tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Target]:
    return make_targets(tiny_model, tiny_cache, tiny_weights, tmp_path_factory.mktemp("mutated"))


@pytest.fixture
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*_NAMES, "jsonl", "parquet"])
def test_nothing_but_sentences(name: str, targets: dict[str, Target], quiet: None) -> None:
    target = targets[name]
    assert target.survives(target.seed)
    taken = [target.survives(target.mutate(target.seed, Random(case))) for case in range(_CASES.get(name, 40))]
    target.file.write_bytes(target.seed)
    assert not all(taken), "no case was damaged enough to be refused"


def test_every_target_is_tried(targets: dict[str, Target]) -> None:
    assert set(targets) == {*_NAMES, "jsonl", "parquet"}


@pytest.mark.parametrize("mutate", [mutate_bytes, mutate_text, mutate_json, mutate_safetensors, mutate_onnx])
@pytest.mark.parametrize("data", [b"", b"{}", b"[[[", b"\x08\0\0\0\0\0\0\0{}", bytes(range(256))])
def test_mutations_take_anything_and_depend_only_on_the_seed(mutate, data: bytes) -> None:
    results = [mutate(data, Random(7)) for _ in range(2)]
    assert results[0] == results[1]
    assert len({mutate(data, Random(seed)) for seed in range(20)}) > 1
