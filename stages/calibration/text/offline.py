"""Take text from the Python installation itself: CPython's help topics, without repetition and split for evaluation.

Topics repeat one another word for word ("specialnames" holds most of "customization"), so paragraphs are compared, not
topics: no paragraph occurs twice, and none of an evaluation topic occurs in a calibration document.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from pydoc_data.topics import topics

_EVALUATION_SHARE = 5
_LEAST_LETTERS = 0.2
CALIBRATION_TITLE = "CPython documentation topics"
DOCUMENT_CHARACTERS = 4000
"""About a thousand tokens: a few windows, so that a sample of documents touches many topics."""


def paragraphs(text: str) -> list[str]:
    """Return the blocks of ``text`` between blank lines, with their own line breaks."""
    return [block.strip("\n") for block in re.split(r"\n\s*\n", text) if block.strip()]


def gather(blocks: Iterable[str], characters: int) -> Iterator[str]:
    """Join consecutive paragraphs into documents of about ``characters`` characters, none shorter but the last."""
    document: list[str] = []
    for block in blocks:
        document.append(block)
        if sum(map(len, document)) >= characters:
            yield "\n\n".join(document)
            document = []
    if document:
        yield "\n\n".join(document)


def offline_calibration_documents() -> list[str]:
    """Return documents of about 4000 characters, each from one topic, in a fixed order."""
    names = sorted(topics)
    seen: set[str] = set()
    for name in filter(_is_for_evaluation, names):
        seen.update(map(_words, paragraphs(topics[name])))
    documents: list[str] = []
    for name in names:
        if not _is_for_evaluation(name):
            documents += gather(_unseen_paragraphs(topics[name], seen), DOCUMENT_CHARACTERS)
    return documents


def offline_evaluation_text() -> str:
    """Return the topics kept for evaluation, in a fixed order, each paragraph once."""
    seen: set[str] = set()
    kept = (_unseen_paragraphs(topics[name], seen) for name in sorted(topics) if _is_for_evaluation(name))
    return "\n\n".join(block for blocks in kept for block in blocks)


def _is_for_evaluation(topic: str) -> bool:
    # Python's own hash() differs from run to run.
    return int.from_bytes(hashlib.sha256(topic.encode()).digest(), "big") % _EVALUATION_SHARE == 0


def _words(block: str) -> str:
    return " ".join(block.split())


def _unseen_paragraphs(topic: str, seen: set[str]) -> Iterator[str]:
    """Yield the readable paragraphs that aren't in ``seen`` yet, and add them to it."""
    for block in paragraphs(topic):
        key = _words(block)
        if key not in seen and _is_readable(key):
            seen.add(key)
            yield block


def _is_readable(words: str) -> bool:
    """Return False for grammar productions and tables of signs."""
    letters = sum(character.isalpha() for character in words)
    return "::=" not in words and letters >= _LEAST_LETTERS * len(words)
