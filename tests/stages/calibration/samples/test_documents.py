"""Encoders of texts read documents as their tokenizer writes them, one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from stages.calibration.samples.documents import document_samples, encode_documents, reads_documents
from stages.commands.calibrate_options import TextOptions
from stages.errors import UserError
from stages.model.directory import locate_model
from stages.model.load import load_graph
from tests.support.encoders import save_text_encoder, save_vision
from tests.support.tiny_models import VOCABULARY


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("text-encoder")
    save_text_encoder(folder, VOCABULARY)
    AutoTokenizer.from_pretrained(tiny_tokenizer).save_pretrained(folder)
    return folder


def test_only_encoders_of_texts_read_documents(encoder: Path, tiny_model: Path, tmp_path: Path) -> None:
    save_vision(tmp_path)
    for folder, expected in ((encoder, True), (tiny_model, False), (tmp_path, False)):
        directory = locate_model(folder)
        assert reads_documents(load_graph(directory), directory) is expected


def test_each_document_is_a_sample_as_the_tokenizer_writes_it(encoder: Path, tmp_path: Path) -> None:
    texts = [f"Sentence {number} of a small file." for number in range(12)]
    (tmp_path / "x.txt").write_text("\n\n\n".join(texts), encoding="utf-8")
    directory = locate_model(encoder)
    model = load_graph(directory)
    found = document_samples(TextOptions(seq_len=64), model, directory, str(tmp_path / "x.txt"))
    assert (len(found.calibration), len(found.held_out), len(found.unseen)) == (10, 1, 1)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    expected = {tuple(tokenizer(text)["input_ids"]) for text in texts}
    samples = (*found.calibration, *found.held_out, *found.unseen)
    assert {tuple(sample["input_ids"][0].tolist()) for sample in samples} == expected
    assert all(sample["attention_mask"].all() for sample in samples)
    again = document_samples(TextOptions(seq_len=64), model, directory, str(tmp_path / "x.txt"))
    assert again.fingerprint == found.fingerprint


def test_long_ones_are_cut_and_short_ones_padded_where_the_graph_fixes_the_length(
    encoder: Path, tmp_path: Path
) -> None:
    directory = locate_model(encoder)
    texts = ["word " * 400, "word"]
    cut, short = encode_documents(texts, load_graph(directory), directory, str(encoder), 16)
    assert cut["input_ids"].shape == (1, 16)
    assert short["input_ids"].shape[1] < 16
    save_text_encoder(tmp_path, VOCABULARY, length=16)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    fixed = locate_model(tmp_path)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"takes 16 tokens at a time, and the tokenizer .* has none to pad"):
        encode_documents(texts, load_graph(fixed), fixed, str(tmp_path), 512)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    _, padded = encode_documents(texts, load_graph(fixed), fixed, str(tmp_path), 512)
    length = short["input_ids"].shape[1]
    assert padded["input_ids"].shape == (1, 16)
    assert padded["attention_mask"].tolist() == [[1] * length + [0] * (16 - length)]
    np.testing.assert_array_equal(padded["input_ids"][:, :length], short["input_ids"])


def test_chats_are_refused_without_advice_that_leads_back(encoder: Path, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"messages": [{"role": "user", "content": "x"}]}\n', encoding="utf-8")
    directory = locate_model(encoder)
    model = load_graph(directory)
    with pytest.raises(UserError, match="for an encoder rows with a column text"):
        document_samples(TextOptions(), model, directory, str(chats))
    with pytest.raises(UserError, match=r"--apply_chat_template is for models that write text, .*; leave it out"):
        document_samples(TextOptions(apply_chat_template=True), model, directory, str(chats))


def test_text_that_only_decoders_write_is_refused(encoder: Path) -> None:
    directory = locate_model(encoder)
    with pytest.raises(UserError, match="--dataset self is for models that write text"):
        document_samples(TextOptions(), load_graph(directory), directory, "self")
