"""The offline text repeats nothing, and evaluation text is never calibrated on."""

from __future__ import annotations

from pydoc_data.topics import topics

from stages.calibration.text.offline import (
    code_documents,
    gather,
    language_documents,
    offline_calibration_documents,
    offline_evaluation_text,
    paragraphs,
)


def normalized(text: str) -> list[str]:
    return [" ".join(block.split()) for block in text.split("\n\n") if block.split()]


def test_no_paragraph_occurs_twice_and_none_in_both_parts() -> None:
    evaluation = normalized(offline_evaluation_text())
    calibration = [block for document in offline_calibration_documents() for block in normalized(document)]
    assert len(set(evaluation)) == len(evaluation)
    assert len(set(calibration)) == len(calibration)
    assert not set(evaluation) & set(calibration)


def test_the_topics_do_repeat_paragraphs() -> None:
    # If CPython stops repeating itself, the removal above is untested.
    everything = [block for topic in topics.values() for block in normalized(topic)]
    assert len(everything) > 1.2 * len(set(everything))


def test_evaluation_is_about_a_fifth() -> None:
    evaluation = len(offline_evaluation_text())
    calibration = sum(map(len, offline_calibration_documents()))
    assert 0.1 < evaluation / (evaluation + calibration) < 0.3
    assert calibration > 200_000


def test_paragraphs_keep_their_own_line_breaks() -> None:
    assert paragraphs("one\n  two\n\n \n\nthree\n") == ["one\n  two", "three"]


def test_gathered_documents_reach_the_size_and_lose_nothing() -> None:
    assert list(gather(["aaa", "bbb", "cc", "d"], 5)) == ["aaa\n\nbbb", "cc\n\nd"]
    assert list(gather(["aaaaaa", "b"], 5)) == ["aaaaaa", "b"]


def test_code_and_languages_are_there_and_of_many_kinds() -> None:
    code = "\n".join(code_documents())
    assert "\nclass _Pickler" in code
    assert "template <" in code
    languages = "".join(language_documents())
    words = "الإنسان", "世界人权", "世界人権宣言", "인권", "मानव", "прав", "droits", "direitos", "derechos", "quyền"
    assert [word for word in words if word not in languages] == []
