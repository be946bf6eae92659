"""Windows are deterministic, packed without loss, split without overlap, and every bad input is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers

import stages.calibration.text.documents
from stages.calibration.text.documents import HubSource, open_documents
from stages.calibration.text.windows import WindowRequest, load_windows, pack_windows
from stages.errors import UserError
from tests.stages.calibration.chats import with_template

STORIES = [
    f"Story {number} tells of {number * 7} ships and the {number}th harbour they never reached." for number in range(60)
]


@pytest.fixture(autouse=True)
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    # datasets sleeps 5 s after each parquet stream, so that pyarrow's threads end before the interpreter does.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.2)


@pytest.fixture
def request_for(tiny_tokenizer: Path) -> WindowRequest:
    return WindowRequest(
        dataset="offline",
        tokenizer_path=str(tiny_tokenizer),
        vocab_size=300,
        calib_size=10,
        seq_len=32,
        seed=0,
        use_random=False,
        trust_remote_code=False,
    )


def write_jsonl(path: Path, column: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(STORIES)), "utf-8")
    return path


def write_parquet(path: Path, column: str = "text") -> Path:
    pq.write_table(pa.table({"id": list(range(len(STORIES))), column: STORIES}), path)
    return path


def write_text(path: Path) -> Path:
    path.write_text("\n\n\n".join(STORIES), encoding="utf-8")
    return path


def hub_folder(folder: Path, column: str = "article") -> Path:
    """A data set as the hub stores it: card with named configurations, one parquet file a split."""
    (folder / "3.0.0").mkdir(parents=True)
    write_parquet(folder / "3.0.0" / "train-00000-of-00001.parquet", column)
    files = "  data_files:\n  - split: train\n    path: 3.0.0/train-*\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: 3.0.0\n{files}---\n", encoding="utf-8")
    return folder


def all_windows(request: WindowRequest) -> np.ndarray:
    windows = load_windows(request)
    return np.concatenate([windows.calibration, windows.held_out])


def texts_of(windows: np.ndarray, tokenizer_path: str) -> list[str]:
    """The documents that full windows hold, cut ones at the end left out."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_path)
    return [part.removeprefix("<s>") for part in tokenizer.decode(windows.reshape(-1)).split("</s>")[:-1]]


# --------------------------------------------------------------------------- packing and splitting


@pytest.mark.parametrize(("calib_size", "held_out"), [(2, 1), (10, 1), (16, 2), (25, 2)])
def test_a_tenth_of_the_windows_and_at_least_one_is_held_out(
    request_for: WindowRequest, calib_size: int, held_out: int
) -> None:
    windows = load_windows(replace(request_for, calib_size=calib_size))
    assert windows.held_out.shape == (held_out, 32)
    assert windows.calibration.shape == (calib_size - held_out, 32)
    assert windows.calibration.dtype == np.int64


def test_packing_keeps_every_token_in_order_and_drops_only_the_remainder() -> None:
    packed = pack_windows(iter(range(23)), 10, 5)
    np.testing.assert_array_equal(packed, np.arange(20).reshape(4, 5))
    np.testing.assert_array_equal(pack_windows(iter(range(23)), 2, 5), np.arange(10).reshape(2, 5))


@pytest.mark.parametrize("write", [write_text, write_jsonl, write_parquet])
def test_windows_hold_whole_documents_once_between_bos_and_eos(
    request_for: WindowRequest, tmp_path: Path, write: type
) -> None:
    suffix = {write_text: "txt", write_jsonl: "jsonl", write_parquet: "parquet"}[write]
    path = write(tmp_path / f"stories.{suffix}")
    request = replace(request_for, dataset=str(path), calib_size=40)
    texts = texts_of(all_windows(request), request.tokenizer_path)
    assert len(texts) > 20
    assert set(texts) < set(STORIES)
    assert len(set(texts)) == len(texts)


