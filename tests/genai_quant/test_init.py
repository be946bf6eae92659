"""The stages as functions: results come back, nothing is printed, errors are raised."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import genai_quant
from genai_quant import CalibrateConfig, EvaluateConfig, ExportConfig, QuantizeConfig, UserError
from stages.quantization.weights.store import open_store


@pytest.mark.slow
def test_from_calibration_to_evaluation(
    tiny_model: Path, tiny_text: Path, unseen_text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    calibration = CalibrateConfig(
        onnx_path=tiny_model, dataset=str(tiny_text), calib_size=4, seq_len=32, cache_dir=tmp_path / "cache"
    )
    made = genai_quant.calibrate(calibration)
    assert (made.cache, made.key.calibration_windows, made.key.held_out_windows) == (tmp_path / "cache", 3, 1)
    assert genai_quant.calibrate(calibration).made is None, "it is there already"

    config = QuantizeConfig(
        onnx_path=tiny_model, output_path=tmp_path / "int4", cache_dir=made.cache, algo="awq_lite", block_size=16
    )
    planned = genai_quant.preview(config)
    assert not (tmp_path / "int4").exists()
    model = genai_quant.quantize(config)
    assert model.folder == tmp_path / "int4"
    assert model.onnx_file == tmp_path / "int4" / "model.onnx"
    assert len(open_store(model.weights).recipe.groups) == 9
    assert {site.name for site in planned.sites if site.bits is not None} == {site.site for site in model.search.sites}
    assert model.export.report is not None

    again = genai_quant.export(
        ExportConfig(
            onnx_path=tiny_model,
            weights_path=model.weights,
            output_path=tmp_path / "nbits",
            weight_operator="matmul_nbits",
        )
    )
    assert again.onnx_file.is_file()
    found = genai_quant.evaluate(
        EvaluateConfig(base=tiny_model, model=(model.folder,), text=str(unseen_text), windows=2, seq_len=32)
    )
    assert [row.name for row in found.rows] == [tiny_model.name, "int4"]
    assert found.rows[1].accuracy.mean_divergence > 0
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda base: genai_quant.calibrate(CalibrateConfig(onnx_path=base / "x")), "does not exist"),
        (lambda base: genai_quant.calibrate(CalibrateConfig(onnx_path=base, calib_size=1)), "--calib_size must be"),
        (
            lambda base: genai_quant.quantize(QuantizeConfig(onnx_path=base, output_path=base, algo="rtn_dq")),
            "the base model",
        ),
        (
            lambda base: genai_quant.quantize(QuantizeConfig(onnx_path=base, output_path=base / "x", dry_run=True)),
            "call preview",
        ),
        (
            lambda base: genai_quant.export(
                ExportConfig(onnx_path=base, weights_path=base / "x", output_path=base / "y")
            ),
            "is not a folder; pass the folder",
        ),
    ],
    ids=["no model", "a bad option", "the base as output", "a dry run", "no weights"],
)
def test_errors_are_raised(call: object, words: str, tiny_model: Path) -> None:
    assert callable(call)
    with pytest.raises(UserError, match=words):
        call(tiny_model)


def test_results_are_frozen() -> None:
    assert dataclasses.fields(genai_quant.QuantizedModel)
    with pytest.raises(dataclasses.FrozenInstanceError):
        CalibrateConfig(onnx_path=Path("x")).calib_size = 3  # type: ignore[misc]


def test_what_is_exported_is_documented() -> None:
    text = (Path(__file__).parent.parent.parent / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    for name in genai_quant.__all__:
        assert f"`{name}" in text, name
        assert getattr(genai_quant, name).__doc__, name
