"""Texts to evaluate on that need no download."""

from __future__ import annotations

import pytest

from stages.calibration.text.offline import CALIBRATION_TITLE
from stages.evaluation.texts import BUILT_IN, texts_of_other_kinds


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
    ],
)
def test_texts_are_of_other_kinds_than_the_calibration(source: str, wanted: tuple[str, ...]) -> None:
    assert texts_of_other_kinds(source) == wanted
