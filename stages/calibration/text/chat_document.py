"""Read conversations from the rows of tables, and give a chat template each form that templates expect them in.

Templates differ in what they read: content as text or as a list of parts, arguments of tool calls as text or as
objects, system messages or none. The first form that a template writes whole is the one the model was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import inf
from typing import Any

from stages.errors import UserError

Message = dict[str, Any]
"""``role``, most often ``content``, and whatever else a template reads."""
CHAT_COLUMNS, TOOLS = ("messages", "conversations"), "tools"
_SHAREGPT_NAMES = {"from": "role", "value": "content"}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
_TOOL_ROLES = ("function", "tool")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatDocument:
    """Messages, whose content is text or isn't there, and the tools that the assistant may call."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()

    def forms(self) -> Iterator[ChatDocument]:
        """Yield this conversation, then the other forms that templates may expect; few changes come first."""
        seen: list[ChatDocument] = []
        for changes in product(*((_as_it_is, *changes) for changes in _CHANGES)):
            form = self
            for change in changes:
                form = replace(form, messages=tuple(change(form.messages)))
            if form not in seen:
                seen.append(form)
                yield form

    def lost(self, written: str) -> float:
        """Return how many texts and names of called functions ``written`` lacks, or has as JSON has text in text.

        Infinite where a list of parts is written as one: no model has seen that.
        """
        if any(str(part) in written for message in self.messages for part in _parts(message)):
            return inf
        told = [part for message in self.messages for part in _texts(message)]
        told += [name for call in self._calls() if isinstance(name := call.get("name"), str)]
        arguments = [given for call in self._calls() if isinstance(given := call.get("arguments"), str)]
        missing = sum(text.strip() not in written and _as_json(text)[1:-1] not in written for text in told)
        return float(missing + sum(_as_json(text) in written for text in arguments))

    def _calls(self) -> Iterator[Mapping[str, Any]]:
        for message in self.messages:
            yield from map(_function, _calls(message))


def read_chat(row: Mapping[str, Any], where: str) -> ChatDocument:
    """Return what the columns of messages and tools hold, lists or JSON text; what isn't text in content is left out.

    Args:
        row: of a table, with one of ``CHAT_COLUMNS``; names and roles may be those of ShareGPT.
        where: the option and the file, for messages.

    Raises:
        UserError: the columns hold anything else.
    """
    column = next(name for name in CHAT_COLUMNS if row.get(name))
    messages, place = _decoded(row[column]), f"{where}: column {column}"
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{place} is not a list of messages; give each a role and content.")
    tools = _decoded(row.get(TOOLS)) or []
    tools = [_decoded(tool) for tool in (tools if isinstance(tools, list) else [tools])]
    objects = tuple(tool for tool in tools if isinstance(tool, dict))
    if len(objects) < len(tools):
        raise UserError(f"{where}: column {TOOLS} is not a list of tools; make each an object, or rename the column.")
    return ChatDocument(messages=tuple(_message(message, place) for message in messages), tools=objects)


def _message(message: Mapping[str, Any], place: str) -> Message:
    # Null stands for what isn't there, as transformers has it too: templates would write "None".
    given = {name: value for name, value in message.items() if value is not None}
    if "role" not in given:
        given = {_SHAREGPT_NAMES.get(name, name): value for name, value in given.items()}
        if isinstance(role := given.get("role"), str):
            given["role"] = _SHAREGPT_ROLES.get(role, role)
    if not isinstance(given.get("role"), str):
        raise UserError(f"{place} has a message without a role; give each a role and content.")
    if "tool_calls" in given:
        given["tool_calls"] = _decoded(given["tool_calls"])
    if "content" in given:
        given["content"] = _content(given["content"], place)
    return given


def _content(content: object, place: str) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    if all(isinstance(part, str) or (isinstance(part, dict) and part.keys() & {"type", "text"}) for part in parts):
        texts = (part.get("text") if isinstance(part, dict) else part for part in parts)
        return "\n".join(text for text in texts if isinstance(text, str))
    if isinstance(content, list | dict):
        return _as_json(content)  # what a tool returned
    raise UserError(
        f"{place} has a message whose content is {type(content).__name__}; make it text or a list of parts."
    )


def _decoded(value: object) -> object:
    """Return what ``value`` holds where it is JSON text, as in tables that have one type a column; else itself."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _as_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)  # as templates write it


def _texts(message: Message) -> Iterator[str]:
    content = message.get("content", "")
    yield from (part["text"] for part in _parts(message))
    if isinstance(content, str) and content:
        yield content


def _parts(message: Message) -> list[dict[str, str]]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def _calls(message: Message) -> list[dict[str, Any]]:
    calls = message.get("tool_calls")
    return [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a call that has its name and arguments: ``function``, or the call itself."""
    function = call.get("function")
    return function if isinstance(function, dict) else call


_Messages = tuple[Message, ...]


def _as_it_is(messages: _Messages) -> _Messages:
    return messages


def _with_objects(messages: _Messages) -> _Messages:
    """Return the arguments of tool calls as objects: OpenAI's format has them as text."""

    def changed(call: dict[str, Any]) -> dict[str, Any]:
        function = dict(_function(call))
        arguments = _decoded(function.get("arguments"))
        if not isinstance(arguments, dict):
            return call
        function["arguments"] = arguments
        return call | {"function": function} if isinstance(call.get("function"), dict) else function

    return tuple(
        message | {"tool_calls": [changed(call) for call in calls]} if (calls := _calls(message)) else message
        for message in messages
    )


def _with_content(messages: _Messages) -> _Messages:
    """Return messages that all have content: a call of a tool has none."""
    return tuple({"content": "", **message} for message in messages)


def _without_developer(messages: _Messages) -> _Messages:
    """Return messages of the system in place of the developer's: OpenAI renamed that role."""
    return tuple(message | {"role": "system"} if message["role"] == "developer" else message for message in messages)


def _without_system(messages: _Messages) -> _Messages:
    """Return messages in which the next user says what the system says, where a template has no such role."""
    held: list[str] = []
    changed: list[Message] = []
    for message in messages:
        if message["role"] in ("developer", "system"):
            held.append(message.get("content", ""))
        elif message["role"] == "user" and held:
            changed.append(message | {"content": "\n\n".join((*held, message.get("content", "")))})
            held = []
        else:
            changed.append(message)
    return (*changed, {"role": "user", "content": "\n\n".join(held)}) if held else tuple(changed)


def _without_tools(messages: _Messages) -> _Messages:
    """Return what tools return as a user's messages."""
    return tuple(message | {"role": "user"} if message["role"] in _TOOL_ROLES else message for message in messages)


def _as_parts(messages: _Messages) -> _Messages:
    """Return content as a list of parts, which templates of models with images may expect."""
    return tuple(
        message | {"content": [{"type": "text", "text": message["content"]}]} if "content" in message else message
        for message in messages
    )


_CHANGES: tuple[tuple[Callable[[_Messages], _Messages], ...], ...] = (
    (_as_parts,),
    (_without_tools,),
    (_without_developer, _without_system),
    (_with_content,),
    (_with_objects,),
)
"""What may be changed, and how; the last is tried first."""
