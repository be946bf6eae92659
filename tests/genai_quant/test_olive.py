"""Olive's workflows as the options of a run."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genai_quant import read_run
from genai_quant.olive import package_config
from stages.commands.calibrate_options import CalibrateConfig
from stages.commands.quantize_options import QuantizeConfig
from stages.errors import UserError
from stages.runtime.genai import open_genai


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "workflow.json"


def _workflow(**changes: object) -> dict[str, Any]:
    workflow: dict[str, Any] = {
        "input_model": {"type": "OnnxModel", "model_path": "models/base"},
        "systems": {
            "gpu": {
                "type": "LocalSystem",
                "accelerators": [{"device": "gpu", "execution_providers": ["CUDAExecutionProvider"]}],
            },
            "far": {"type": "AzureML"},
            "two": {"type": "LocalSystem", "accelerators": [{"device": "cpu"}, {"device": "gpu"}]},
            "cpu": {"type": "LocalSystem", "config": {"accelerators": [{"device": "cpu"}]}},
            "vague": {"type": "LocalSystem", "accelerators": [{"device": "npu"}]},
            "device": {"type": "localsystem", "accelerators": [{"device": "gpu"}]},
            "odd": {"type": "LocalSystem", "accelerators": [{"execution_providers": ["OpenVINOExecutionProvider"]}]},
        },
        "passes": {"int4": {"type": "GenaiQuant", "algo": "awq_full", "dataset": "offline", "device": "cpu"}},
        "target": "gpu",
        "cache_dir": "cache",
        "output_dir": "models/int4",
        "log_severity_level": 1,
    }
    return {key: value for key, value in (workflow | changes).items() if value is not None}


def _read(file: Path, workflow: dict[str, Any]) -> Any:
    file.write_text(json.dumps(workflow), encoding="utf-8")
    return read_run(file)


def test_an_olive_workflow(file: Path) -> None:
    run = _read(file, _workflow())
    base, cache = Path("models/base"), Path("cache/base.calibration")
    assert run.calibrate == CalibrateConfig(
        onnx_path=base, cache_dir=cache, dataset="offline", calibration_eps="cuda,cpu", device="cpu"
    )
    assert run.quantize == QuantizeConfig(
        onnx_path=base, output_path=Path("models/int4"), cache_dir=cache, algo="awq_full", target="cuda", device="cpu"
    )


def test_olives_other_spellings(file: Path) -> None:
    run = _read(
        file,
        _workflow(
            input_model={"type": "ONNXModel", "config": {"model_path": "models/base", "onnx_file_name": "model.onnx"}},
            passes={"int4": [{"type": "genaiquant", "config": {"block_size": 32}}]},
            engine={"target": "cpu", "output_dir": "elsewhere", "search_strategy": False, "evaluator": None},
            target=None,
            cache_dir=None,
            enable_shared_cache=False,
            clean_evaluation_cache=True,
            output_dir=None,
            data_configs=[],
        ),
    )
    assert run.quantize == QuantizeConfig(
        onnx_path=Path("models/base/model.onnx"), output_path=Path("elsewhere"), target="cpu", block_size=32
    )
    assert run.calibrate.calibration_eps == "cpu"


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("device", "cuda"),
        ({"type": "LocalSystem", "accelerators": [{"execution_providers": "DmlExecutionProvider"}]}, "dml"),
        ({"type": "LocalSystem", "accelerators": [{"execution_providers": [["QNNExecutionProvider", "q.so"]]}]}, "qnn"),
        ({"type": "LocalSystem"}, None),
    ],
)
def test_targets_as_olive_takes_them(file: Path, target: object, expected: str | None) -> None:
    assert _read(file, _workflow(target=target)).quantize.target == expected


def test_what_is_null_in_the_pass_is_not_given(file: Path) -> None:
    options = {"type": "GenaiQuant", "algo": None, "dataset": "offline", "host": "cpu"}
    run = _read(file, _workflow(passes={"int4": options}, cache_dir=["own", "shared"]))
    assert run.quantize.algo == QuantizeConfig.algo
    assert run.calibrate.cache_dir == Path("own/base.calibration")


def test_olives_rounding(file: Path) -> None:
    options = {"block_size": 32, "is_symmetric": False, "axis": 0, "accuracy_level": 4, "nodes_to_exclude": ["a", "b"]}
    run = _read(file, _workflow(passes={"q": {"type": "OnnxBlockWiseRtnQuantization", **options}}, cache_dir=None))
    assert run.calibrate is None
    assert run.quantize == QuantizeConfig(
        onnx_path=Path("models/base"),
        output_path=Path("models/int4"),
        target="cuda",
        algo="rtn_dq",
        weight_operator="matmul_nbits",
        block_size=32,
        gather_quantize_axis=1,
        gather_block_size=32,
        use_zero_point=True,
        accuracy_level=4,
        exclude="a,b",
        lm_head="4",
    )


def _rounding(**options: object) -> dict[str, Any]:
    return {"passes": {"q": {"type": "OnnxBlockWiseRtnQuantization", **options}}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input_model": {"type": "HfModel", "model_path": "x/y"}}, "is of type HfModel, and only OnnxModel"),
        ({"input_model": {"type": "OnnxModel"}}, "input_model lacks model_path"),
        (
            {"input_model": {"type": "OnnxModel", "model_path": "x", "io_config": {"a": 1}}},
            "has io_config, which has no",
        ),
        ({"input_model": ["x"]}, "input_model is not a dictionary"),
        ({"target": "gpx"}, "has no system gpx; did you mean gpu?"),
        ({"target": "far"}, "system far is of type AzureML; only LocalSystem runs here."),
        ({"target": "two"}, "system two has 2 accelerators; a model is made for one, so leave one."),
        ({"target": "vague"}, "system vague names no execution_providers; name one of CPUExecutionProvider, CUDA"),
        ({"target": "odd"}, "has the execution provider OpenVINOExecutionProvider; choose from CPUExecutionProvider,"),
        ({"target": {"type": "Docker"}}, "target is of type Docker; only LocalSystem runs here."),
        (
            {"packaging_config": {"type": "Zipfile"}},
            "packaging_config has no counterpart here; leave it out, or run it",
        ),
        ({"output_dir": None}, "has no output_dir"),
        ({"evaluators": {"e": {}}}, "evaluators has no counterpart here; leave it out, or run it with Olive"),
        ({"search_strategy": {"a": 1}}, "search_strategy has no counterpart here"),
        ({"passes": None}, "has 0 passes; leave one, of type GenaiQuant or OnnxBlockWiseRtnQuantization, or"),
        ({"passes": {"a": {"type": "X"}, "b": {"type": "Y"}}}, "has 2 passes"),
        ({"passes": {"a": {"type": "OnnxHqqQuantization"}}}, "pass a is of type OnnxHqqQuantization; use GenaiQuant"),
        ({"passes": {"a": {"type": "GenaiQuant", "algos": "rtn"}}}, "pass a has no option algos; did you mean algo?"),
        ({"passes": {"a": {"type": "GenaiQuant", "onnx_path": "x"}}}, "pass a has no option onnx_path"),
        (_rounding(bits=8), "pass q: bits can't be 8; use the pass GenaiQuant with layers_8bit for INT8."),
        (_rounding(nodes_to_include=["a"]), "pass q: nodes_to_include has no counterpart here; leave it out."),
        (_rounding(all_tensors_to_one_file=False), "pass q: all_tensors_to_one_file can't be False"),
        (_rounding(block_size=8), "--block_size 8 is not a power of two from 16 to 256"),
    ],
)
def test_what_has_no_counterpart_is_refused(file: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        _read(file, _workflow(**changes))
    message = str(caught.value)
    assert words in message
    assert message.startswith(str(file))
    assert "\n" not in message


def test_olive_that_is_missing_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "olive.package_config", None)
    with pytest.raises(UserError, match=r"^Olive can't be imported \(.*\); install it with 'pip install olive-ai req"):
        package_config()


@pytest.fixture(scope="session")
def olive_run() -> Callable[[dict[str, Any]], object]:
    """Return Olive's own ``run``, given our pass."""
    workflows = pytest.importorskip("olive.workflows", reason="olive-ai isn't installed: docs/reference/run-files.md")
    return lambda workflow: workflows.run(workflow, package_config=package_config())


