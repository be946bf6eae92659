"""Windows are deterministic, packed without loss, and split without overlap; what can't fill them is named."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers

from stages.calibration.text import documents
from stages.calibration.text.arithmetic import ARITHMETIC_TITLE
from stages.calibration.text.documents import ChosenText, Documents, HubSource, choose_text
from stages.calibration.text.mix import MIX
from stages.calibration.text.offline import CALIBRATION_TITLE, CODE_TITLE, LANGUAGES_TITLE
from stages.calibration.text.windows import TokenWindows, load_windows, may_be_source, pack_windows, window_count
from stages.commands.calibrate_options import CalibrateConfig
from stages.errors import UserError
from stages.model.directory import ModelDirectory
from stages.runtime.providers import CPU_ONLY
from tests.stages.calibration.chats import TEMPLATE, with_template
from tests.stages.calibration.text.stories import STORIES, hub_folder, write_stories

pytestmark = pytest.mark.usefixtures("short_wait")


@pytest.fixture
def config(tiny_tokenizer: Path) -> CalibrateConfig:
    """Windows of the tiny tokenizer, which lies where a model would lie."""
    return CalibrateConfig(onnx_path=tiny_tokenizer, dataset="offline", calib_size=10, seq_len=32)


def load(config: CalibrateConfig, vocab_size: int = 300) -> TokenWindows:
    directory = ModelDirectory(
        folder=config.onnx_path,
        onnx_file=config.onnx_path / "model.onnx",
        has_genai_config=False,
        vocab_size=vocab_size,
    )
    return load_windows(config, directory, config.dataset or MIX, CPU_ONLY, 64)


def all_windows(config: CalibrateConfig) -> np.ndarray:
    windows = load(config)
    return np.concatenate([windows.calibration, windows.held_out])


def joined(windows: np.ndarray, tokenizer_path: Path) -> str:
    """Return the text of consecutive windows, without the <s> that a window begins with inside a document."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_path)
    text = ""
    for window in windows:
        here = tokenizer.decode(window)
        assert here.startswith("<s>")
        begins_a_document = not text or (text.endswith("</s>") and not here.startswith("<s>[assistant]"))
        text += here if begins_a_document else here.removeprefix("<s>")
    return text


def texts_of(windows: np.ndarray, tokenizer_path: Path) -> list[str]:
    """Return the documents that full windows hold, but one that is cut at the end."""
    return [part.removeprefix("<s>") for part in joined(windows, tokenizer_path).split("</s>")[:-1]]


@pytest.mark.parametrize(("calib_size", "held_out"), [(2, 1), (10, 1), (16, 2), (25, 2)])
def test_a_tenth_of_the_windows_and_at_least_one_is_held_out(
    config: CalibrateConfig, calib_size: int, held_out: int
) -> None:
    windows = load(replace(config, calib_size=calib_size))
    assert windows.held_out.shape == (held_out, 32)
    assert windows.calibration.shape == (calib_size - held_out, 32)
    assert windows.calibration.dtype == np.int64


def test_packing_keeps_every_token_in_order_and_drops_only_the_remainder() -> None:
    packed = pack_windows(iter(range(23)), 10, 5)
    np.testing.assert_array_equal(packed, np.arange(20).reshape(4, 5))
    np.testing.assert_array_equal(pack_windows(iter(range(23)), 2, 5), np.arange(10).reshape(2, 5))


def test_a_window_begins_with_the_token_before_any_text_once() -> None:
    packed = pack_windows([9, 0, 1, 2, 3, 4, 5, 9, 6, 7, 8, 8], 10, 4, begin=9)
    assert packed.tolist() == [[9, 0, 1, 2], [9, 3, 4, 5], [9, 6, 7, 8]]


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_windows_hold_whole_documents_once_between_bos_and_eos(
    config: CalibrateConfig, tmp_path: Path, suffix: str
) -> None:
    path = write_stories(tmp_path / f"stories.{suffix}")
    config = replace(config, dataset=str(path), calib_size=40)
    texts = texts_of(all_windows(config), config.onnx_path)
    assert len(texts) > 20
    assert set(texts) < set(STORIES)
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("dataset", ["offline", "jsonl"])
def test_the_same_request_gives_the_same_windows_and_another_seed_gives_others(
    config: CalibrateConfig, tmp_path: Path, dataset: str
) -> None:
    name = str(write_stories(tmp_path / "s.jsonl")) if dataset == "jsonl" else dataset
    config = replace(config, dataset=name)
    first, again, other = (load(options) for options in (config, config, replace(config, seed=1)))
    np.testing.assert_array_equal(first.calibration, again.calibration)
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint
    assert len(first.fingerprint) == 64


