"""Conversations of every shape are read, and each template gets the form that it writes whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from stages.calibration.text.chat import require_chat_template
from stages.calibration.text.chat_document import ChatDocument, read_chat
from stages.errors import UserError

CONCATENATES = "{% for m in messages %}{{ '|' + m['role'] + ':' + m['content'] }}{% endfor %}"
ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
    "{% endif %}|{{ m.role }}:{{ m.content }}{% endfor %}"
)
IGNORES = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant', 'system') %}|{{ m.role }}:{{ m.content }}"
    "{% endif %}{% endfor %}"
)
READS_PARTS = (
    "{% for m in messages %}|{{ m.role }}:{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% else %}IMAGE{% endif %}{% endfor %}{% endfor %}"
)
_CALLED = "{% for m in messages %}|{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
AS_JSON = _CALLED + "{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
AS_TEXT = _CALLED + "{{ '`' + c.function.arguments + '`' }}{% endfor %}{% endfor %}"
BY_NAME = _CALLED + "{% for k, v in c.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}{% endfor %}{% endfor %}"
AS_TOJSON = "{% for m in messages %}|{{ m.role }}:{{ m.content | tojson }}{% endfor %}"
LISTS_TOOLS = "{{ tools | tojson }}" + IGNORES

USER = {"role": "user", "content": "Rain?"}
CALL = {"function": {"name": "look", "arguments": '{"in": "Oslo"}'}}
EMPTY_CALL = {"function": {"name": "now", "arguments": "{}"}}
ASKS = {"role": "assistant", "content": None, "tool_calls": [CALL, EMPTY_CALL]}
FOUND = {"role": "tool", "content": "wet"}
PICTURE = {"type": "image_url", "image_url": {"url": "x"}}
KIND = {"role": "developer", "content": "Be kind"}


def written(folder: Path, template: str, messages: object, tools: object = None) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    return require_chat_template(tokenizer)._render(read_chat({"messages": messages, "tools": tools}, "--dataset x"))


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (CONCATENATES, [USER, ASKS, FOUND], "|user:Rain?|assistant:|tool:wet"),
        (CONCATENATES, [USER, {"role": "assistant"}], "|user:Rain?|assistant:"),
        (CONCATENATES, [{"role": "user", "content": ["One", {"type": "text", "text": "Two"}]}], "|user:One\nTwo"),
        (CONCATENATES, [{"role": "tool", "content": {"wet": 1}}], '|tool:{"wet": 1}'),
        (
            CONCATENATES,
            [{"from": "human", "value": "Rain?"}, {"from": "gpt", "value": "No"}],
            "|user:Rain?|assistant:No",
        ),
        (CONCATENATES, '[{"role": "user", "content": "Rain?"}]', "|user:Rain?"),
        (AS_JSON, [ASKS], '|look{"in": "Oslo"}now{}'),
        (AS_JSON, [ASKS | {"tool_calls": '[{"function": {"name": "f", "arguments": {}}}]'}], "|f{}"),
        (AS_TEXT, [ASKS], '|look`{"in": "Oslo"}`now`{}`'),
        (BY_NAME, [ASKS], "|look in=Oslonow"),
        (ALTERNATES, [USER, ASKS, FOUND], "|user:Rain?|assistant:|user:wet"),
        (ALTERNATES, [KIND, USER], "|user:Be kind\n\nRain?"),
        (ALTERNATES, [KIND], "|user:Be kind"),
        (AS_TOJSON, [USER, FOUND | {"content": 'a "wet"\nday'}], r'|user:"Rain?"|tool:"a \"wet\"\nday"'),
        (IGNORES, [KIND, USER], "|system:Be kind|user:Rain?"),
        (IGNORES, [USER, FOUND], "|user:Rain?|user:wet"),
        (READS_PARTS, [{"role": "user", "content": [PICTURE, {"type": "text", "text": "Rain?"}]}], "|user:Rain?"),
        (READS_PARTS, [USER], "|user:Rain?"),
    ],
)
def test_a_template_gets_the_form_that_it_writes_whole(
    tiny_tokenizer: Path, template: str, messages: object, expected: str
) -> None:
    assert written(tiny_tokenizer, template, messages) == expected


@pytest.mark.parametrize("tools", [[{"name": "look"}], {"name": "look"}, '[{"name": "look"}]', ['{"name": "look"}']])
def test_tools_reach_the_template(tiny_tokenizer: Path, tools: object) -> None:
    assert written(tiny_tokenizer, LISTS_TOOLS, [USER], tools) == '[{"name": "look"}]|user:Rain?'


def test_no_tools_are_none(tiny_tokenizer: Path) -> None:
    assert written(tiny_tokenizer, LISTS_TOOLS, [USER], []) == "null|user:Rain?"


def test_halves_of_characters_reach_no_tokenizer(tiny_tokenizer: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_tokenizer)
    tokenizer.chat_template = CONCATENATES
    document = ChatDocument(messages=({"role": "user", "content": "a\ud83d\ude00b\ud83d"},))
    whole = ChatDocument(messages=({"role": "user", "content": "a\U0001f600b\ufffd"},))
    template = require_chat_template(tokenizer)
    assert template.tokens(document) == template.tokens(whole)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "Hello"}, "column messages is not a list of messages; give each a role and content"),
        ({"messages": ["Hello"]}, "column messages is not a list of messages"),
        ({"messages": [{"content": "Hello"}]}, "column messages has a message without a role"),
        ({"messages": [{"role": "user", "content": 3}]}, "a message whose content is int; make it text or a list"),
        ({"conversations": [{"value": "Hello"}]}, "column conversations has a message without a role"),
        ({"messages": [USER], "tools": ["look"]}, "column tools is not a list of tools; make each an object"),
    ],
)
def test_anything_else_is_one_sentence(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^--dataset x: .*{message}"):
        read_chat(row, "--dataset x")
