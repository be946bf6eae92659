"""stages.calibrate with a provider that this machine doesn't have: what it would be given, and what is said."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
import pytest

from stages.runtime.providers import CPU, NV_TENSORRT_RTX
from tests.support.commands import Commands


def test_nv_tensorrt_rtx_is_given_the_shapes_of_the_models_own_inputs(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[tuple[str, dict[str, str]]]] = []

    class WithoutTheProvider(ort.InferenceSession):
        def __init__(self, *model: object, providers: list, enable_fallback: int = 1) -> None:
            there = [pair for pair in providers if pair[0] != NV_TENSORRT_RTX]
            if there != providers:
                asked.append(providers)
            super().__init__(*model, providers=there, enable_fallback=enable_fallback)

    monkeypatch.setattr(ort, "InferenceSession", WithoutTheProvider)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [NV_TENSORRT_RTX, CPU])
    code, printed = commands.calibrate(
        "--onnx_path", tiny_model, "--dataset", tiny_text, "--calib_size", 4, "--seq_len", 16, "--batch_size", 2,
        "--cache_dir", tmp_path / "cache", "--calibration_eps", "NvTensorRtRtx,dml,cpu",
    )  # fmt: skip
    assert code == 0, printed
    (name, options), (last, none) = asked[0]
    assert (name, last, none) == (NV_TENSORRT_RTX, CPU, {})
    caches = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value") for layer in (0, 1)]
    # The graph fixes 2 key/value heads; the head size 16 comes from genai_config.json.
    for kind, tokens, mask, past in (("min", "1x1", "1x1", "1x2x0"), ("max", "2x16", "2x32", "2x2x16")):
        shapes = [f"input_ids:{tokens}", f"attention_mask:{mask}", *(f"{cache}:{past}x16" for cache in caches)]
        assert sorted(options[f"nv_profile_{kind}_shapes"].split(",")) == sorted(shapes)
    assert "dml: this onnxruntime package was built without it" in printed
    assert "NvTensorRtRtx: ONNX Runtime could not load it" in printed
    lines = [line for line in printed.splitlines() if "ran on" in line]
    assert CPU in lines[0]
    assert NV_TENSORRT_RTX not in lines[0]