def test_the_fingerprint_knows_the_shape_and_the_split(config: CalibrateConfig) -> None:
    # 10 windows of 32 are the same 320 tokens as 5 windows of 64, and as 20 windows of 16.
    configs = [
        replace(config, use_random_calib=True, calib_size=count, seq_len=length)
        for count, length in [(10, 32), (5, 64), (20, 16)]
    ]
    streams = [all_windows(config).reshape(-1) for config in configs]
    np.testing.assert_array_equal(streams[0], streams[1])
    np.testing.assert_array_equal(streams[0], streams[2])
    assert len({load(config).fingerprint for config in configs}) == 3


def test_random_tokens_are_seeded_uniform_and_need_no_tokenizer(config: CalibrateConfig) -> None:
    config = replace(config, use_random_calib=True, model_name="nowhere", calib_size=40)
    windows = load(config, vocab_size=7)
    counts = np.bincount(windows.calibration.reshape(-1), minlength=7)
    # 36 * 32 = 1152 draws over 7 values: mean 165, standard deviation 12; five deviations.
    assert counts.shape == (7,)
    assert np.abs(counts - 1152 / 7).max() < 60
    assert windows.fingerprint == load(config, vocab_size=7).fingerprint
    assert windows.fingerprint != load(replace(config, seed=1), vocab_size=7).fingerprint
    assert windows.source == "random tokens"
    assert window_count(replace(config, calib_size=None), "", 28672) == 128


def numbered(path: Path, word: str) -> str:
    """Write a file of many documents that all hold ``word``; return its path."""
    path.write_text("\n\n\n".join(f"{word} number {number} of many" for number in range(400)), encoding="utf-8")
    return str(path)


def test_several_data_sets_share_the_windows_alternately(config: CalibrateConfig, tmp_path: Path) -> None:
    names = [numbered(tmp_path / f"{word}.txt", word) for word in ("apples", "pears", "plums")]
    config = replace(config, dataset=", ".join(names), calib_size=62)
    windows = load(config)
    alone = [
        load(replace(config, dataset=name, calib_size=size)) for name, size in zip(names, (21, 21, 20), strict=True)
    ]
    assert windows.source == "apples.txt + pears.txt + plums.txt"
    assert (len(windows.calibration), len(windows.held_out)) == (19 + 19 + 18, 2 + 2 + 2)
    for index, part in enumerate(alone):
        np.testing.assert_array_equal(windows.calibration[index:54:3], part.calibration[:18])
        np.testing.assert_array_equal(windows.held_out[index::3], part.held_out)
    np.testing.assert_array_equal(windows.calibration[54:], [alone[0].calibration[18], alone[1].calibration[18]])
    assert windows.fingerprint == load(config).fingerprint
    assert windows.fingerprint not in {part.fingerprint for part in alone}


@pytest.mark.parametrize(
    ("dataset", "source", "may_be"),
    [
        ("cnn", "cnn_dailymail train", True),
        ("offline", "cnn_dailymail train", False),
        ("cnn,offline", "cnn_dailymail train", False),
        ("cnn,offline", f"cnn_dailymail train + offline: {CALIBRATION_TITLE}", True),
        ("mix", "cnn_dailymail train", False),
        ("mix", f"the model's own 5 texts + 4 chats + offline: {CALIBRATION_TITLE} + random tokens", True),
        ("mix", f"offline: {CALIBRATION_TITLE} + code: {CODE_TITLE}", True),
        ("self", f"offline: {CALIBRATION_TITLE}", False),
    ],
)
def test_what_a_text_may_be_called_is_known_before_it_is_read(
    config: CalibrateConfig, dataset: str, source: str, *, may_be: bool
) -> None:
    assert may_be_source(source, config, dataset) == may_be


def test_chats_are_other_text(config: CalibrateConfig) -> None:
    chats = replace(config, apply_chat_template=True)
    assert not may_be_source("cnn_dailymail train", chats, "cnn")
    assert may_be_source("cnn_dailymail train, as chats", chats, "cnn")


def test_fewer_windows_than_two_for_each_data_set_are_refused(config: CalibrateConfig) -> None:
    with pytest.raises(
        UserError, match=r"--calib_size 5 is too small for --dataset offline,code,arith.*pass 6 or more"
    ):
        load(replace(config, dataset="offline,code,arithmetic", calib_size=5))


def test_weights_share_the_windows_and_each_part_is_spread_evenly(config: CalibrateConfig, tmp_path: Path) -> None:
    names = [numbered(tmp_path / f"{word}.txt", word) for word in ("apples", "pears")]
    config = replace(config, dataset=f"{names[0]}=3,{names[1]}=1", calib_size=40)
    windows = load(config)
    few = load(replace(config, dataset=names[1], calib_size=10)).calibration
    places = [(windows.calibration == window).all(axis=1).nonzero()[0].item() for window in few]
    assert (len(windows.calibration), len(windows.held_out)) == (27 + 9, 3 + 1)
    assert places == list(range(2, 36, 4))


