"""Documents come from every source in the seed's order, and each that can't be read is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import huggingface_hub
import pytest

from stages.calibration.text.documents import HubSource, TextDocument, open_documents
from stages.errors import UserError
from tests.stages.calibration.text.stories import STORIES, hub_folder, write_stories

pytestmark = pytest.mark.usefixtures("short_wait")


def read(dataset: Path | str, *, seed: int = 0, with_messages: bool = False) -> list[TextDocument]:
    return list(open_documents(str(dataset), seed, with_messages=with_messages).texts)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_a_file_gives_each_document_once_in_an_order_of_the_seed(tmp_path: Path, suffix: str) -> None:
    path = write_stories(tmp_path / f"stories.{suffix}")
    texts = read(path)
    assert sorted(map(str, texts)) == sorted(STORIES)
    assert read(path) == texts
    assert read(path, seed=1) != texts
    assert texts != STORIES


def test_text_without_blank_lines_between_documents_is_gathered_into_some(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("\n\n".join(STORIES * 3), encoding="utf-8")
    texts = [str(text) for text in read(path)]
    assert 1 < len(texts) < 5
    assert sorted("\n\n".join(texts).split("\n\n")) == sorted(STORIES * 3)


@pytest.mark.parametrize("name", ["cnn", "cnn_dailymail", "abisee/cnn_dailymail"])
def test_a_hub_data_set_is_known_by_its_own_name_too(name: str) -> None:
    assert open_documents(name, 0).title == "cnn_dailymail train"


def test_an_unknown_name_lists_the_choices() -> None:
    with pytest.raises(
        UserError, match=r"--dataset wikitext is none of cnn, pilevel, mix, self, offline, .*, and not a \.txt"
    ):
        read("wikitext")


def test_a_hub_data_set_without_its_column_names_those_it_has(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "cnn", column="story")
    source = HubSource(path=str(folder), config="3.0.0", split="train", column="article")
    with pytest.raises(UserError, match="columns id, story and none of article"):
        list(open_documents("cnn", 0, {"cnn": source}).texts)


def unreachable(*_: object, **__: object) -> None:
    raise ConnectionError("no route")


@pytest.mark.parametrize("asked", [unreachable, lambda *_, **__: None], ids=["at once", "later"])
def test_without_a_network_the_error_tells_what_to_use_instead(
    asked: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found out before the libraries' own patience is over, or by them."""
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", asked)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"abisee/cnn_dailymail can't be read.*no route.*--dataset offline or a local"):
        read("cnn")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"--dataset missing\.jsonl does not exist"):
        read("missing.jsonl")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_damaged_file_is_named_with_its_kind(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"damaged.{suffix}"
    path.write_bytes(b'{"text": "fine"}\n{"text": "cut of')
    with pytest.raises(UserError, match=rf"damaged\.{suffix} can't be read as {suffix} .*; repair the file"):
        read(path)


def test_a_text_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("café au lait".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt can't be read as UTF-8"):
        read(path)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_file_without_a_text_column_names_its_columns(tmp_path: Path, suffix: str) -> None:
    path = write_stories(tmp_path / f"t.{suffix}", "story")
    with pytest.raises(UserError, match="columns id, story and none of text, article, content"):
        read(path)


@pytest.mark.parametrize(
    ("row", "with_messages", "message"),
    [
        ({"text": ["one", "two"]}, False, "column text holds list, not text"),
        (
            {"messages": [{"role": "user", "content": "Hi"}]},
            False,
            r"rows\.jsonl holds conversations .*; pass --apply_chat_template",
        ),
        ({"messages": "Hello"}, True, "column messages is not a list of messages; give each a role and content"),
        (
            {"messages": [{"from": "human", "value": "Hello"}]},
            True,
            "column messages has a message without a role",
        ),
    ],
)
def test_rows_of_another_form_are_refused(
    tmp_path: Path, row: dict[str, object], with_messages: bool, message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read(path, with_messages=with_messages)
