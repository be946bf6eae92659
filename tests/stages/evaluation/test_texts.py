"""Texts to evaluate on that need no download."""

from __future__ import annotations

import pytest

from stages.calibration.text.offline import CALIBRATION_TITLE, CODE_MODULES, CODE_TITLE, code_documents
from stages.evaluation.texts import BUILT_IN, EVALUATION_MODULES, texts_of_other_kinds


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_text_is_long_enough_and_always_the_same(name: str) -> None:
    text = BUILT_IN[name]()
    assert len(text) > 40_000
    assert text == BUILT_IN[name]()


def test_code_is_code_and_notices_are_prose_without_repetition() -> None:
    assert BUILT_IN["code"]().count("\n    def ") > 40
    blocks = BUILT_IN["notices"]().split("\n\n")
    assert len(blocks) == len(set(blocks))


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("", ("code", "offline")),
        ("cnn_dailymail train", ("code", "offline")),
        (f"offline: {CALIBRATION_TITLE} + the model's own 8 texts", ("code", "notices")),
        ("pile-val-backup validation", ("offline", "notices")),
        (f"the model's own 8 texts + offline: {CALIBRATION_TITLE} + code: {CODE_TITLE}", ("notices", "code")),
    ],
)
def test_texts_are_of_other_kinds_than_the_calibration(source: str, wanted: tuple[str, ...]) -> None:
    assert texts_of_other_kinds(source) == wanted


def test_no_source_that_is_calibrated_on_is_evaluated_on() -> None:
    assert not set(CODE_MODULES) & set(EVALUATION_MODULES)
    read = {line.strip() for document in code_documents() for line in document.splitlines()}
    lines = [line.strip() for line in BUILT_IN["code"]().splitlines() if len(line.strip()) > 40]
    assert sum(line in read for line in lines) < 0.02 * len(lines)
