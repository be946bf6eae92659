"""One greedy sentence from an ORT-GenAI model folder, through onnxruntime-genai."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from stages.evaluation.genai_session import GenaiSession, cannot_run, open_genai

_OPTION = "--model"
_SENTENCE_END = re.compile(r"[.!?](?=\s)|\n\n")


def generate_sentence(folder: Path, prompt: str, max_new_tokens: int) -> str:
    """The model's greedy answer: up to its first sentence's end, its end token, or ``max_new_tokens``.

    ``prompt`` is wrapped in the model's chat template where the folder has one.

    Raises:
        UserError: the folder isn't an ORT-GenAI model, or the runtime can't run it here.
    """
    session = open_genai(folder, _OPTION)
    try:
        return until_sentence_end(_pieces(session, prompt, max_new_tokens))
    except RuntimeError as error:
        raise cannot_run(folder, _OPTION, error) from error


def _pieces(session: GenaiSession, prompt: str, max_new_tokens: int) -> Iterator[str]:
    """Decoded text, one token at a time."""
    decoder = session.tokenizer.create_stream()
    for token in session.greedy(session.prompt_tokens(prompt), max_new_tokens):
        yield decoder.decode(token)


def until_sentence_end(pieces: Iterable[str]) -> str:
    """Join ``pieces`` as far as the first full stop, question or exclamation mark before a space, or blank line."""
    text = ""
    for piece in pieces:
        text += piece
        end = _SENTENCE_END.search(text)
        if end is not None:
            return text[: end.end()].strip()
    return text.strip()
