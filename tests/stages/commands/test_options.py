"""What the options of all commands share."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.commands.calibrate_options import CalibrateConfig
from stages.commands.evaluate_options import EvaluateConfig
from stages.commands.options import default_folder, given_options
from stages.commands.parsing import parse_options
from stages.errors import OptionError


def test_a_model_at_the_root_of_a_disk_is_named() -> None:
    with pytest.raises(OptionError, match=r"^/model.onnx lies at the root of a disk; put it into a folder\.$"):
        default_folder(Path("/model.onnx"), ".weights")
    assert default_folder(Path("/models/base/MODEL.ONNX"), ".weights") == Path("/models/base.weights")
    assert default_folder(Path("models/base"), ".weights") == Path("models/base.weights"), "as it was typed"
    here = Path.cwd()
    assert default_folder(Path("model.onnx"), ".weights") == here.with_name(f"{here.name}.weights")


def test_options_that_were_given_are_written_as_they_are_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    given = EvaluateConfig(base=Path("a base"), model=(Path("x"), Path("y")), speed=True, windows=3)
    words = given_options(given)
    assert words == ["--base", "a base", "--model", "x", "y", "--windows", "3", "--speed"]
    monkeypatch.setattr("sys.argv", ["evaluate", *words])
    assert parse_options(EvaluateConfig, "evaluate") == given


@pytest.mark.parametrize("samples", ["one,other", "vision=one,vision=other"])
def test_samples_are_named_once_for_a_component(samples: str) -> None:
    with pytest.raises(OptionError, match="names files twice for a component"):
        CalibrateConfig(onnx_path=Path("model"), samples=samples).validate()
    CalibrateConfig(onnx_path=Path("model"), samples="vision=one,speech=other").validate()
