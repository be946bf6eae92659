"""What the model writes is drawn from its own distribution, and each reason why it can't write is named."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stages.calibration.text.generation_script import GenerationScript, Turn
from stages.calibration.text.sampler import Sampler, end_tokens, open_sampler, sample
from stages.errors import UserError
from stages.model.directory import ModelDirectory, locate_model
from stages.runtime.feeds import CausalFeeds
from stages.runtime.providers import CPU, CUDA
from stages.runtime.session import SessionSettings, open_session
from tests.reference.sampling import draw

BOS, EOS, VOCABULARY = 0, 1, 300
TEXT = GenerationScript(
    kind="text", opening=(BOS,), turns=(Turn(ends=frozenset({EOS}), at_most=None, then=(EOS, BOS)),)
)
CHAT = GenerationScript(kind="chat", opening=(BOS, 60, 61), turns=(Turn(ends=frozenset(), at_most=5, then=(70, EOS)),))


def uniforms_of(windows: int, length: int) -> np.ndarray:
    return np.random.default_rng(5).random((windows, length))


def generate(sampler: Sampler, scripts: list[GenerationScript], uniforms: np.ndarray) -> np.ndarray:
    return sampler.generate(scripts, uniforms, lambda _: None)


def opened(folder: Path) -> Sampler:
    return open_sampler(locate_model(folder), (CPU,), (TEXT, CHAT), VOCABULARY)


def test_sampling_is_the_slow_drawing_from_a_softmax() -> None:
    generator = np.random.default_rng(0)
    logits = (5 * generator.standard_normal((200, 40))).astype(np.float32)
    uniforms = generator.random(200)
    expected = [draw(row, value) for row, value in zip(logits.tolist(), uniforms.tolist(), strict=True)]
    assert sample(logits, uniforms).tolist() == expected
    # The ends of the range, and a token that can't come.
    edges = np.array([[0, -np.inf, 0], [0, -np.inf, 0]], np.float32)
    assert sample(edges, np.array([0.4999, 0.5])).tolist() == [0, 2]


def test_the_rarest_tokens_come_as_often_as_they_should() -> None:
    """No tail is cut off: a half of the probability lies on tokens of 1 in 2000 each."""
    logits = np.log(np.array([0.5] + [0.0005] * 1000, np.float32))
    drawn = sample(np.tile(logits, (4000, 1)), np.random.default_rng(1).random(4000))
    # Binomial: standard deviation 32; five of them.
    assert abs((drawn == 0).sum() - 2000) < 160
    assert len(set(drawn.tolist())) > 800


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinite_logits_are_refused(value: float) -> None:
    with pytest.raises(UserError, match="logits are NaN or infinite"):
        sample(np.array([[0, value, 1]], np.float32), np.array([0.5]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tiny_model", "tiny_model_dml"], ids=["fp32", "fp16 with position ids"])
def test_each_token_is_drawn_from_what_the_model_says_of_those_before(
    kind: str, request: pytest.FixtureRequest
) -> None:
    """One full forward pass a window, without cache and runtime, gives the same distribution at every place."""
    directory = locate_model(request.getfixturevalue(kind))
    sampler = open_sampler(directory, (CPU,), (TEXT, CHAT), VOCABULARY)
    uniforms = uniforms_of(4, 40)
    windows = generate(sampler, [TEXT, CHAT, TEXT, CHAT], uniforms)
    session = open_session(directory.onnx_file, SessionSettings())
    feeds = CausalFeeds.of(session, directory)
    logits = session.run(["logits"], feeds(windows))[0].astype(np.float32)
    logits[:, :, sampler.suppressed_token] = -np.inf
    # What fp16 rounds differently in the cache moves probabilities by a thousandth.
    low, high = (
        np.stack(
            [sample(logits[:, place - 1], np.clip(uniforms[:, place] + shift, 0, 1 - 1e-9)) for place in range(1, 40)]
        )
        for shift in (-2e-3, 2e-3)
    )
    found = windows[:, 1:].T
    drawn = (low <= found) & (found <= high)
    given = np.isin(found, [BOS, EOS, 60, 61, 70])
    assert (drawn | given).all()
    assert drawn.mean() > 0.7


@pytest.mark.parametrize("value", ["2,1", ""])
def test_models_open_with_every_legal_omp_num_threads(
    value: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert generate(opened(tiny_model), [TEXT], uniforms_of(1, 4)).shape == (1, 4)


def test_the_same_uniforms_write_the_same_and_each_window_its_own(tiny_model: Path) -> None:
    sampler, uniforms = opened(tiny_model), uniforms_of(3, 24)
    first = generate(sampler, [TEXT] * 3, uniforms)
    np.testing.assert_array_equal(first, generate(sampler, [TEXT] * 3, uniforms))
    assert len({tuple(window) for window in first.tolist()}) == 3
    # Other windows in its batch change nothing but the rounding of sums.
    np.testing.assert_array_equal(first[1:2], generate(sampler, [TEXT], uniforms[1:2]))


def test_writing_goes_on_behind_an_end_token_and_padding(tiny_model: Path) -> None:
    """The model's own configuration ends generation at </s> and takes it for padding."""
    assert end_tokens(locate_model(tiny_model)) == {EOS}
    ends = GenerationScript(kind="text", opening=(EOS,), turns=(Turn(ends=frozenset(), at_most=2, then=(EOS,)),))
    windows = generate(opened(tiny_model), [ends] * 2, uniforms_of(2, 30))
    assert (windows[:, ::3] == EOS).all()
    assert len(set(windows.reshape(-1).tolist())) > 10


