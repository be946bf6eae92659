"""Scales of a quantized key/value cache hold at every position, and onnxruntime-genai's builder takes them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

import stages.calibration.run
from stages.calibration.cache import find_cache
from stages.calibration.key_value_scales import (
    SCALES,
    KeyValueCache,
    KeyValueMaxima,
    Rotation,
    envelope,
    find_key_value_caches,
    scales_text,
)
from stages.calibration.run import calibrate
from stages.commands.calibrate_options import CalibrateConfig, KeyValueScales
from stages.errors import CacheMismatch, GraphError, OptionError
from stages.model.directory import locate_model
from stages.model.load import load_graph
from stages.runtime.providers import choose_providers
from stages.runtime.tap import open_value_tap
from tests.support.encoders import save_vision
from tests.support.tiny_models import build_genai_model


def turned(keys: Tensor, angle: float, rotation: Rotation) -> Tensor:
    """Turn every pair of a head by ``angle``, one after the other."""
    found, size = keys.clone(), rotation.size or len(keys)
    for pair in range(size // 2):
        first, second = (2 * pair, 2 * pair + 1) if rotation.interleaved else (pair, pair + size // 2)
        x, y = float(keys[first]), float(keys[second])
        found[first] = x * math.cos(angle) - y * math.sin(angle)
        found[second] = x * math.sin(angle) + y * math.cos(angle)
    return found


@pytest.mark.parametrize("rotation", [Rotation(size=None, interleaved=False), Rotation(size=4, interleaved=True)])
def test_the_envelope_is_the_most_that_any_position_gives(rotation: Rotation) -> None:
    keys = torch.randn(8, generator=torch.Generator().manual_seed(0))
    angles = [2 * math.pi * step / 720 for step in range(720)]
    most = torch.stack([turned(keys, angle, rotation).abs() for angle in angles]).amax(0)
    found = envelope(keys, rotation)
    assert bool((found >= most - 1e-6).all())
    assert torch.allclose(found, most, rtol=1e-4)
    assert torch.allclose(envelope(turned(keys, 1.1, rotation), rotation), found, atol=1e-6)


def test_the_builder_gives_layers_and_rotation(tiny_model: Path, tiny_model_dml: Path) -> None:
    for folder in (tiny_model, tiny_model_dml):
        caches = find_key_value_caches(load_graph(locate_model(folder)))
        assert [(cache.layer, cache.keys, cache.values) for cache in caches] == [
            (layer, f"present.{layer}.key", f"present.{layer}.value") for layer in (0, 1)
        ]
        assert {(cache.rotation or Rotation(size=1, interleaved=True)).interleaved for cache in caches} == {False}


def test_a_model_without_such_a_cache_is_refused() -> None:
    model = ir.Model(ir.Graph([], [], nodes=[], name="empty", opset_imports={"": 21}), ir_version=10)
    with pytest.raises(GraphError, match="GroupQueryAttention nodes, of which the model has 0"):
        find_key_value_caches(model)


def test_the_largest_of_all_batches_counts_and_infinite_ones_are_refused() -> None:
    cache = KeyValueCache(layer=3, keys="k", values="v", rotation=None)
    maxima = KeyValueMaxima(caches=(cache,))
    for value in (torch.tensor([[[[1.0, -4.0]]]]), torch.tensor([[[[-2.0, 3.0]]]])):
        maxima.add("k", maxima.largest("k", value))
        maxima.add("v", maxima.largest("v", value.half()))
    assert json.loads(scales_text((cache,), maxima.found, "per_channel")) == {
        "scales": {"k_scales": [[2 / 128, 4 / 128]], "v_scales": [[2 / 128, 4 / 128]]},
        "qmax": 128.0,
        "layer_ids": [3],
    }
    assert json.loads(scales_text((cache,), maxima.found, "per_tensor"))["scales"]["k_scales"] == [[4 / 128]]
    maxima.add("k", torch.tensor([math.inf, 0.0]))
    with pytest.raises(GraphError, match="'k' holds NaN or infinite"):
        scales_text((cache,), maxima.found, "per_channel")


def config_of(model: Path, text: Path, folder: Path, scales: KeyValueScales, **options: str) -> CalibrateConfig:
    return CalibrateConfig(
        onnx_path=model,
        dataset=str(text),
        calib_size=4,
        seq_len=24,
        batch_size=2,
        cache_dir=folder,
        kv_scales=scales,
        token_weights="none",
        **options,  # type: ignore[arg-type]
    )


def obvious_maxima(model: Path, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """The present outputs of every window, looked at with loops over heads and pairs."""
    names = ("present.0.key", "present.0.value", "present.1.key", "present.1.value")
    directory = locate_model(model)
    found: dict[str, np.ndarray] = {}
    with open_value_tap(load_graph(directory), directory, names, choose_providers("cpu"), {}) as tap:
        for window in tokens:
            for name, value in tap.run(window[None]):
                numbers = value[0].numpy()  # [heads, tokens, size]
                most = np.abs(numbers).max(axis=1)
                if name.endswith("key"):
                    half = numbers.shape[-1] // 2
                    for head in range(len(numbers)):
                        for pair in range(half):
                            length = np.hypot(numbers[head, :, pair], numbers[head, :, pair + half]).max()
                            most[head, pair] = most[head, pair + half] = length
                found[name] = np.maximum(found.get(name, 0), most)
    return found


def present(model: Path, names: tuple[str, ...], tokens: np.ndarray) -> dict[str, np.ndarray]:
    directory = locate_model(model)
    with open_value_tap(load_graph(directory), directory, names, choose_providers("cpu"), {}) as tap:
        return {name: value.numpy() for name, value in tap.run(tokens)}


@pytest.mark.slow
def test_stage_one_writes_what_the_builder_takes(
    tiny_hf: Path, tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    made = calibrate(config_of(tiny_model, tiny_text, tmp_path / "cache", "per_channel", max_memory="40KB"))
    assert made.made is not None
    assert made.made.partitions > 1
    assert made.kv_scales == tmp_path / "cache" / SCALES
    scales = json.loads(made.kv_scales.read_text())
    cache = find_cache(tmp_path / "cache")
    assert cache is not None
    expected = obvious_maxima(tiny_model, np.concatenate(cache.read_tokens()))
    for kind in ("key", "value"):
        for place, layer in enumerate(scales["layer_ids"]):
            found = np.array(scales["scales"][f"{kind[0]}_scales"][place]) * 128
            np.testing.assert_allclose(found, expected[f"present.{layer}.{kind}"].reshape(-1), rtol=1e-5)
    options = ("kv_cache_quant_scheme=int8_per_channel", f"kv_cache_scale_file={made.kv_scales}")
    build_genai_model(tiny_hf, tmp_path / "int8", "fp32", "cpu", *options)
    window = cache.read_tokens()[0][:1]
    names = ("present.0.key", "present.0.value")
    floats, codes = (present(folder, names, window) for folder in (tiny_model, tmp_path / "int8"))
    for name in names:
        scales_of = expected[name][None, :, None, :] / 128
        assert codes[name].dtype == np.int8
        # Half a code, and a whole one for the largest number: codes end at 127.
        assert (np.abs(codes[name] * scales_of - floats[name]) <= 1.001 * scales_of).all()
    again = calibrate(config_of(tmp_path / "int8", tiny_text, tmp_path / "second", "none"))
    assert again.activations == made.activations


@pytest.mark.thorough
@pytest.mark.slow
def test_the_builder_turns_the_scales_to_four_bits_and_the_cpu_runs_them(
    tiny_hf: Path, tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    made = calibrate(config_of(tiny_model, tiny_text, tmp_path / "cache", "per_channel"))
    options = ("kv_cache_quant_scheme=int4_per_channel", f"kv_cache_scale_file={made.kv_scales}")
    build_genai_model(tiny_hf, tmp_path / "int4", "fp32", "cpu", *options)
    cache = find_cache(tmp_path / "cache")
    assert cache is not None
    window = cache.read_tokens()[0][:1]
    names = ("present.0.key", "present.0.value")
    expected = obvious_maxima(tiny_model, np.concatenate(cache.read_tokens()))
    floats, codes = (present(folder, names, window) for folder in (tiny_model, tmp_path / "int4"))
    for name in names:
        scales_of = expected[name][None, :, None, :] / 8
        assert codes[name].dtype == np.uint8
        pairs = np.stack([codes[name] & 15, codes[name] >> 4], axis=-1).reshape(floats[name].shape)
        # Half a code, and a whole one for the largest number: codes end at 7.
        assert (np.abs((pairs.astype(int) - 8) * scales_of - floats[name]) <= 1.001 * scales_of).all()


def test_one_scale_a_layer_comes_from_the_same_cache(tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    calibrate(config_of(tiny_model, tiny_text, folder, "none"))
    assert not (folder / SCALES).exists()
    with pytest.raises(CacheMismatch, match=r"no largest keys and values \(--kv_scales\)"):
        calibrate(config_of(tiny_model, tiny_text, folder, "per_tensor"))
    before = find_cache(folder)
    calibrate(config_of(tiny_model, tiny_text, folder, "per_channel", overwrite=True))  # type: ignore[arg-type]
    by_channel = json.loads((folder / SCALES).read_text())["scales"]["v_scales"]
    assert calibrate(config_of(tiny_model, tiny_text, folder, "per_tensor")).made is None
    by_tensor = json.loads((folder / SCALES).read_text())["scales"]["v_scales"]
    assert by_tensor == [[max(each)] for each in by_channel]
    after = find_cache(folder)
    assert before is not None
    assert after is not None
    assert after.manifest.key.digest() == before.manifest.key.digest(), "searched weights stay valid"
    assert calibrate(config_of(tiny_model, tiny_text, folder, "none")).made is None


def test_samples_have_no_caches_to_measure(tmp_path: Path) -> None:
    save_vision(tmp_path / "model")
    np.save(tmp_path / "x.npy", np.zeros((8, 4), np.float32))
    config = config_of(tmp_path / "model", tmp_path, tmp_path / "cache", "per_tensor", samples=str(tmp_path / "x.npy"))
    with pytest.raises(OptionError, match=r"--kv_scales is measured on text, .*; leave it out"):
        calibrate(config)


def test_a_model_without_such_caches_is_refused_before_text_is_read(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(_: ir.Model) -> None:
        raise GraphError("no caches")

    monkeypatch.setattr(stages.calibration.run, "find_key_value_caches", none)
    monkeypatch.setattr(stages.calibration.run, "load_windows", lambda *_: pytest.fail("text is read"))
    with pytest.raises(GraphError, match="no caches"):
        calibrate(config_of(tiny_model, tiny_text, tmp_path / "cache", "per_tensor"))
