"""Read calibration text from hub data sets, local files, or what any installation has.

A document is a text, or the messages of a conversation.
"""

from __future__ import annotations

import codecs
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from stages.calibration.text.arithmetic import ARITHMETIC_TITLE, arithmetic_documents
from stages.calibration.text.chat_document import CHAT_COLUMNS, ChatDocument, read_chat
from stages.calibration.text.mix import ARITHMETIC, CODE, LANGUAGES, MIX, MIX_PARTS, OFFLINE
from stages.calibration.text.offline import (
    CALIBRATION_TITLE,
    CODE_TITLE,
    DOCUMENT_CHARACTERS,
    LANGUAGES_TITLE,
    code_documents,
    gather,
    language_documents,
    offline_calibration_documents,
    paragraphs,
    pieces,
)
from stages.calibration.text.tokenizer import hub_reason, why_unreachable
from stages.errors import UserError, with_class_name

Row = dict[str, Any]
TextDocument = str | ChatDocument
DEFAULT_DATASET = "cnn"
_SHUFFLE_BUFFER = 2000
_MOST_NULS = 0.01
"""UTF-16 without its mark, read as UTF-8, has one for each letter."""
_ROWS_AT_ONCE = 256
_SECONDS = 4.0
"""How long the hub may take to answer before other text stands in for the default."""
_LONGEST_DOCUMENT = 16384
"""Characters: a book would otherwise fill every window."""
_TABLES = (".jsonl", ".parquet")
_FILE_COLUMNS = ("text", "article", "content")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """One data set of the Hugging Face hub (or a local folder laid out like one)."""

    path: str
    config: str | None
    split: str
    column: str

    @property
    def title(self) -> str:
        """Return what tables call it."""
        return f"{self.path.rsplit('/', 1)[-1]} {self.split}"


HUB_SOURCES: Mapping[str, HubSource] = MappingProxyType(
    {
        "cnn": HubSource(path="abisee/cnn_dailymail", config="3.0.0", split="train", column="article"),
        "pilevel": HubSource(path="mit-han-lab/pile-val-backup", config=None, split="validation", column="text"),
    }
)


_INSTALLED: Mapping[str, tuple[str, Callable[[], list[str]]]] = MappingProxyType(
    {
        OFFLINE: (CALIBRATION_TITLE, offline_calibration_documents),
        CODE: (CODE_TITLE, code_documents),
        LANGUAGES: (LANGUAGES_TITLE, language_documents),
    }
)
"""Titles and documents of what any installation has, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """Documents in the order that the seed gives; read once, as far as needed."""

    title: str
    texts: Iterator[TextDocument]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenText:
    """What ``--dataset`` names, or what stands in for it."""

    dataset: str
    note: str = ""
    """Why the default data set isn't used, and what would be better; empty where it is."""


def choose_text(dataset: str | None) -> ChosenText:
    """Return ``dataset`` or, where it is None, the default data set, or mix where that can't be read."""
    if dataset is not None:
        return ChosenText(dataset=dataset)
    missing = _why_unreadable(HUB_SOURCES[DEFAULT_DATASET])
    if missing is None:
        return ChosenText(dataset=DEFAULT_DATASET)
    return ChosenText(
        dataset=MIX,
        note=f"--dataset {DEFAULT_DATASET} can't be read ({missing}): {MIX} takes its place. Text of the kind "
        "that the model will read is better: --dataset FILE.txt.",
    )


def _why_unreadable(source: HubSource) -> str | None:
    """Return why not even the first row of ``source`` can be read, or None where it can."""
    unreachable = None if Path(source.path).is_dir() else why_unreachable(source.path, "dataset", _SECONDS)
    if unreachable is not None:
        return unreachable
    try:
        with _without_bars() as load_dataset:
            next(iter(load_dataset(source.path, source.config, split=source.split, streaming=True)))
    except Exception as error:  # the hub's clients raise classes without a common base
        return hub_reason(error)
    return None


@contextmanager
def _without_bars() -> Iterator[Callable[..., Any]]:
    """Give the block ``datasets.load_dataset``, and draw no bars of that library meanwhile."""
    import datasets  # here, because it takes seconds

    were_on = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield datasets.load_dataset
    finally:
        if were_on:
            datasets.enable_progress_bars()


