"""A chat template for the tiny tokenizer, and model folders that have it."""

from __future__ import annotations

import shutil
from pathlib import Path

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def with_template(folder: Path, copy: Path, template: str = TEMPLATE) -> Path:
    """Copy a tokenizer's or model's folder, and give the copy a chat template."""
    shutil.copytree(folder, copy)
    (copy / "chat_template.jinja").write_text(template, encoding="utf-8")
    return copy
