"""Run files: sections of options, checked key by key, and Olive's workflows mapped onto the same dataclasses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from genai_quant import read_run
from stages.commands.calibrate_options import CalibrateConfig
from stages.commands.evaluate_options import EvaluateConfig
from stages.commands.quantize_options import ExportConfig, QuantizeConfig
from stages.errors import UserError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def test_sections_are_the_commands_options(file: Path) -> None:
    file.write_text(
        """
calibrate:
  onnx_path: models/base
  dataset: offline
  calib-size: 8
quantize:
  output_path: models/int4
  algo: awq_lite
  block_size: 32
  int8_block_size: channel
  lm_head: 4
  verify: off
  layers_8bit: 0
  awqlite_alpha_step: 5e-2
  gather_quantize_axis: 1
export:
  output_path: models/nbits
  weight_operator: matmul_nbits
evaluate:
  text: some.txt
""",
        encoding="utf-8",
    )
    run = read_run(file)
    base, output = Path("models/base"), Path("models/int4")
    assert run.calibrate == CalibrateConfig(onnx_path=base, dataset="offline", calib_size=8)
    assert run.quantize == QuantizeConfig(
        onnx_path=base,
        output_path=output,
        algo="awq_lite",
        block_size=32,
        int8_block_size="channel",
        lm_head="4",
        verify="off",
        layers_8bit="0",
        awqlite_alpha_step=0.05,
        gather_quantize_axis=1,
    )
    assert run.export == ExportConfig(
        onnx_path=base,
        weights_path=run.quantize.weights_folder,
        output_path=Path("models/nbits"),
        weight_operator="matmul_nbits",
    )
    assert run.evaluate == EvaluateConfig(base=base, model=(output,), text="some.txt")


def test_one_section_is_enough(file: Path) -> None:
    file.write_text('{"quantize": {"onnx_path": "a", "output_path": "b", "cache_dir": "c"}}', encoding="utf-8")
    run = read_run(file)
    assert run.quantize == QuantizeConfig(onnx_path=Path("a"), output_path=Path("b"), cache_dir=Path("c"))
    assert (run.calibrate, run.export, run.evaluate) == (None, None, None)


def test_what_one_stage_is_given_the_other_knows(file: Path) -> None:
    file.write_text("calibrate: \nquantize: {onnx_path: a, output_path: b, cache_dir: c}", encoding="utf-8")
    assert read_run(file).calibrate == CalibrateConfig(onnx_path=Path("a"), cache_dir=Path("c"))


_PLACES = "onnx_path: a, output_path: b"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("quantise: {}", "has no section quantise; did you mean quantize?"),
        ("models: {}", "has no section models; its sections are calibrate, quantize, export, evaluate."),
        (f"quantize: {{{_PLACES}, blok_size: 32}}", "quantize has no option blok_size; did you mean block_size?"),
        (f"quantize: {{{_PLACES}, zzz: 1}}", "quantize has no option zzz; see genai-quant quantize --help."),
        (f"quantize: {{{_PLACES}, printing: 1}}", "quantize has no option printing; see"),
        (f"quantize: {{{_PLACES}, block_size: big}}", "quantize: block_size can't be 'big' (input should be a valid"),
        (f"quantize: {{{_PLACES}, algo: awk}}", "quantize: algo can't be 'awk' (input should be 'rtn', 'rtn_dq'"),
        (f"quantize: {{{_PLACES}, block_size: 33}}", "--block_size 33 is not a power of two"),
        (f"quantize: {{{_PLACES}}}\nevaluate: {{windows: 0}}", "--windows must be at least 1."),
        ("quantize: {onnx_path: a}", "quantize lacks output_path; add it."),
        ("calibrate: {onnx_path: a}", "has no section quantize; add it, with output_path in it."),
        ("quantize: 5", "quantize holds no options; write each on a line below it, as name: value."),
        ("quantize: {a: 1", "line 1: expected ',' or '}', but got '<stream end>'; fix the YAML."),
        ("quantize: {algo: rtn_dq, algo: rtn}", "line 1: algo occurs twice; fix the YAML."),
        ("quantize: !!python/object:os.system {}", "could not determine a constructor for the tag"),
        ("- a", "holds no sections"),
        ("", "holds no sections"),
        ("\x00", "fix the YAML"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(file: Path, text: str, words: str) -> None:
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_run(file)
    message = str(caught.value)
    assert words in message
    assert message.startswith(str(file))
    assert "\n" not in message


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing.yaml can't be read \(No such file or directory\)"):
        read_run(tmp_path / "nothing.yaml")
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"quantize: {algo: \xe4}")
    with pytest.raises(UserError, match=r"latin.yaml can't be read as YAML \(UnicodeDecodeError\)"):
        read_run(latin)
    broken = tmp_path / "run.json"
    broken.write_text('{"quantize": \n oops}', encoding="utf-8")
    with pytest.raises(UserError, match=r"run.json, line 2: Expecting value; fix the JSON\."):
        read_run(broken)


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
            "vague": {"type": "LocalSystem", "accelerators": [{"device": "gpu"}]},
            "odd": {"type": "LocalSystem", "accelerators": [{"execution_providers": ["CudaExecutionProvider"]}]},
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
            engine={"target": "cpu", "output_dir": "elsewhere", "search_strategy": None},
            target=None,
            cache_dir=None,
            output_dir=None,
            data_configs=[],
        ),
    )
    assert run.quantize == QuantizeConfig(
        onnx_path=Path("models/base/model.onnx"), output_path=Path("elsewhere"), target="cpu", block_size=32
    )
    assert run.calibrate.calibration_eps == "cpu"


def test_olives_rounding(file: Path) -> None:
    options = {"block_size": 32, "is_symmetric": False, "axis": 1, "accuracy_level": 4, "nodes_to_exclude": ["a", "b"]}
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
    )


def _rounding(**options: object) -> dict[str, Any]:
    return {"passes": {"q": {"type": "OnnxBlockWiseRtnQuantization", **options}}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input_model": {"type": "HfModel", "model_path": "x/y"}}, "is of type HfModel, and only OnnxModel"),
        ({"input_model": {"type": "OnnxModel"}}, "input_model lacks model_path"),
        ({"input_model": {"type": "OnnxModel", "model_path": "x", "io_config": {}}}, "has io_config, which has no"),
        ({"input_model": ["x"]}, "input_model is not a dictionary"),
        ({"target": "gpx"}, "has no system gpx; did you mean gpu?"),
        ({"target": "far"}, "system far is of type AzureML; only LocalSystem runs here."),
        ({"target": "two"}, "system two has 2 accelerators; a model is made for one, so leave one."),
        ({"target": "vague"}, "system vague names no execution_providers; name one of CPUExecutionProvider, CUDA"),
        ({"target": "odd"}, "no execution provider CudaExecutionProvider; did you mean CUDAExecutionProvider?"),
        ({"output_dir": None}, "has no output_dir"),
        ({"evaluators": {"e": {}}}, "evaluators has no counterpart here; leave it out, or run this workflow with"),
        ({"search_strategy": {"a": 1}}, "search_strategy has no counterpart here"),
        ({"passes": None}, "has 0 passes; leave one, of type GenaiQuant or OnnxBlockWiseRtnQuantization."),
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