def _in_olive(tmp_path: Path, base: Path, **options: object) -> dict[str, Any]:
    return {
        "input_model": {"type": "OnnxModel", "model_path": str(base)},
        "systems": {"cpu": {"type": "LocalSystem", "accelerators": [{"device": "cpu"}]}},
        "passes": {"int4": {"type": "GenaiQuant", **options}},
        "target": "cpu",
        "cache_dir": str(tmp_path / "cache"),
        "output_dir": str(tmp_path / "made"),
    }


def test_olive_runs_our_pass(olive_run: Callable[..., object], tiny_model: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    olive_run(_in_olive(tmp_path, base, algo="awq_lite", block_size=32, dataset="self", calib_size=4, seq_len=16))
    made = {path.name for path in (tmp_path / "made").iterdir()}
    assert {path.name for path in base.iterdir()} <= made
    assert "model.onnx.data" in made
    session = open_genai(tmp_path / "made", "--generate")
    assert list(session.generate([1, 2, 3], 4, past_the_end=True))
    assert (tmp_path / "base.calibration").is_dir()


def test_olive_stops_at_what_our_pass_refuses(
    olive_run: Callable[..., object], tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="pass GenaiQuant has no option algos; did you mean algo"):
        olive_run(_in_olive(tmp_path, tiny_model, algos="rtn_dq"))
    with pytest.raises(ValueError, match=r"run\.json: --block_size 8 is not a power of two"):
        olive_run(_in_olive(tmp_path, tiny_model, algo="rtn_dq", block_size=8))
