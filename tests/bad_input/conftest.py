"""Make a work folder with one good artifact of each kind; it is the current folder and holds temporary files."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.support.commands import Commands


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Quantize the tiny model: INT4 with zero points, one site INT8, and the embedding."""
    from stages.commands.quantize_options import QuantizeConfig
    from stages.quantize import quantize

    folder = tmp_path_factory.mktemp("weights")
    config = QuantizeConfig(
        onnx_path=tiny_model,
        output_path=folder / "out",
        weights_path=folder / "weights",
        algo="rtn_dq",
        target="any",
        block_size=32,
        use_zero_point=True,
        layers_8bit="layers.0/mlp/down_proj",
        gather_quantize_axis=1,
        verify="off",
    )
    quantize(config)
    return folder / "weights"


@pytest.fixture
def work_folder(
    tiny_model: Path,
    tiny_cache: Path,
    tiny_weights: Path,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """Make and enter the folder: base, base.calibration, weights and text.txt."""
    folder = tmp_path / "work"
    for source, name in ((tiny_model, "base"), (tiny_cache, "base.calibration"), (tiny_weights, "weights")):
        shutil.copytree(source, folder / name)
    (folder / "text.txt").write_text(tiny_text.read_text(encoding="utf-8")[:8000], encoding="utf-8")
    (folder / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "temporary"))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def spoken(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Return the command lines; what native libraries print is heard too."""
    return Commands(capfd, monkeypatch)
