"""What can be calibrated on, at the command line: the model's own text, conversations, and several data sets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.stages.calibration.chats import with_template
from tests.support.commands import Commands
from tests.support.written import cache_times


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model with a chat template, in a folder whose neighbours may be written."""
    return with_template(tiny_model, tmp_path_factory.mktemp("chatty") / "base")


def options(base: Path, cache: Path, dataset: str, *more: object) -> tuple[object, ...]:
    return (
        "--onnx_path", base, "--cache_dir", cache, "--dataset", dataset, "--calib_size", 12, "--seq_len", 32,
        "--batch_size", 4, "--calibration_eps", "cpu", *more,
    )  # fmt: skip


def tokens_of(cache: Path) -> np.ndarray:
    parts = load_file(cache / "tokens.safetensors")
    return np.concatenate([parts["calibration"], parts["held_out"]])


def test_the_model_writes_its_calibration_text_once(commands: Commands, chat_model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "caches" / "self"
    code, printed = commands.calibrate(*options(chat_model, cache, "self"))
    assert code == 0, printed
    assert "the model's own 6 texts + 6 chats" in printed
    assert "384 of 384 tokens in" in printed
    (text,) = (tmp_path / "caches").glob("base.own-text-*.jsonl")
    assert f"kept in {text}" in printed
    written = [json.loads(line)["tokens"] for line in text.read_text(encoding="utf-8").splitlines()]
    np.testing.assert_array_equal(tokens_of(cache), written)
    times = cache_times(cache)
    assert times
    code, printed = commands.calibrate(*options(chat_model, cache, "self"))
    assert code == 0
    assert cache_times(cache) == times
    assert "model writes" not in printed
    code, printed = commands.calibrate(*options(chat_model, tmp_path / "caches" / "again", "self"))
    assert code == 0
    assert "model writes" not in printed
    np.testing.assert_array_equal(tokens_of(tmp_path / "caches" / "again"), written)


def test_own_text_and_others_share_the_windows(commands: Commands, chat_model: Path, tmp_path: Path) -> None:
    code, printed = commands.calibrate(*options(chat_model, tmp_path / "mix", "self,offline"))
    assert code == 0, printed
    assert "the model's own 3 texts + 3 chats + offline: CPython documentation topics" in printed
    assert "10 to search with + 2 held out" in printed


def test_documents_go_through_the_chat_template(
    commands: Commands, chat_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    code, printed = commands.calibrate(
        *options(chat_model, tmp_path / "cache", str(tiny_text), "--apply_chat_template")
    )
    assert code == 0, printed
    assert "tiny.txt, as chats" in printed
    code, printed = commands.calibrate(
        *options(chat_model, tmp_path / "self", "self", "--apply_chat_template", "--calib_size", 2)
    )
    assert code == 0, printed
    assert "the model's own 2 chats" in printed


@pytest.mark.slow
def test_the_drop_in_calibrates_on_own_text_once(commands: Commands, chat_model: Path, tmp_path: Path) -> None:
    def arguments(name: str, *more: object) -> tuple[object, ...]:
        # Without a folder for statistics: it chooses its own.
        rest = options(chat_model, tmp_path, "self,offline", "--block_size", 16, *more)
        return (*rest[:2], *rest[4:], "--output_path", tmp_path / name)

    code, printed = commands.drop_in(*arguments("lite"))
    assert code == 0, printed
    assert "the model writes" in printed
    times = cache_times(chat_model.parent)
    assert times
    code, printed = commands.drop_in(*arguments("clip", "--algo", "awq_clip"))
    assert code == 0, printed
    assert cache_times(chat_model.parent) == times
    code, printed = commands.drop_in(*arguments("chats", "--apply_chat_template"))
    assert code == 0, printed
    assert cache_times(chat_model.parent) != times


@pytest.mark.parametrize(
    ("dataset", "more", "message"),
    [
        ("self", ("--apply_chat_template",), "error: --apply_chat_template: the tokenizer has no chat template;"),
        ("offline,offline", (), "error: --dataset names offline twice;"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(
    commands: Commands, tiny_model: Path, tmp_path: Path, dataset: str, more: tuple[str, ...], message: str
) -> None:
    code, printed = commands.calibrate(*options(tiny_model, tmp_path / "cache", dataset, *more))
    assert code == 2
    assert printed.strip().startswith(message)
    assert len(printed.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_the_runtime_cannot_run_is_one_sentence(
    commands: Commands, tiny_model_bf16: Path, tmp_path: Path
) -> None:
    code, printed = commands.calibrate(*options(tiny_model_bf16, tmp_path / "cache", "self"))
    assert code == 2
    assert printed.strip().startswith("error: --dataset self: onnxruntime-genai can't run ")
    assert printed.strip().endswith("choose another --dataset.")
    assert len(printed.strip().splitlines()) == 1