@pytest.mark.parametrize(
    ("dataset", "channels", "calib_size", "expected"),
    [
        ("cnn", 576, None, 128),
        ("mix", 1536, None, 48),
        ("mix", 14336, None, 94),  # of which 85 aren't held out: 85 * 512 > 3 * 14336
        ("mix", 14336, 8, 8),
        ("mix,self", 28672, None, 187),
        ("mix,offline", 28672, None, 128),
    ],
)
def test_a_wide_model_gets_more_windows_by_default(
    config: CalibrateConfig, dataset: str, channels: int, calib_size: int | None, expected: int
) -> None:
    assert window_count(replace(config, seq_len=512, calib_size=calib_size), dataset, channels) == expected


def test_a_share_that_is_too_large_is_named(config: CalibrateConfig, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("A short story.", encoding="utf-8")
    with pytest.raises(UserError, match=r"short\.txt gives 0 windows of 32 tokens and its share of --calib_size is 5"):
        load(replace(config, dataset=f"offline,{path}"))


@pytest.fixture
def chat_config(config: CalibrateConfig, tmp_path: Path) -> CalibrateConfig:
    folder = with_template(config.onnx_path, tmp_path / "chat tokenizer")
    return replace(config, onnx_path=folder, apply_chat_template=True, calib_size=20)


def conversations(path: Path, *, others: bool = False) -> str:
    """Write a table of conversations: a question, often with its answer; with ``others`` every third row is a text."""
    rows: list[dict[str, object]] = []
    for number in range(120):
        messages = [{"role": "user", "content": f"What is {number}?"}]
        if number % 2:
            messages.append({"role": "assistant", "content": f"{number}."})
        rows.append({"messages": messages, "text": None})
        if others and number % 3 == 0:
            rows[-1] = {"messages": None, "text": f"Title {number}\n\nBody {number}"}
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        kept = [{key: value for key, value in row.items() if value is not None} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return str(path)


def chats_of(config: CalibrateConfig) -> list[str]:
    return joined(all_windows(config), config.onnx_path).split("<s>")[1:-1]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_messages_of_a_table_are_written_by_the_chat_template(
    chat_config: CalibrateConfig, tmp_path: Path, suffix: str
) -> None:
    config = replace(chat_config, dataset=conversations(tmp_path / f"talk.{suffix}"))
    chats = chats_of(config)
    possible = {f"[user] What is {n}?</s>" + f"[assistant] {n}.</s>" * (n % 2) for n in range(120)}
    assert len(chats) > 10
    assert set(chats) < possible
    assert load(config).source == f"talk.{suffix}, as chats"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_without_messages_give_their_text(chat_config: CalibrateConfig, tmp_path: Path, suffix: str) -> None:
    chats = chats_of(replace(chat_config, dataset=conversations(tmp_path / f"talk.{suffix}", others=True)))
    asked = [chat for chat in chats if chat.startswith("[user] What")]
    texts = {f"[user] Title {n}</s>[assistant] Body {n}</s>" for n in range(120)}
    assert asked
    assert set(chats) - set(asked)
    assert set(chats) - set(asked) < texts


_REFUSES_EVEN = "{% if messages[0].content[-2] in '02468' %}{{ raise_exception('even') }}{% endif %}" + TEMPLATE


def test_conversations_that_the_template_refuses_are_left_out_and_counted(
    chat_config: CalibrateConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (chat_config.onnx_path / "chat_template.jinja").write_text(_REFUSES_EVEN, encoding="utf-8")
    config = replace(chat_config, dataset=conversations(tmp_path / "talk.jsonl"))
    chats = chats_of(config)
    assert chats
    assert set(chats) <= {f"[user] What is {n}?</s>[assistant] {n}.</s>" for n in range(1, 120, 2)}
    assert re.search(
        r"read without \d+ conversations that the .* template refuses \(TemplateError: even\)", caplog.text
    )
    with pytest.raises(UserError, match=r"without 60 conversations that .* and --calib_size is 4000; lower"):
        load(replace(config, calib_size=4000))


def test_a_template_that_refuses_all_conversations_is_an_error(chat_config: CalibrateConfig, tmp_path: Path) -> None:
    (chat_config.onnx_path / "chat_template.jinja").write_text("{{ raise_exception('no') }}", encoding="utf-8")
    with pytest.raises(UserError, match=r"template refuses a conversation \(TemplateError: no\); leave such rows out"):
        load(replace(chat_config, dataset=conversations(tmp_path / "talk.jsonl")))


def test_text_becomes_a_question_and_its_answer(chat_config: CalibrateConfig, tmp_path: Path) -> None:
    path = write_stories(tmp_path / "stories.txt")
    chats = chats_of(replace(chat_config, dataset=str(path)))
    # One sentence each: questions without an answer.
    assert set(chats) <= {f"[user] {story}</s>" for story in STORIES}


def test_a_tokenizer_without_a_chat_template_is_named(config: CalibrateConfig) -> None:
    with pytest.raises(UserError, match="--apply_chat_template: the tokenizer has no chat template"):
        load(replace(config, apply_chat_template=True))


def test_a_hub_data_set_is_read_by_configuration_split_and_column(
    config: CalibrateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub_folder(tmp_path / "cnn_dailymail")
    source = HubSource(path=str(folder), config="3.0.0", split="train", column="article")
    monkeypatch.setattr(documents, "HUB_SOURCES", {"cnn": source})
    config = replace(config, dataset="cnn")
    windows = load(config)
    assert windows.source == "cnn_dailymail train"
    assert set(texts_of(windows.calibration, config.onnx_path)) < set(STORIES)
    assert windows.fingerprint == load(config).fingerprint


def test_too_little_text_states_both_numbers(config: CalibrateConfig, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("A short story.", encoding="utf-8")
    with pytest.raises(UserError, match=r"gives 0 windows of 32 tokens and --calib_size is 10; lower"):
        load(replace(config, dataset=str(path)))


def test_without_a_tokenizer_the_option_is_named(config: CalibrateConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No tokenizer can be loaded.*--model_name"):
        load(replace(config, model_name=str(tmp_path)))


def test_a_tokenizer_of_another_model_is_refused(config: CalibrateConfig) -> None:
    with pytest.raises(UserError, match="vocabulary has 100; pass the model's own tokenizer"):
        load(config, vocab_size=100)


@pytest.mark.slow
def test_the_room_is_imported_without_the_libraries_that_take_seconds() -> None:
    code = "import stages.calibration.run, sys; print({'datasets', 'transformers'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"


def test_the_default_text_is_the_hub_s_where_it_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = HubSource(path=str(hub_folder(tmp_path)), config="3.0.0", split="train", column="article")
    monkeypatch.setattr(documents, "HUB_SOURCES", {"cnn": source})
    assert choose_text(None) == ChosenText(dataset="cnn")
    assert choose_text("mine.txt") == ChosenText(dataset="mine.txt")


def test_mix_stands_in_for_the_default_and_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = HubSource(path=str(tmp_path / "nothing"), config=None, split="train", column="text")
    monkeypatch.setattr(documents, "HUB_SOURCES", {"cnn": source})
    chosen = choose_text(None)
    assert chosen.dataset == MIX
    assert "mix takes its place" in chosen.note
    assert "--dataset FILE.txt" in chosen.note


@pytest.mark.parametrize("dataset", [None, "mix"])
def test_mix_goes_without_text_that_the_model_can_t_write_and_says_so(
    config: CalibrateConfig, dataset: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """The tokenizer's folder holds no model that could write."""
    with caplog.at_level("INFO"):
        windows = load(replace(config, dataset=dataset, calib_size=40))
    assert "mix goes without text that the model writes: --dataset self: " in caplog.text
    assert windows.source == (
        f"offline: {CALIBRATION_TITLE} + code: {CODE_TITLE} + languages: {LANGUAGES_TITLE} + "
        f"arithmetic: {ARITHMETIC_TITLE} + random tokens"
    )
    # A tenth of 15, 11, 6 and 5; random tokens are no test.
    assert (len(windows.calibration), len(windows.held_out)) == (40 - 4, 2 + 1 + 1 + 0 + 0)
    with pytest.raises(UserError, match="--dataset self: "):
        load(replace(config, dataset="offline,self", calib_size=8))


def test_a_short_part_of_mix_gives_what_it_has_and_a_named_data_set_must_have_all(
    config: CalibrateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(dataset: str, *_: object, **__: object) -> Documents:
        return Documents(
            title=dataset, texts=iter(["A sentence of some words."] * (20 if dataset == "offline" else 2000))
        )

    monkeypatch.setattr("stages.calibration.text.windows.open_documents", short)
    windows = load(replace(config, dataset="mix", calib_size=80))
    # Of 29 of 80 windows, the model's own text missing, offline has about 20 sentences of 8 tokens.
    assert 60 < len(windows.calibration) + len(windows.held_out) < 70
    with pytest.raises(UserError, match=r"--dataset offline gives \d+ windows of 32 tokens and its share"):
        load(replace(config, dataset="offline,code", calib_size=80))