def test_tokens_that_the_tokenizer_lacks_and_the_suppressed_one_never_come(tiny_model: Path) -> None:
    few = open_sampler(locate_model(tiny_model), (CPU,), (TEXT,), 40)
    assert few.suppressed_token == VOCABULARY - 1
    assert generate(few, [TEXT] * 4, uniforms_of(4, 60)).max() < 40
    whole = opened(tiny_model)
    assert (generate(whole, [TEXT] * 4, uniforms_of(4, 60)) != whole.suppressed_token).all()
    assert open_sampler(locate_model(tiny_model), (CPU,), (replace(TEXT, opening=(299,)),), 300).suppressed_token == 298


def test_windows_may_be_shorter_than_attention_that_slides(tiny_model: Path) -> None:
    """The runtime refuses a cache with less room than such attention looks back."""
    directory = replace(locate_model(tiny_model), windowed_caches={"past_key_values.0.key": 40})
    sampler = open_sampler(directory, (CPU,), (TEXT,), VOCABULARY)
    assert sampler.shortest_cache == 40
    uniforms = uniforms_of(2, 8)
    np.testing.assert_array_equal(
        generate(sampler, [TEXT] * 2, uniforms), generate(opened(tiny_model), [TEXT] * 2, uniforms)
    )


def test_a_provider_that_fails_leaves_the_work_to_the_next(tiny_model: Path) -> None:
    sampler = open_sampler(locate_model(tiny_model), (CUDA, CPU), (TEXT,), VOCABULARY)
    assert generate(sampler, [TEXT], uniforms_of(1, 8)).shape == (1, 8)


def test_without_the_runtime_its_package_is_named(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(UserError, match=r"onnxruntime-genai can't be imported .* 'pip install onnxruntime-genai'"):
        opened(tiny_model)


def test_without_genai_config_the_file_is_named(tiny_model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    (copy / "genai_config.json").unlink()
    with pytest.raises(UserError, match=r"copy has no genai_config\.json, without which onnxruntime-genai can't run"):
        end_tokens(locate_model(copy))


def test_a_configuration_without_a_vocabulary_is_named(tiny_model: Path) -> None:
    directory: ModelDirectory = replace(locate_model(tiny_model), vocab_size=None)
    with pytest.raises(UserError, match=r"genai_config\.json gives no vocab_size"):
        open_sampler(directory, (CPU,), (TEXT,), VOCABULARY)


@pytest.mark.slow
def test_a_model_that_the_cpu_has_no_kernels_for_is_refused_with_the_reason(tiny_model_bf16: Path) -> None:
    with pytest.raises(UserError, match=r"^--dataset self: onnxruntime-genai can't run .*model\.onnx here \(cpu: "):
        opened(tiny_model_bf16)