# --------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("dataset", ["offline", "jsonl"])
def test_the_same_request_gives_the_same_windows_and_another_seed_gives_others(
    request_for: WindowRequest, tmp_path: Path, dataset: str
) -> None:
    name = str(write_jsonl(tmp_path / "s.jsonl")) if dataset == "jsonl" else dataset
    request = replace(request_for, dataset=name)
    first, again, other = (load_windows(r) for r in (request, request, replace(request, seed=1)))
    np.testing.assert_array_equal(first.calibration, again.calibration)
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint
    assert len(first.fingerprint) == 64


def test_the_fingerprint_knows_the_shape_and_the_split(request_for: WindowRequest) -> None:
    # 10 windows of 32 are the same 320 tokens as 5 windows of 64, and as 20 windows of 16.
    shapes = [(10, 32), (5, 64), (20, 16)]
    requests = [replace(request_for, calib_size=count, seq_len=length) for count, length in shapes]
    streams = [all_windows(request).reshape(-1) for request in requests]
    np.testing.assert_array_equal(streams[0], streams[1])
    np.testing.assert_array_equal(streams[0], streams[2])
    assert len({load_windows(request).fingerprint for request in requests}) == 3


def test_random_tokens_are_seeded_uniform_and_need_no_tokenizer(request_for: WindowRequest) -> None:
    request = replace(request_for, use_random=True, tokenizer_path="nowhere", vocab_size=7, calib_size=40)
    windows = load_windows(request)
    counts = np.bincount(windows.calibration.reshape(-1), minlength=7)
    # 36 * 32 = 1152 draws over 7 values: mean 165, standard deviation 12; five deviations.
    assert counts.shape == (7,)
    assert np.abs(counts - 1152 / 7).max() < 60
    assert windows.fingerprint == load_windows(request).fingerprint
    assert windows.fingerprint != load_windows(replace(request, seed=1)).fingerprint
    assert windows.source == "random tokens"


# --------------------------------------------------------------------------- several data sets


def numbered(path: Path, word: str) -> str:
    """A file of many documents that all hold ``word``."""
    path.write_text("\n\n\n".join(f"{word} number {number} of many" for number in range(400)), encoding="utf-8")
    return str(path)


def test_several_data_sets_share_the_windows_by_turns(request_for: WindowRequest, tmp_path: Path) -> None:
    names = [numbered(tmp_path / f"{word}.txt", word) for word in ("apples", "pears", "plums")]
    request = replace(request_for, dataset=", ".join(names), calib_size=62)
    windows = load_windows(request)
    alone = [
        load_windows(replace(request, dataset=name, calib_size=size))
        for name, size in zip(names, (21, 21, 20), strict=True)
    ]
    assert windows.source == "apples.txt + pears.txt + plums.txt"
    assert (len(windows.calibration), len(windows.held_out)) == (19 + 19 + 18, 2 + 2 + 2)
    for index, part in enumerate(alone):
        np.testing.assert_array_equal(windows.calibration[index:54:3], part.calibration[:18])
        np.testing.assert_array_equal(windows.held_out[index::3], part.held_out)
    np.testing.assert_array_equal(windows.calibration[54:], [alone[0].calibration[18], alone[1].calibration[18]])
    assert windows.fingerprint == load_windows(request).fingerprint
    assert windows.fingerprint not in {part.fingerprint for part in alone}


