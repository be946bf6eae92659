"""Every architecture that the installed builder knows has a tiny model here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.architectures.configs import ARCHITECTURES


def test_every_architecture_of_the_installed_builder_has_a_tiny_model() -> None:
    builder = pytest.importorskip("onnxruntime_genai.models.builder")
    source = Path(builder.__file__).read_text(encoding="utf-8")
    known = set(re.findall(r'config\.architectures\[0\] == "(\w+)"', source))
    assert len(known) > 30
    # The same code of another name: it only dequantizes first.
    assert known - {"ChatGLMForConditionalGeneration"} == {one.name.partition(" (")[0] for one in ARCHITECTURES}
