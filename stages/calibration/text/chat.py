"""Write conversations as the model saw them in training: through its tokenizer's chat template."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from datetime import date
from math import inf
from typing import TYPE_CHECKING, Any

from stages.calibration.text.chat_document import ChatDocument, Message
from stages.calibration.text.offline import paragraphs
from stages.calibration.text.tokenizer import first_tokens
from stages.errors import UserError, with_class_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_DAY = date(2025, 1, 1)
_QUESTION, _ANSWER = "first-question", "first-answer"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMarks:
    """The tokens that a template puts around messages."""

    opening: tuple[int, ...]
    """Before the first question, a system prompt that the template brings along included."""
    to_answer: tuple[int, ...]
    """From a question's end to its answer."""
    to_end: tuple[int, ...]
    """From an answer's end to the end of the conversation."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The chat template of a tokenizer that has one."""

    tokenizer: PreTrainedTokenizerBase

    def tokens(self, conversation: ChatDocument, count: int = sys.maxsize) -> list[int]:
        """Return the first ``count`` token ids of a conversation; the template itself writes the special tokens.

        Raises:
            UserError: the template refuses it.
        """
        return self._encode(self._render(conversation), count)

    def marks(self) -> ChatMarks:
        """Return what stands around questions and answers.

        Raises:
            UserError: the template doesn't write messages as they are.
        """
        question, answer = _message("user", _QUESTION), _message("assistant", _ANSWER)
        asked, answered = ChatDocument(messages=(question,)), ChatDocument(messages=(question, answer))
        opening, to_answer = self._around(_QUESTION, self._render(asked, for_answer=True))
        _, to_end = self._around(_ANSWER, self._render(answered))
        return ChatMarks(
            opening=tuple(self._encode(opening)),
            to_answer=tuple(self._encode(to_answer)),
            to_end=tuple(self._encode(to_end)),
        )

    def _render(self, conversation: ChatDocument, *, for_answer: bool = False) -> str:
        """Return the conversation in the form of which the template loses least, of equals the least changed one."""
        best, least = "", inf
        refusal: Exception | None = None
        for form in conversation.forms():
            try:
                text = self._written(form, for_answer=for_answer)
            except Exception as error:  # jinja2's errors, and those that templates cause in Python
                refusal = refusal or error
                continue
            lost = form.lost(text)
            if lost < least:
                best, least = text, lost
            if not lost:
                break
        if least == inf:
            assert refusal is not None, "there is one form at least"
            raise UserError(
                f"The tokenizer's chat template refuses a conversation ({with_class_name(refusal)}); leave such rows "
                "out or pass text in place of messages."
            ) from refusal
        return best

    def _written(self, form: ChatDocument, *, for_answer: bool) -> str:
        tools: list[Any] | None = list(form.tools) or None
        text = self.tokenizer.apply_chat_template(
            list(form.messages),
            tools=tools,
            chat_template=_always_the_same_day(self.tokenizer.get_chat_template(tools=tools)),
            tokenize=False,
            add_generation_prompt=for_answer,
        )
        assert isinstance(text, str), "one conversation, not tokenized"
        return text

    def _around(self, message: str, rendered: str) -> tuple[str, str]:
        parts = rendered.split(message)
        if len(parts) != 2:
            raise UserError(
                "The tokenizer's chat template doesn't write each message once and as it is, so the model can't write "
                "conversations itself; choose another --dataset."
            )
        return parts[0], parts[1]

    def _encode(self, text: str, count: int = sys.maxsize) -> list[int]:
        return first_tokens(self.tokenizer, text, count, add_special_tokens=False)


def _always_the_same_day(template: str) -> str:
    """Fix the date that a template writes: tokens would differ from day to day, and no cache would be found again."""
    return _TODAY.sub(lambda call: repr(_DAY.strftime(call[2])), template)


def find_chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """Return the tokenizer's chat template, or None where it has none."""
    return ChatTemplate(tokenizer) if getattr(tokenizer, "chat_template", None) else None


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """Return the tokenizer's chat template.

    Raises:
        UserError: it has none.
    """
    template = find_chat_template(tokenizer)
    if template is None:
        raise UserError(
            "--apply_chat_template: the tokenizer has no chat template; leave the option out, or name a folder or hub "
            "name with one as --model_name."
        )
    return template


def as_conversation(text: str) -> ChatDocument:
    """Return a document as a question and its answer: the user begins it, and the assistant writes the rest.

    The beginning is the first paragraph; of a single paragraph its first sentence; a single sentence is a question
    without an answer.
    """
    for blocks, joint in ((paragraphs(text), "\n\n"), (_SENTENCE_END.split(text.strip()), " ")):
        if len(blocks) > 1:
            return ChatDocument(messages=(_message("user", blocks[0]), _message("assistant", joint.join(blocks[1:]))))
    return ChatDocument(messages=(_message("user", text.strip()),))


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
