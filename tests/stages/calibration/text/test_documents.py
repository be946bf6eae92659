"""Documents come from every source in the seed's order, and each that can't be read is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.calibration.text import documents
from stages.calibration.text.chat_document import ChatDocument
from stages.calibration.text.documents import HubSource, TextDocument, _shuffled_rows, open_documents
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


def test_a_hub_data_set_without_its_column_names_those_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hub_folder(tmp_path / "cnn", column="story")
    source = HubSource(path=str(folder), config="3.0.0", split="train", column="article")
    monkeypatch.setattr(documents, "HUB_SOURCES", {"cnn": source})
    with pytest.raises(UserError, match="columns id, story and none of article"):
        list(open_documents("cnn", 0).texts)


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


@pytest.mark.parametrize(
    "content",
    ["café au lait".encode("latin-1"), "UTF-16 without its mark".encode("utf-16-le"), b"PK\0\0\0"],
    ids=["latin", "utf-16", "binary"],
)
def test_a_text_file_that_is_not_utf8_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"other\.txt can't be read as UTF-8 text .*; save it as UTF-8"):
        read(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_marks_of_encodings_are_no_part_of_the_text_nor_is_half_a_character_at_its_end(
    tmp_path: Path, encoding: str
) -> None:
    path = tmp_path / "UPPER.TXT"
    path.write_bytes("Grüße\r\nund Äußeré".encode(encoding)[:-1])
    assert read(path) == ["Grüße\nund Äußer"]


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl can't be read as jsonl .*line 2 is not UTF-8"):
        read(path)


def test_rows_of_utf16_and_of_joined_files_are_read(tmp_path: Path) -> None:
    path, row = tmp_path / "rows.jsonl", '{"text": "Grüße"}\n'
    path.write_text(row, encoding="utf-16")
    assert read(path) == ["Grüße"]
    path.write_text(f"\ufeff{row}\ufeff{row}", encoding="utf-8")
    assert read(path) == ["Grüße", "Grüße"]


def test_nulls_of_other_rows_are_no_part_of_a_table_s_conversation(tmp_path: Path) -> None:
    tool = {"name": "look", "parameters": {"city": {"type": "string"}}}
    other = {"name": "now", "parameters": {"zone": {"type": "string"}}}
    rows = [{"messages": [{"role": "user", "content": "Rain?"}], "tools": [each]} for each in (tool, other)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "talk.parquet")
    found = read(tmp_path / "talk.parquet", with_messages=True)
    assert [document.tools for document in found if isinstance(document, ChatDocument)] in (
        [(tool,), (other,)],
        [(other,), (tool,)],
    )


def test_one_long_line_is_cut_into_documents(tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    path.write_text(" ".join(f"word{number}" for number in range(9000)), encoding="utf-8")
    texts = [str(text) for text in read(path)]
    assert max(map(len, texts)) <= 16384
    assert sorted(" ".join(texts).split()) == sorted(path.read_text().split())


def test_rows_come_in_the_order_of_the_datasets_library() -> None:
    """Calibrations of earlier versions stay current."""
    rows = [{"text": str(number)} for number in range(5001)]
    theirs = datasets.IterableDataset.from_generator(lambda: iter(rows)).shuffle(seed=3, buffer_size=2000)
    assert list(_shuffled_rows(iter(rows), 3)) == list(theirs)


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
    ],
)
def test_rows_of_another_form_are_refused(
    tmp_path: Path, row: dict[str, object], with_messages: bool, message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read(path, with_messages=with_messages)
