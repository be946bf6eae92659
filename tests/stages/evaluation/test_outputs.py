"""Cosine similarity and relative error of outputs, beside their definitions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from stages.commands.progress import progress_bar
from stages.errors import UserError
from stages.evaluation.outputs import JudgedSamples, compare_outputs, cosine_similarity
from stages.evaluation.records import OutputEvaluation
from stages.model.directory import locate_model
from stages.runtime.session import SessionSettings
from tests.support.encoders import save_vision


def slow_cosine(first: list[float], second: list[float]) -> float:
    dot = sum(a * b for a, b in zip(first, second, strict=True))
    return dot / math.sqrt(sum(a * a for a in first) * sum(b * b for b in second))


def test_cosine_similarity_is_that_of_its_definition() -> None:
    first, second = np.random.default_rng(0).standard_normal((2, 5, 7))
    expected = [slow_cosine(*rows) for rows in zip(first.tolist(), second.tolist(), strict=True)]
    np.testing.assert_allclose(cosine_similarity(first, second), expected, rtol=1e-12)
    zeros = np.zeros((1, 3))
    assert cosine_similarity(zeros, zeros).tolist() == [1]
    assert cosine_similarity(zeros, np.ones((1, 3))).tolist() == [0]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision") / "base"
    save_vision(folder)
    return folder


def judged(count: int = 3) -> JudgedSamples:
    pixels = np.random.default_rng(4).standard_normal((count, 1, 3, 16, 16)).astype(np.float32)
    return JudgedSamples(samples=tuple({"pixel_values": each} for each in pixels), source="noise")


def compared(base: Path, model: Path, samples: JudgedSamples) -> OutputEvaluation:
    with progress_bar() as bar:
        return compare_outputs(locate_model(base), [locate_model(model)], samples, SessionSettings(), bar)


def changed(base: Path, folder: Path, change: float) -> Path:
    """Save the base with noise of relative size ``change`` on its last weight."""
    model = ir.load(base / "model.onnx")
    weight = model.graph.initializers["image_features.weight"]
    array = weight.const_value.numpy()
    noise = np.random.default_rng(5).standard_normal(array.shape)
    weight.const_value = ir.tensor((array * (1 + change * noise)).astype(np.float32), name=weight.name)
    folder.mkdir()
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    return folder


def test_scores_are_those_of_outputs_computed_apart(base: Path, tmp_path: Path) -> None:
    model, samples = changed(base, tmp_path / "changed", 0.1), judged()
    found = compared(base, model, samples)
    outputs = []
    for folder in (base, model):
        session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
        outputs.append(np.concatenate([session.run(None, dict(sample))[0] for sample in samples.samples]))
    rows = [each.reshape(-1, each.shape[-1]).tolist() for each in outputs]
    cosines = [slow_cosine(*pair) for pair in zip(*rows, strict=True)]
    (score,) = found.rows[1].scores
    assert (score.output, score.vectors, found.samples) == ("image_features", 3 * 16, 3)
    assert score.cosine == pytest.approx(np.mean(cosines), rel=1e-6)
    assert score.worst_cosine == pytest.approx(min(cosines), rel=1e-6)
    error = np.linalg.norm(outputs[1] - outputs[0]) / np.linalg.norm(outputs[0])
    assert score.relative_error == pytest.approx(error, rel=1e-5)
    assert 0.01 < score.relative_error < 0.5
    assert found.rows[0].scores == ()


def test_the_base_itself_has_no_error(base: Path) -> None:
    (score,) = compared(base, base, judged()).rows[1].scores
    assert score.relative_error == 0
    assert score.worst_cosine == pytest.approx(1, abs=1e-12)


def test_values_that_are_not_finite_are_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gives NaN or infinite values as output 'image_features'"):
        compared(base, changed(base, tmp_path / "changed", math.inf), judged())


def test_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    model = ir.load(base / "model.onnx")
    model.graph.outputs[0].name = "other"
    (tmp_path / "other").mkdir()
    ir.save(model, tmp_path / "other" / "model.onnx", external_data="model.onnx.data")
    with pytest.raises(UserError, match=r"as output 'image_features', and .* has none"):
        compared(base, tmp_path / "other", judged())