def test_a_file_with_a_comma_in_its_name_is_one(request_for: WindowRequest, tmp_path: Path) -> None:
    request = replace(request_for, dataset=numbered(tmp_path / "salt, pepper.txt", "spices"))
    assert load_windows(request).source == "salt, pepper.txt"


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("offline,", "--dataset offline, has a comma without a name beside it"),
        ("offline,cnn,offline", "--dataset names offline twice"),
        ("offline,cnn,pilevel", "--calib_size 5 is too small for 3 data sets.*pass 6 or more"),
        ("offline,nowhere", "--dataset nowhere is none of cnn, pilevel, offline, self,"),
    ],
)
def test_a_list_that_cannot_be_shared_is_refused(request_for: WindowRequest, dataset: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_windows(replace(request_for, dataset=dataset, calib_size=5))


def test_a_share_that_is_too_large_is_named(request_for: WindowRequest, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("A short story.", encoding="utf-8")
    with pytest.raises(UserError, match=r"short\.txt gives 0 windows of 32 tokens and its share of --calib_size is 5"):
        load_windows(replace(request_for, dataset=f"offline,{path}"))


# --------------------------------------------------------------------------- chats


@pytest.fixture
def chat_request(request_for: WindowRequest, tmp_path: Path) -> WindowRequest:
    folder = with_template(Path(request_for.tokenizer_path), tmp_path / "chat tokenizer")
    return replace(request_for, tokenizer_path=str(folder), apply_chat_template=True, calib_size=20)


def conversations(path: Path, *, others: bool = False) -> str:
    """A table of conversations of one question and answer, or one question; every third row has a text if any."""
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


def chats_of(request: WindowRequest) -> list[str]:
    text = transformers.AutoTokenizer.from_pretrained(request.tokenizer_path).decode(all_windows(request).reshape(-1))
    return text.split("<s>")[1:-1]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_messages_of_a_table_are_written_by_the_chat_template(
    chat_request: WindowRequest, tmp_path: Path, suffix: str
) -> None:
    request = replace(chat_request, dataset=conversations(tmp_path / f"talk.{suffix}"))
    chats = chats_of(request)
    possible = {f"[user] What is {n}?</s>" + f"[assistant] {n}.</s>" * (n % 2) for n in range(120)}
    assert len(chats) > 10
    assert set(chats) < possible
    assert load_windows(request).source == f"talk.{suffix}, as chats"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_without_messages_give_their_text(chat_request: WindowRequest, tmp_path: Path, suffix: str) -> None:
    chats = chats_of(replace(chat_request, dataset=conversations(tmp_path / f"talk.{suffix}", others=True)))
    asked = [chat for chat in chats if chat.startswith("[user] What")]
    texts = {f"[user] Title {n}</s>[assistant] Body {n}</s>" for n in range(120)}
    assert asked
    assert set(chats) - set(asked)
    assert set(chats) - set(asked) < texts


def test_text_becomes_a_question_and_its_answer(chat_request: WindowRequest, tmp_path: Path) -> None:
    path = write_text(tmp_path / "stories.txt")
    chats = chats_of(replace(chat_request, dataset=str(path)))
    # One sentence each: questions without an answer.
    assert set(chats) <= {f"[user] {story}</s>" for story in STORIES}


def test_messages_without_the_option_are_refused_with_its_name(request_for: WindowRequest, tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"talk\.jsonl holds conversations .*; pass --apply_chat_template"):
        load_windows(replace(request_for, dataset=str(path)))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hello", "column messages holds no list of messages"),
        ([{"from": "human", "value": "Hello"}], "column messages has a message without role and content"),
    ],
)
def test_messages_of_another_form_are_refused(
    chat_request: WindowRequest, tmp_path: Path, messages: object, message: str
) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_windows(replace(chat_request, dataset=str(path)))


def test_a_tokenizer_without_a_chat_template_is_named(request_for: WindowRequest) -> None:
    with pytest.raises(UserError, match="--apply_chat_template: the tokenizer has no chat template"):
        load_windows(replace(request_for, apply_chat_template=True))


# --------------------------------------------------------------------------- the hub


def test_a_hub_data_set_is_read_by_configuration_split_and_column(request_for: WindowRequest, tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "cnn_dailymail")
    source = HubSource(path=str(folder), config="3.0.0", split="train", column="article")
    request = replace(request_for, dataset="cnn")
    windows = load_windows(request, {"cnn": source})
    assert windows.source == "cnn_dailymail train"
    assert set(texts_of(windows.calibration, request.tokenizer_path)) < set(STORIES)
    assert windows.fingerprint == load_windows(request, {"cnn": source}).fingerprint


