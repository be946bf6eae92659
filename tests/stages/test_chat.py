"""Chat through onnxruntime-genai: what is printed and when, how a conversation goes on, and how it ends."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.chat import command
from stages.commands.evaluate_options import ChatConfig
from stages.errors import UserError
from stages.runtime.conversation import Conversation
from stages.runtime.genai import GenaiSession, open_genai
from tests.support.commands import Commands

LIMIT = 6
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"


class Screen(io.StringIO):
    """Standard output that keeps what each flush brought; ``stop_at`` is the piece at which Ctrl-C is pressed."""

    encoding = "utf-8"

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.flushed: list[str] = []
        self._stop_at = stop_at

    def flush(self) -> None:
        self.flushed.append(self.getvalue()[sum(map(len, self.flushed)) :])
        if len(self.flushed) == self._stop_at:
            raise KeyboardInterrupt


class Numbers:
    """A tokenizer whose texts are token ids, so that every text has exactly one spelling."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, tokens: list[int]) -> str:
        return "".join(f" {token}" for token in tokens)

    def create_stream(self) -> Any:
        return self.Stream()

    class Stream:
        def decode(self, token: int) -> str:
            return f" {token}"


@pytest.fixture(scope="module")
def session(tiny_model: Path) -> GenaiSession:
    return open_genai(tiny_model, "MODEL", threads=1)


@pytest.fixture(scope="module")
def numbers(session: GenaiSession) -> GenaiSession:
    return replace(session, tokenizer=Numbers(), begins_with=None)


@pytest.fixture(scope="module")
def templated(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("models") / "templated")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def conversation(session: GenaiSession, limit: int = LIMIT, system: str | None = None) -> Conversation:
    return Conversation(session, system=system, max_new_tokens=limit, temperature=0.0)


def greedy(session: GenaiSession, text: str, limit: int = LIMIT) -> str:
    """The continuation of ``text`` by a generator that has read nothing before."""
    begin = [] if session.begins_with is None else [session.begins_with]
    tokens = [*begin, *(int(token) for token in session.tokenizer.encode(text))]
    stream = session.tokenizer.create_stream()
    return "".join(stream.decode(token) for token in session.generate(tokens, limit))


def type_lines(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """Let a person type ``lines``; an exception stands for what they press."""
    typed = iter(lines)

    def read(_: str = "") -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)


