"""Run files: sections of options, checked key by key."""

from __future__ import annotations

from pathlib import Path

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
    report = Path("models/int4.weights/report")
    assert run.evaluate == EvaluateConfig(base=base, model=(output,), text="some.txt", report=report)


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
