"""Small configurations for the tests of previews."""

from __future__ import annotations

from pathlib import Path

from genai_quant import CalibrateConfig, QuantizeConfig


def calibration(model: Path, folder: Path) -> CalibrateConfig:
    """Return a calibration on 11 windows of 32 tokens, one more held out."""
    return CalibrateConfig(
        onnx_path=model,
        use_random_calib=True,
        calib_size=12,
        seq_len=32,
        batch_size=5,
        calibration_eps="cpu",
        device="cpu",
        cache_dir=folder / "cache",
    )


def quantization(model: Path, folder: Path, algo: str) -> QuantizeConfig:
    return QuantizeConfig(
        onnx_path=model,
        output_path=folder / "int4",
        cache_dir=folder / "cache",
        algo=algo,
        target="any",
        block_size=16,
        device="cpu",
    )