def test_a_prompts_answer_is_all_that_standard_output_holds(
    tiny_model: Path, session: GenaiSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", screen := Screen())
    list(command(ChatConfig(model=tiny_model / "model.onnx", prompt="The city", max_new_tokens=LIMIT)))
    assert screen.getvalue() == greedy(session, "The city") + "\n"
    # Each token appears as soon as it is there; one may be a part of a letter.
    assert len(screen.flushed) == LIMIT + 1
    assert sum(map(bool, screen.flushed)) > 1


def run(commands: Commands, *arguments: object) -> tuple[int, str]:
    return commands.run(ChatConfig, command, arguments)


def test_the_answer_goes_into_the_json_document(tiny_model: Path, session: GenaiSession, commands: Commands) -> None:
    code, printed = run(commands, tiny_model, "--prompt", "The city", "--max_new_tokens", LIMIT, "--json")
    document, _ = json.JSONDecoder().raw_decode(printed)
    assert (code, document["answer"], document["error"]) == (0, greedy(session, "The city"), None)
    assert run(commands, tiny_model, "--json")[0] == 2


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_a_chat_ends_politely_and_keeps_the_conversation(
    end: type[BaseException],
    templated: Path,
    session: GenaiSession,
    commands: Commands,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    type_lines(monkeypatch, "The city", "  ", "a river", end)
    code, printed = run(commands, templated, "--max_new_tokens", LIMIT, "--system", "Be brief.")
    bare = replace(session, begins_with=None)  # a template writes what a text begins with
    first = greedy(bare, text := "system: Be brief.\nuser: The city\nassistant:")
    second = greedy(bare, f"{text[:-10]}assistant: {first}\nuser: a river\nassistant:")
    assert code == 0
    assert printed.startswith(f"{first}\n{second}\n")
    assert f"--max_new_tokens {LIMIT} is reached" in printed


def test_piped_messages_are_answered_up_to_the_end_of_input(
    tiny_model: Path, session: GenaiSession, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("The city\n"))
    code, printed = run(commands, tiny_model, "--max_new_tokens", LIMIT)
    assert (code, printed.splitlines()[0]) == (0, greedy(session, "The city").splitlines()[0])
    assert "you:" not in printed


def test_half_characters_of_a_pipe_are_read_as_question_marks(
    tiny_model: Path, session: GenaiSession, commands: Commands
) -> None:
    code, printed = run(commands, tiny_model, "--max_new_tokens", LIMIT, "--prompt", "The \udcff city")
    assert (code, printed.splitlines()[0]) == (0, greedy(session, "The ? city").splitlines()[0]), printed


def test_control_c_stops_an_answer_but_not_the_chat(
    tiny_model: Path, session: GenaiSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", screen := Screen(stop_at=2))
    type_lines(monkeypatch, "The city", EOFError)
    assert list(command(ChatConfig(model=tiny_model, max_new_tokens=LIMIT))) == []
    whole = greedy(session, "The city")
    assert screen.getvalue().endswith("\n")
    assert whole.startswith(screen.getvalue()[:-1])
    assert len(screen.getvalue()) - 1 < len(whole)


def test_a_conversation_goes_on_from_what_was_said(numbers: GenaiSession) -> None:
    """Of an answer that is stopped, what was shown stays; one that reaches its limit stays whole."""
    talk = conversation(numbers)
    pieces = talk.answer("5 9 12")
    shown = next(pieces) + next(pieces)
    pieces.close()
    second = "".join(talk.answer("7 80 81"))
    assert second == greedy(numbers, read := f"5 9 12 {shown} 7 80 81")
    assert "".join(talk.answer("33")) == greedy(numbers, f"{read} {second} 33")


def test_a_temperature_draws_tokens(numbers: GenaiSession) -> None:
    drawn = {
        "".join(Conversation(numbers, system=None, max_new_tokens=20, temperature=5.0).answer("5 9")) for _ in range(3)
    }
    assert len(drawn) > 1


def test_a_full_context_forgets_the_oldest_messages(numbers: GenaiSession, caplog: pytest.LogCaptureFixture) -> None:
    talk = conversation(replace(numbers, context_length=20), limit=8, system="3 4")
    "".join(talk.answer("5 9 12"))
    with caplog.at_level("INFO"):
        answer = "".join(talk.answer("7 80 81"))
    assert "context of 20 tokens is full: the oldest 2 messages are forgotten" in caplog.text
    assert answer == greedy(numbers, "3 4 7 80 81", 8)


def test_a_message_that_is_too_long_leaves_the_conversation_as_it_was(numbers: GenaiSession) -> None:
    talk = conversation(replace(numbers, context_length=30), limit=4)
    first = "".join(talk.answer("5 9 12"))
    with pytest.raises(UserError, match=r"The message has 40 tokens, .* only 30; write a shorter one"):
        list(talk.answer("7 " * 40))
    assert "".join(talk.answer("33")) == greedy(numbers, f"5 9 12 {first} 33", 4)


def test_an_answer_ends_where_the_context_does(numbers: GenaiSession) -> None:
    talk = conversation(replace(numbers, context_length=10), limit=50)
    assert "".join(talk.answer("5 9 12")) == greedy(numbers, "5 9 12", 7)
    assert talk.cut_because == "the model's context of 10 tokens is full"


def _shorten(folder: Path) -> None:
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["context_length"] = 4
    (folder / "genai_config.json").write_text(json.dumps(config))


def _refuse_system(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system role here') }}")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (shutil.rmtree, "does not exist"),
        (lambda folder: (folder / "genai_config.json").unlink(), "has no genai_config.json"),
        (lambda folder: (folder / "recipe.json").write_text("{}"), "holds quantized weights, no model"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda folder: (folder / "model.onnx").write_bytes(b"x"), "can't be run by onnxruntime-genai here"),
        (_shorten, "the model's context only 4; write a shorter one"),
        (_refuse_system, "leave out --system"),
    ],
    ids=["folder", "configuration", "weights", "tokenizer", "graph", "context", "template"],
)
def test_what_cannot_be_chatted_with_is_one_sentence(
    spoil: Callable[[Path], object], words: str, tiny_model: Path, tmp_path: Path, commands: Commands
) -> None:
    spoil(folder := shutil.copytree(tiny_model, tmp_path / "copy"))
    code, printed = run(commands, folder, "--prompt", "The city of Rome", "--system", "Be brief.")
    assert (code, printed.count("error: "), printed.count("Traceback")) == (2, 1, 0)
    assert words in printed


def test_an_empty_message_is_refused(numbers: GenaiSession) -> None:
    chat = conversation(numbers)
    with pytest.raises(UserError, match="The message is empty; write one"):
        list(chat.answer(""))
    assert list(chat.answer("5 6")) == list(conversation(numbers).answer("5 6")), "it isn't kept"
