"""Errors as one printable sentence."""

from __future__ import annotations

import pytest

from stages.errors import UserError, in_one_line, sentence_of, with_class_name


@pytest.mark.parametrize(
    ("error", "words", "with_class"),
    [
        (ValueError("no such\n  block"), "no such block", "ValueError: no such block"),
        (KeyError(), "KeyError", "KeyError"),
        (OSError(2, "No such file", "x"), "No such file", "FileNotFoundError: No such file"),
        (RuntimeError("word " * 100), "word " * 38 + "word...", "RuntimeError: " + "word " * 38 + "word..."),
    ],
    ids=["two lines", "nothing", "of the system", "a long one"],
)
def test_a_librarys_error_becomes_one_short_line(error: Exception, words: str, with_class: str) -> None:
    assert in_one_line(error) == words
    assert with_class_name(error) == with_class


def test_names_from_damaged_files_can_be_printed() -> None:
    sentence = sentence_of(UserError("no weight 'a\nb\ud800' in the file"))
    assert sentence == "no weight 'a b\\ud800' in the file"
    sentence.encode("utf-8")
