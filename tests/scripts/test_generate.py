"""Greedy text through onnxruntime-genai: repeatable, bounded, and wrapped in the template where there is one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import transformers

from scripts.generate import generate_sentence, until_sentence_end
from stages.errors import UserError


def test_generation_is_greedy_and_bounded(tiny_model: Path) -> None:
    first = generate_sentence(tiny_model, "The city", 6)
    assert first
    assert first == generate_sentence(tiny_model, "The city", 6)
    longer = generate_sentence(tiny_model, "The city", 12)
    assert longer.startswith(first)
    # A token is at most a few letters here.
    assert len(transformers.AutoTokenizer.from_pretrained(tiny_model)(first)["input_ids"]) <= 6 + 2


def test_a_chat_template_changes_the_prompt(tiny_model: Path, tmp_path: Path) -> None:
    chat = shutil.copytree(tiny_model, tmp_path / "chat")
    template = "{% for message in messages %}Question: {{ message['content'] }} Answer:{% endfor %}"
    (chat / "chat_template.jinja").write_text(template, encoding="utf-8")
    wrapped = generate_sentence(tiny_model, "Question: The city Answer:", 8)
    assert generate_sentence(chat, "The city", 8) == wrapped
    assert wrapped != generate_sentence(tiny_model, "The city", 8)


def test_a_sentence_ends_at_its_mark_or_with_the_text() -> None:
    assert until_sentence_end(["It is 3", ".5 km", ". And", " more."]) == "It is 3.5 km."
    assert until_sentence_end([" no", " end"]) == "no end"
    assert until_sentence_end(["done", "."]) == "done."


def test_a_folder_without_genai_config_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    (copy / "genai_config.json").unlink()
    with pytest.raises(UserError, match=r"has no genai_config\.json"):
        generate_sentence(copy, "x", 4)