def test_a_hub_data_set_without_its_column_names_those_it_has(request_for: WindowRequest, tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "cnn", column="story")
    source = HubSource(path=str(folder), config="3.0.0", split="train", column="article")
    with pytest.raises(UserError, match="columns id, story and none of article"):
        load_windows(replace(request_for, dataset="cnn"), {"cnn": source})


def test_without_a_network_the_error_tells_what_to_use_instead(
    request_for: WindowRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> Iterator[object]:
        raise ConnectionError("Couldn't reach 'abisee/cnn_dailymail' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for reason in (None, "the hub can't be reached"):
        # Found out before the libraries' own patience is over, or by them.
        monkeypatch.setattr(stages.calibration.text.documents, "why_unreachable", lambda *_, reason=reason: reason)
        with pytest.raises(UserError, match=r"abisee/cnn_dailymail can't be read.*--dataset offline or a local"):
            load_windows(replace(request_for, dataset="cnn"))


@pytest.mark.parametrize("name", ["cnn_dailymail", "abisee/cnn_dailymail"])
def test_a_hub_data_set_is_known_by_its_own_name_too(name: str) -> None:
    assert open_documents(name, 0).title == "cnn_dailymail train"


# --------------------------------------------------------------------------- bad input


def test_too_little_text_states_both_numbers(request_for: WindowRequest, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("A short story.", encoding="utf-8")
    with pytest.raises(UserError, match=r"gives 0 windows of 32 tokens and --calib_size is 10; lower"):
        load_windows(replace(request_for, dataset=str(path)))


def test_an_unknown_name_lists_the_choices(request_for: WindowRequest) -> None:
    with pytest.raises(UserError, match="--dataset wikitext is none of cnn, pilevel, offline"):
        load_windows(replace(request_for, dataset="wikitext"))


def test_a_missing_file_is_named(request_for: WindowRequest) -> None:
    with pytest.raises(UserError, match=r"--dataset missing\.jsonl does not exist"):
        load_windows(replace(request_for, dataset="missing.jsonl"))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_damaged_file_is_named_with_its_kind(request_for: WindowRequest, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"damaged.{suffix}"
    path.write_bytes(b'{"text": "fine"}\n{"text": "cut of')
    with pytest.raises(UserError, match=rf"damaged\.{suffix} can't be read as {suffix} .*; repair the file"):
        load_windows(replace(request_for, dataset=str(path)))


def test_a_text_file_that_is_not_utf8_is_named(request_for: WindowRequest, tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt can't be read as UTF-8"):
        load_windows(replace(request_for, dataset=str(path)))


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_a_file_without_a_text_column_names_its_columns(
    request_for: WindowRequest, tmp_path: Path, write: type
) -> None:
    path = write(tmp_path / f"t.{'jsonl' if write is write_jsonl else 'parquet'}", "story")
    with pytest.raises(UserError, match="columns id, story and none of text, article, content"):
        load_windows(replace(request_for, dataset=str(path)))


def test_a_column_of_lists_is_refused(request_for: WindowRequest, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text('{"text": ["one", "two"]}\n', encoding="utf-8")
    with pytest.raises(UserError, match="column text holds list, not text"):
        load_windows(replace(request_for, dataset=str(path)))


def test_without_a_tokenizer_the_option_is_named(request_for: WindowRequest, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No tokenizer can be loaded.*--model_name"):
        load_windows(replace(request_for, tokenizer_path=str(tmp_path)))


def test_a_tokenizer_of_another_model_is_refused(request_for: WindowRequest) -> None:
    with pytest.raises(UserError, match="vocabulary has 100; pass the model's own tokenizer"):
        load_windows(replace(request_for, vocab_size=100))
