"""Held-out texts: markup and odd spaces go, sentences stay; no domain is chosen on and reported."""

from __future__ import annotations

from scripts.held_out_texts import CHOOSING, REPORTING, markdown, plain_text, with_usual_spaces


def test_a_page_of_wikipedia_becomes_paragraphs() -> None:
    page = (
        "{{Infobox|a={{b}}}}\n[[File:x.png|thumb|See [[this|that]].]]'''Iron''' is a [[metal]]<ref name=x>No. {{c}}"
        "</ref> of [[Earth|the Earth]].\n== Uses ==\n* A list.\n{|\n| A table.\n|}\nIt [http://a.b rusts]<!-- no -->."
    )

    assert plain_text(page) == "Iron is a metal of the Earth.\n\nIt rusts."


def test_spaces_between_signs_go() -> None:
    assert with_usual_spaces("Ja ! Wir ( alle ) _ auch ich , Frau X .") == "Ja! Wir (alle) – auch ich, Frau X."  # noqa: RUF001


def test_records_become_a_table() -> None:
    assert markdown([{"a": 1, "b": None}]) == "| a | b |\n| --- | --- |\n| 1 | None |"


def test_nothing_is_chosen_on_a_domain_that_is_reported() -> None:
    assert {each.name for each in CHOOSING}.isdisjoint(each.name for each in REPORTING)
    assert "news" in {each.name for each in REPORTING}