def open_documents(dataset: str, seed: int, *, with_messages: bool = False) -> Documents:
    """Return the documents that one name of ``--dataset`` means: a hub data set, what any installation has, or a file.

    Args:
        dataset: the name.
        seed: of their order.
        with_messages: whether the rows of a local file give their conversations, if they have any.

    Raises:
        UserError: the name is unknown or the file is missing; also, while texts are read, when the hub can't be
            reached, a file is damaged, or it has no column of text.
    """
    source = HUB_SOURCES.get(dataset) or _by_hub_name(dataset)
    if source is not None:
        return Documents(title=source.title, texts=_hub_texts(dataset, source, seed))
    if dataset == ARITHMETIC:
        return Documents(title=f"{ARITHMETIC}: {ARITHMETIC_TITLE}", texts=arithmetic_documents(seed))
    if dataset in _INSTALLED:
        title, documents = _INSTALLED[dataset]
        return Documents(title=f"{dataset}: {title}", texts=_shuffled(documents, seed))
    path = Path(dataset)
    if path.is_dir() or path.suffix.lower() in (".npz", ".npy"):
        raise UserError(
            f"--dataset {dataset} is no text; pass arrays, images or sounds as --samples, and text as a .txt, .jsonl "
            "or .parquet file."
        )
    if path.suffix.lower() not in (".txt", *_TABLES):
        raise UserError(
            f"--dataset {dataset} is none of {', '.join((*HUB_SOURCES, MIX, *MIX_PARTS))}, and not a .txt, .jsonl or "
            ".parquet file; pass one of these."
        )
    if not path.is_file():
        raise UserError(f"--dataset {dataset} does not exist; pass the path of a .txt, .jsonl or .parquet file.")
    if path.suffix.lower() == ".txt":
        return Documents(title=path.name, texts=_shuffled(partial(_texts_of_file, path), seed))
    return Documents(title=path.name, texts=_table_file(path, seed, with_messages))


def _by_hub_name(dataset: str) -> HubSource | None:
    """Return the source that the hub calls ``dataset``, with or without its owner: cnn_dailymail is cnn."""
    return next((s for s in HUB_SOURCES.values() if dataset in (s.path, s.path.rsplit("/", 1)[-1])), None)


