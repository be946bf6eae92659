"""The model's own text: texts and chats alternately, the same for a seed, and never written twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import transformers

from stages.calibration.text.sampler import Sampler
from stages.calibration.text.self_generated import (
    GeneratedText,
    GeneratedTextFile,
    GeneratedWindow,
    GenerationRequest,
    TextGenerator,
)
from stages.errors import UserError
from stages.model.directory import locate_model
from stages.runtime.providers import CPU
from tests.stages.calibration.chats import TEMPLATE

REQUEST = GenerationRequest(count=5, seq_len=24, seed=0, chats_only=False)
BOS, EOS = 0, 1


@dataclass
class Author:
    """The tiny model, two windows at a time, and how many windows it was made to write."""

    generator: TextGenerator
    tokenizer: transformers.PreTrainedTokenizerBase
    written: list[int] = field(default_factory=list)

    def write(self, request: GenerationRequest = REQUEST) -> GeneratedText:
        return self.generator.generate(self.tokenizer, request)

    @property
    def file(self) -> Path:
        (path,) = self.generator.folder.iterdir()
        return path


@pytest.fixture
def author(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Author:
    generator = TextGenerator(
        directory=locate_model(tiny_model),
        providers=(CPU,),
        folder=tmp_path / "kept",
        tokens_at_once=2 * REQUEST.seq_len,
    )
    author = Author(generator, transformers.AutoTokenizer.from_pretrained(tiny_model))
    write: Callable[..., np.ndarray] = Sampler.generate

    def counted(self: Sampler, scripts: list[object], *arguments: object) -> np.ndarray:
        author.written.append(len(scripts))
        return write(self, scripts, *arguments)

    monkeypatch.setattr(Sampler, "generate", counted)
    return author


@pytest.fixture
def chatty(author: Author) -> Author:
    author.tokenizer.chat_template = TEMPLATE
    return author


def test_without_a_chat_template_all_are_texts(author: Author) -> None:
    text = author.write()
    assert text.title == "the model's own 5 texts"
    assert text.windows.shape == (5, 24)
    assert (text.windows[:, 0] == BOS).all()
    assert len({tuple(window) for window in text.windows.tolist()}) == 5
    assert author.written == [2, 2, 1]


def test_with_a_chat_template_every_other_window_is_a_chat(chatty: Author) -> None:
    text = chatty.write()
    assert text.title == "the model's own 3 texts + 2 chats"
    begins = [chatty.tokenizer.decode(window).startswith("<s>[user] ") for window in text.windows]
    assert begins == [False, True, False, True, False]
    chats = chatty.write(replace(REQUEST, chats_only=True))
    assert chats.title == "the model's own 5 chats"
    assert all("[assistant] " in chatty.tokenizer.decode(window) for window in chats.windows)


def test_only_chats_need_a_template(author: Author) -> None:
    with pytest.raises(UserError, match=r"^--apply_chat_template: the tokenizer has no chat template"):
        author.write(replace(REQUEST, chats_only=True))


def test_what_is_kept_is_not_written_again(chatty: Author) -> None:
    first = chatty.write()
    kept = chatty.file.read_bytes()
    again = chatty.write()
    np.testing.assert_array_equal(first.windows, again.windows)
    assert (chatty.written, again.title) == ([2, 2, 1], first.title)
    assert chatty.file.read_bytes() == kept


def test_the_same_seed_writes_the_same_text_anew_and_another_one_another(chatty: Author) -> None:
    first = chatty.write()
    chatty.file.unlink()
    np.testing.assert_array_equal(first.windows, chatty.write().windows)
    other = chatty.write(replace(REQUEST, seed=1))
    assert (first.windows != other.windows).mean() > 0.3
    assert len(list(chatty.generator.folder.iterdir())) == 2


def test_a_person_can_read_what_was_written(chatty: Author) -> None:
    text = chatty.write()
    lines = GeneratedTextFile(chatty.file).read()
    assert [line.window for line in lines] == [0, 1, 2, 3, 4]
    assert [line.text for line in lines] == [chatty.tokenizer.decode(window) for window in text.windows]
    assert {line.kind for line in lines} == {"text", "chat"}


def test_a_stopped_run_loses_only_the_batch_that_it_writes(chatty: Author, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = chatty.write()
    chatty.file.unlink()
    chatty.written.clear()
    write = Sampler.generate

    def stopped(self: Sampler, *arguments: object) -> np.ndarray:
        if chatty.written:
            raise KeyboardInterrupt
        return write(self, *arguments)

    with monkeypatch.context() as context:
        context.setattr(Sampler, "generate", stopped)
        with pytest.raises(KeyboardInterrupt):
            chatty.write()
    assert len(GeneratedTextFile(chatty.file).read()) == 2
    assert [path.name for path in chatty.generator.folder.iterdir()] == [chatty.file.name]
    np.testing.assert_array_equal(chatty.write().windows, whole.windows)
    assert chatty.written == [2, 2, 1]


def test_more_windows_are_added_to_those_that_are_there(chatty: Author) -> None:
    few = chatty.write()
    chatty.written.clear()
    many = chatty.write(replace(REQUEST, count=8))
    assert chatty.written == [2, 1]
    np.testing.assert_array_equal(many.windows[:5], few.windows)
    chatty.written.clear()
    np.testing.assert_array_equal(chatty.write(replace(REQUEST, count=4)).windows, few.windows[:4])
    assert chatty.written == []
    # In other batches they are the same.
    chatty.file.unlink()
    np.testing.assert_array_equal(chatty.write(replace(REQUEST, count=8)).windows, many.windows)
    assert chatty.written == [2, 2, 2, 2]


def test_fewer_long_windows_are_written_at_once(chatty: Author) -> None:
    chatty.generator = replace(chatty.generator, tokens_at_once=30)
    chatty.write()
    assert chatty.written == [1] * 5


def test_a_damaged_file_is_named(author: Author) -> None:
    author.write()
    author.file.write_text('{"window": 0, "kind"')
    with pytest.raises(UserError, match=r"own-text-\w{10}\.jsonl can't be read as the model's own text .*; delete it"):
        author.write()


def test_text_keeps_characters_that_end_lines(tmp_path: Path) -> None:
    window = GeneratedWindow(window=0, kind="text", text="a\u2028b\x85c\nd", tokens=(0,))
    file = GeneratedTextFile(tmp_path / "own.jsonl")
    file.add([window])
    assert file.read() == (window,)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    window = GeneratedWindow(window=0, kind="text", text="a", tokens=(0,))
    with pytest.raises(UserError, match=r"own text can't be kept in .*; free space there, or choose another place"):
        GeneratedTextFile(tmp_path / "file" / "own.jsonl").add([window])
