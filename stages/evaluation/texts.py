"""Provide texts to evaluate on that need no download, and choose those of another kind than was calibrated on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from stages.calibration.text.documents import HUB_SOURCES
from stages.calibration.text.offline import (
    CALIBRATION_TITLE,
    CODE_TITLE,
    module_files,
    offline_evaluation_text,
    paragraphs,
)

EVALUATION_MODULES = (
    "argparse", "calendar", "configparser", "csv", "difflib", "dis", "fractions", "heapq",
    "json.decoder", "shutil", "statistics", "tarfile", "textwrap", "tokenize", "zipfile", "ipaddress",
)  # fmt: skip
_CHARACTERS = 4000
"""Of each module: about a thousand tokens."""
_SHORTEST_NOTICE = 200
_MOST_TEXTS = 2


def source_code() -> str:
    """Return the middle of some modules of Python's standard library, in a fixed order."""
    return "\n\n\n".join(_middle(file.read_text(encoding="utf-8")) for file in module_files(EVALUATION_MODULES))


def notices() -> str:
    """Return the terms of licences that ONNX Runtime comes with, each paragraph once."""
    texts = [
        path.read_text(encoding="utf-8", errors="replace")
        for file in module_files(("onnxruntime",))
        if (path := file.with_name("ThirdPartyNotices.txt")).is_file()
    ]
    blocks = {" ".join(block.split()): block for text in texts for block in paragraphs(text)}
    return "\n\n".join(block for words, block in blocks.items() if len(words) >= _SHORTEST_NOTICE)


BUILT_IN: Mapping[str, Callable[[], str]] = MappingProxyType(
    {"code": source_code, "offline": offline_evaluation_text, "notices": notices}
)
"""Texts by name; better ones first."""
CONTENTS: Mapping[str, str] = MappingProxyType(
    {"code": "Python source", "offline": "Python's documentation", "notices": "licence texts"}
)
"""What they hold, in words."""
_KINDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"offline": (CALIBRATION_TITLE,), "code": (HUB_SOURCES["pilevel"].title, CODE_TITLE)}
)
"""What a cache's source says where the text's kind was calibrated on."""


def texts_of_other_kinds(source: str) -> tuple[str, ...]:
    """Return the names of two built-in texts of other kinds than the calibration's, whose ``source`` is in words.

    Where there is one only, the other is of a kind that was calibrated on: other modules or topics of it.
    """
    kept = {name: any(title in source for title in _KINDS.get(name, ())) for name in BUILT_IN}
    return tuple(sorted(BUILT_IN, key=kept.__getitem__)[:_MOST_TEXTS])


def _middle(text: str) -> str:
    """Return the whole lines in the middle of ``text``: behind the licence and the imports."""
    start = max(0, (len(text) - _CHARACTERS) // 2)
    return text[start : start + _CHARACTERS].partition("\n")[2].rpartition("\n")[0]
