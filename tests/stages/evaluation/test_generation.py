"""Answers side by side through onnxruntime-genai."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path

import pytest
from rich.console import Console

from stages.commands.progress import Progress
from stages.evaluation.generation import common_prefix, generate
from stages.runtime.genai import GenaiSession, open_genai

QUIET = Progress(Console(quiet=True))


def test_answers_stand_beside_the_bases(tiny_model: Path, tmp_path: Path) -> None:
    twin = shutil.copytree(tiny_model, tmp_path / "twin")
    found = generate((tiny_model, twin), ("The city", "A list of"), 9, QUIET)
    assert [generation.prompt for generation in found] == ["The city", "A list of"]
    for generation in found:
        base, same = generation.answers
        assert (base.model, same.model) == (tiny_model.name, "twin")
        assert base.text == same.text != ""
        assert base.tokens == base.same_tokens == same.same_tokens == 9
        assert not generation.templated
    assert found[0].answers[0].text != found[1].answers[0].text


def test_where_answers_part_is_counted() -> None:
    assert common_prefix([5, 6, 7], [5, 6, 8, 9]) == 2
    assert common_prefix([5, 6], [5, 6, 8]) == 2
    assert common_prefix([], [1]) == 0


def test_a_template_is_put_around_prompts(tiny_model: Path, tmp_path: Path) -> None:
    chat = shutil.copytree(tiny_model, tmp_path / "chat")
    template = "{% for message in messages %}Question: {{ message['content'] }} Answer:{% endfor %}"
    (chat / "chat_template.jinja").write_text(template, encoding="utf-8")
    (templated,) = generate((chat,), ("The city",), 6, QUIET)
    (plain,) = generate((tiny_model,), ("Question: The city Answer:",), 6, QUIET)
    assert templated.templated
    assert templated.answers[0].text == plain.answers[0].text


def test_the_bases_template_holds_for_all_and_one_model_is_open_at_a_time(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = shutil.copytree(tiny_model, tmp_path / "chat")
    (chat / "chat_template.jinja").write_text("{{ messages[0]['content'] }} Answer:", encoding="utf-8")
    opened: list[weakref.ref[object]] = []

    def open_alone(folder: Path, option: str) -> GenaiSession:
        assert not [one for one in opened if one() is not None]
        session = open_genai(folder, option)
        opened.append(weakref.ref(session.model))
        return session

    monkeypatch.setattr("stages.evaluation.generation.open_genai", open_alone)
    for folders in ((chat, tiny_model), (tiny_model, chat)):
        (found,) = generate(folders, ("The city",), 6, QUIET)
        base, same = found.answers
        assert found.templated == (folders[0] == chat)
        assert same.text == base.text
    assert len(opened) == 4