def _shuffled(read: Callable[[], list[str]], seed: int) -> Iterator[str]:
    texts = read()
    random.Random(seed).shuffle(texts)
    yield from texts


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, or one of UTF-16 that says so in its first bytes; lines end as in Python.

    Half a character at the end is left out: files are cut anywhere.

    Raises:
        OSError: the file can't be read.
        ValueError: it is of another encoding, or not text.
    """
    content = path.read_bytes()
    encoding = _encoding(content[:2])
    text = codecs.getincrementaldecoder(encoding)().decode(content).replace("\r\n", "\n").replace("\r", "\n")
    if text.count("\0") > _MOST_NULS * len(text):
        raise ValueError("it holds NUL characters, as UTF-16 does, or is no text")
    return text


def _encoding(first_bytes: bytes) -> str:
    return "utf-16" if first_bytes in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _texts_of_file(path: Path) -> list[str]:
    """Return the documents of a file, which two or more blank lines separate; without any, paragraphs make them up."""
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--dataset {path} can't be read as UTF-8 text ({error}); save it as UTF-8 or pass another."
        ) from error
    texts = [part for part in re.split(r"\n(?:[^\S\n]*\n){2,}", text) if part.strip()]
    if len(texts) < 2:
        blocks = (piece for block in paragraphs(text) for piece in pieces(block, _LONGEST_DOCUMENT) if piece)
        texts = list(gather(blocks, DOCUMENT_CHARACTERS))
    return texts


def _hub_texts(name: str, source: HubSource, seed: int) -> Iterator[str]:
    unreachable = None if Path(source.path).is_dir() else why_unreachable(source.path, "dataset")
    if unreachable is not None:
        raise UserError(
            f"--dataset {name}: {source.path} can't be read, {unreachable}; check the network, use --dataset offline "
            "or a local .txt, .jsonl or .parquet file, or set HF_HUB_OFFLINE=1 to use a copy in HF_HOME."
        )
    try:
        with _without_bars() as load_dataset:
            rows = load_dataset(source.path, source.config, split=source.split, streaming=True)
            for text in _column(_shuffled_rows(rows, seed), (source.column,), f"--dataset {name} ({source.path})"):
                yield text[:_LONGEST_DOCUMENT]
    except UserError:
        raise
    except Exception as error:  # the hub's clients raise classes without a common base
        raise UserError(
            f"--dataset {name}: {source.path} can't be read from the Hugging Face hub ({hub_reason(error)}); "
            "check the network, or use --dataset offline or a local .txt, .jsonl or .parquet file."
        ) from error


def _table_file(path: Path, seed: int, with_messages: bool) -> Iterator[TextDocument]:
    try:
        for row in _shuffled_rows(_rows(path), seed):
            document = _document(row, with_messages, f"--dataset {path}")
            if document:
                yield document
    except UserError:
        raise
    except Exception as error:  # pyarrow, pandas, datasets and json each have errors of their own
        raise UserError(
            f"--dataset {path} can't be read as {path.suffix[1:]} ({with_class_name(error)}); repair the file or "
            "pass another."
        ) from error


def _shuffled_rows(rows: Iterable[Row], seed: int) -> Iterator[Row]:
    """Yield rows in the order of ``seed``, a part of a file of any length after the other."""
    numbers, held = np.random.default_rng(seed), list[Row]()
    for row in rows:
        held.append(row)
        if len(held) == _SHUFFLE_BUFFER:
            order = numbers.permutation(len(held))
            yield from (held[place] for place in order[: len(held) // 2])
            held = [held[place] for place in order[len(held) // 2 :]]
    yield from (held[place] for place in numbers.permutation(len(held)))


def _document(row: Row, with_messages: bool, where: str) -> TextDocument | None:
    """Return what a row of a file holds: where ``with_messages``, its conversation, if it has one; else its text."""
    chats = [column for column in CHAT_COLUMNS if column in row]
    if with_messages and any(row[column] for column in chats):
        return read_chat(row, where)
    if chats and not any(column in row for column in _FILE_COLUMNS):
        if with_messages:
            return None
        raise UserError(
            f"{where} holds conversations (column {chats[0]}); pass --apply_chat_template to write them as the "
            f"tokenizer's chat template does, or for an encoder rows with a column {_FILE_COLUMNS[0]}."
        )
    return next(_column([row], _FILE_COLUMNS, where), None)


def _rows(path: Path) -> Iterator[Row]:
    """Yield a table's rows; the datasets library would make a cache in HOME for them."""
    return _parquet_rows(path) if path.suffix.lower() == ".parquet" else _parsed_lines(path)


def _parquet_rows(path: Path) -> Iterator[Row]:
    from pyarrow.parquet import ParquetFile  # here, because it takes a while

    with ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS_AT_ONCE, use_threads=False):
            yield from ({name: _without_nulls(value) for name, value in row.items()} for row in batch.to_pylist())


def _without_nulls(value: object) -> object:
    """Return ``value`` without null fields: a table gives each record every field that any record has."""
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _parsed_lines(path: Path) -> Iterator[Row]:
    # Half characters stand for bytes that aren't UTF-8, so that their line can be named.
    with path.open("rb") as file:
        encoding = _encoding(file.read(2))
    with path.open(encoding=encoding, errors="surrogateescape" if encoding == "utf-8-sig" else "strict") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                line.encode()
                row = json.loads(line.removeprefix("\ufeff"))  # files may have been joined
            except UnicodeEncodeError as error:
                raise ValueError(f"line {number} is not UTF-8") from error
            except RecursionError as error:
                raise ValueError(f"line {number} is nested too deeply") from error
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not an object")
            yield row


def _column(rows: Iterable[Row], columns: tuple[str, ...], where: str) -> Iterator[str]:
    """Yield the text of each row that has any, from the first of ``columns`` that the rows have."""
    for row in rows:
        name = next((column for column in columns if column in row), None)
        if name is None:
            raise UserError(
                f"{where} has the columns {', '.join(row)} and none of {', '.join(columns)}; "
                "rename the one with the text."
            )
        text = row[name]
        if text is not None and not isinstance(text, str):
            raise UserError(f"{where}: column {name} holds {type(text).__name__}, not text; store one string a row.")
        if text and text.strip():
            yield text
