"""Hold a conversation with a model: its chat template, the room in its context, and answers piece by piece."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from typing import Literal

from stages.errors import UserError
from stages.runtime.genai import GenaiSession, Message

_LOGGER = logging.getLogger(__name__)


class Conversation:
    """The messages so far."""

    def __init__(self, session: GenaiSession, *, system: str | None, max_new_tokens: int, temperature: float) -> None:
        """Begin a conversation.

        Args:
            session: the open model.
            system: what the model is told before the first message; None: nothing.
            max_new_tokens: longest answer, in tokens.
            temperature: of sampling; 0 takes the most likely token.
        """
        self._session = session
        self._limit = max_new_tokens
        self._temperature = temperature
        self._system: list[Message] = [] if system is None else [_message("system", system)]
        self._messages: list[Message] = []
        self.cut_because = ""
        """Why the last answer ends before the model ended it; empty where it doesn't."""

    def answer(self, message: str) -> Generator[str, None, None]:
        """Yield the answer to ``message`` piece by piece; both are kept, the answer as far as it was taken.

        Raises:
            UserError: the message is empty or doesn't fit into the model's context, or its template refuses the
                messages.
            RuntimeError: the runtime stops.
        """
        if not message.strip():
            raise UserError("The message is empty; write one.")
        tokens = self._take_in(message)
        pieces: list[str] = []
        try:
            for piece in self._pieces(tokens):
                pieces.append(piece)
                yield piece
        finally:
            self._messages.append(_message("assistant", "".join(pieces)))

    def _take_in(self, message: str) -> list[int]:
        """Add a message and return the tokens of all; forget the oldest exchanges where an answer would have no room.

        A message that is refused changes nothing.
        """
        context = self._session.context_length
        messages = [*self._messages, _message("user", message)]
        tokens = self._session.conversation_tokens([*self._system, *messages])
        while len(tokens) + min(self._limit, context // 2) > context and len(messages) > 1:
            del messages[:2]
            tokens = self._session.conversation_tokens([*self._system, *messages])
        if len(tokens) >= context:
            raise UserError(
                f"The message has {len(tokens)} tokens, and the model's context only {context}; write a shorter one."
            )
        forgotten = len(self._messages) + 1 - len(messages)
        if forgotten:
            _LOGGER.info(
                "the model's context of %d tokens is full: the oldest %d messages are forgotten", context, forgotten
            )
        self._messages = messages
        return tokens

    def _pieces(self, tokens: list[int]) -> Iterator[str]:
        """Yield the answer's pieces.

        The whole conversation is read again: onnxruntime-genai 0.18 answers wrongly where a generator goes on after an
        answer that was cut, and not every model can be rewound.
        """
        room = self._session.context_length - len(tokens)
        limit = left = min(self._limit, room)
        stream = self._session.tokenizer.create_stream()
        self.cut_because = ""
        for token in self._session.generate(tokens, limit, temperature=self._temperature):
            left -= 1
            yield stream.decode(token)
        if left == 0:
            full = f"the model's context of {self._session.context_length} tokens is full"
            self.cut_because = full if limit == room else f"--max_new_tokens {limit} is reached"


def _message(role: Literal["system", "user", "assistant"], content: str) -> Message:
    return {"role": role, "content": content}
