"""Share lm-eval's own model between the tests of tasks and of our adapter."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def hugging_face(tiny_hf: Path):
    """lm-eval's own model of the same weights."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(tiny_hf), device="cpu", dtype="float32", batch_size=3)
