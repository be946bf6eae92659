"""Write conversations as the model saw them in training: through its tokenizer's chat template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

from stages.calibration.text.offline import paragraphs
from stages.errors import UserError, with_class_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
"""``role``, ``content`` and whatever else a template reads."""
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

    def tokens(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation; the template itself writes the special tokens.

        Raises:
            UserError: the template refuses it.
        """
        return self._encode(self._render(messages))

    def marks(self) -> ChatMarks:
        """Return what stands around questions and answers.

        Raises:
            UserError: the template doesn't write messages as they are.
        """
        question, answer = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}
        opening, to_answer = self._around(_QUESTION, self._render([question], for_answer=True))
        _, to_end = self._around(_ANSWER, self._render([question, answer]))
        return ChatMarks(
            opening=tuple(self._encode(opening)),
            to_answer=tuple(self._encode(to_answer)),
            to_end=tuple(self._encode(to_end)),
        )

    def _render(self, messages: Sequence[Message], *, for_answer: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=_always_the_same_day(self.tokenizer.get_chat_template()),
                tokenize=False,
                add_generation_prompt=for_answer,
            )
        except Exception as error:  # jinja2's errors, and those that templates cause in Python
            raise UserError(
                f"The tokenizer's chat template refuses a conversation ({with_class_name(error)}); leave such rows out "
                "or pass text in place of messages."
            ) from error
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

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


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


def as_conversation(text: str) -> list[Message]:
    """Return a document as a question and its answer: the user begins it, and the assistant writes the rest.

    The beginning is the first paragraph; of a single paragraph its first sentence; a single sentence is a question
    without an answer.
    """
    for blocks, joint in ((paragraphs(text), "\n\n"), (_SENTENCE_END.split(text.strip()), " ")):
        if len(blocks) > 1:
            return [
                {"role": "user", "content": blocks[0]},
                {"role": "assistant", "content": joint.join(blocks[1:])},
            ]
    return [{"role": "user", "content": text.strip()}]
