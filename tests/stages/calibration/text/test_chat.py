"""Conversations come out as the template writes them, and what stands around messages is found without knowing it."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from stages.calibration.text.chat import ChatTemplate, as_conversation, find_chat_template, require_chat_template
from stages.calibration.text.chat_document import ChatDocument
from stages.errors import UserError
from tests.stages.calibration.chats import TEMPLATE

HELLO = ChatDocument(messages=({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}))


@pytest.fixture
def template(tiny_tokenizer: Path) -> ChatTemplate:
    return template_of(tiny_tokenizer, TEMPLATE)


def template_of(folder: Path, text: str) -> ChatTemplate:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = text
    return require_chat_template(tokenizer)


def test_a_conversation_is_written_by_the_template_alone(template: ChatTemplate) -> None:
    assert template.tokenizer.decode(template.tokens(HELLO)) == "<s>[user] Hello</s>[assistant] Good day</s>"


def test_marks_are_what_stands_around_messages(template: ChatTemplate) -> None:
    marks = template.marks()
    decode = template.tokenizer.decode
    assert decode(marks.opening) == "<s>[user] "
    assert decode(marks.to_answer) == "</s>[assistant] "
    assert decode(marks.to_end) == "</s>"


def test_marks_and_messages_make_the_conversation(template: ChatTemplate) -> None:
    marks, encode = template.marks(), template._encode
    joined = [*marks.opening, *encode("Hello"), *marks.to_answer, *encode("Good day"), *marks.to_end]
    assert joined == template.tokens(HELLO)


def test_a_date_in_the_template_is_the_same_every_day(tiny_tokenizer: Path) -> None:
    dated = "{{ strftime_now('%Y-%m-%d') }}" + TEMPLATE
    template = template_of(tiny_tokenizer, dated)
    assert template.tokenizer.decode(template.tokens(HELLO)).startswith("2025-01-01<s>")


def test_a_template_that_refuses_is_named_with_its_reason(tiny_tokenizer: Path) -> None:
    template = template_of(tiny_tokenizer, "{{ raise_exception('Roles must alternate') }}")
    with pytest.raises(UserError, match=r"template refuses a conversation \(TemplateError: Roles must alternate\)"):
        template.tokens(HELLO)


@pytest.mark.parametrize(
    "text",
    ["nothing", "{{ messages[0]['content'] | upper }}", "{{ messages[0]['content'] }} {{ messages[0]['content'] }}"],
)
def test_a_template_that_changes_messages_has_no_marks(tiny_tokenizer: Path, text: str) -> None:
    with pytest.raises(UserError, match="doesn't write each message once and as it is"):
        template_of(tiny_tokenizer, text).marks()


def test_without_a_template_the_option_is_named(tiny_tokenizer: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_tokenizer)
    assert find_chat_template(tokenizer) is None
    with pytest.raises(UserError, match=r"^--apply_chat_template: the tokenizer has no chat template; leave"):
        require_chat_template(tokenizer)


@pytest.mark.parametrize(
    ("text", "question", "answer"),
    [
        ("A title\n\nFirst part.\n\nSecond part.\n", "A title", "First part.\n\nSecond part."),
        (" Is it so? It is.  Quite. ", "Is it so?", "It is. Quite."),
        ("One line\nand another", "One line\nand another", None),
    ],
    ids=["paragraphs", "sentences", "one sentence"],
)
def test_a_text_is_asked_by_its_beginning_and_answered_by_its_rest(
    text: str, question: str, answer: str | None
) -> None:
    user, *others = as_conversation(text).messages
    assert user == {"role": "user", "content": question}
    assert others == ([] if answer is None else [{"role": "assistant", "content": answer}])
