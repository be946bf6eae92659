"""Answers side by side through onnxruntime-genai."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from rich.console import Console

from stages.commands.progress import Progress
from stages.errors import UserError
from stages.evaluation.generation import common_prefix, generate
from stages.runtime.genai import open_genai, require_genai

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


def test_generation_past_the_end_token_has_its_full_length(tiny_model: Path) -> None:
    session = open_genai(tiny_model, "--speed", threads=1)
    assert len(list(session.greedy([0, 5, 9], 17, past_the_end=True))) == 17


def test_a_runtime_that_is_missing_is_one_sentence(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(UserError, match="--speed needs onnxruntime-genai, which can't be imported"):
        require_genai([tiny_model], "--speed")


def test_a_folder_without_configuration_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    (copy / "genai_config.json").unlink()
    with pytest.raises(UserError, match=r"--generate .*copy has no genai_config\.json"):
        require_genai([tiny_model, copy], "--generate")
