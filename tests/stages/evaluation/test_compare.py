"""A base equals itself, its fp16 build is near, and reports are reused only when equal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from stages.commands.evaluate_options import EvaluateConfig
from stages.commands.progress import progress_bar
from stages.errors import UserError
from stages.evaluation.compare import _record, compare, prepare
from stages.evaluation.records import load_evaluation, save_evaluation
from stages.model.directory import locate_model
from stages.model.sizes import model_bytes
from stages.runtime.providers import CPU, ProviderChoice
from stages.runtime.session import ACCURACY_LEVEL
from tests.support.encoders import add_vision
from tests.support.full_disk import full_after


@pytest.fixture
def config(tiny_model: Path, tiny_model_dml: Path, tiny_text: Path) -> EvaluateConfig:
    return EvaluateConfig(
        base=tiny_model, model=(tiny_model, tiny_model_dml), text=str(tiny_text), windows=3, seq_len=48
    )


def test_the_base_equals_itself_and_float16_is_near(config: EvaluateConfig, tiny_model: Path) -> None:
    base, same, half = compare(prepare(config), progress_bar()).rows
    assert base.accuracy == same.accuracy
    assert base.accuracy.tokens == 3 * 47
    assert base.accuracy.mean_divergence == 0
    assert base.accuracy.top1_agreement == 1
    # Random weights know nothing: about the 300 tokens of the vocabulary, never below a fraction of it.
    assert 100 < base.accuracy.perplexity < 2000
    # float16 rounds by 5e-4; a divergence is of the order of the squared change of logits.
    assert 0 < half.accuracy.mean_divergence < 1e-3
    assert half.accuracy.perplexity == pytest.approx(base.accuracy.perplexity, rel=1e-2)
    assert base.bytes == sum((tiny_model / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert half.bytes < 0.7 * base.bytes


def test_sizes_count_only_the_files_that_the_graph_refers_to(tiny_model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    before = model_bytes(locate_model(copy))
    (copy / "stale.onnx.data").write_bytes(b"0" * 1000)
    assert model_bytes(locate_model(copy)) == before


def test_a_report_is_reused_for_the_same_comparison_only(config: EvaluateConfig, tmp_path: Path) -> None:
    prepared = prepare(replace(config, model=(config.base,), windows=1))
    report = compare(prepared, progress_bar())
    path = tmp_path / "deep" / "report.json"
    save_evaluation(report, path)
    assert load_evaluation(path, prepared.comparison) == report
    for changed in (replace(config, windows=2), replace(config, accuracy_level=4), config):
        assert load_evaluation(path, prepare(changed).comparison) is None
    path.write_text("{}", encoding="utf-8")
    assert load_evaluation(path, prepared.comparison) is None
    assert load_evaluation(tmp_path / "missing.json", prepared.comparison) is None


def test_the_tokenizer_may_lie_elsewhere(config: EvaluateConfig, tmp_path: Path) -> None:
    bare = shutil.copytree(config.base, tmp_path / "bare", ignore=shutil.ignore_patterns("*token*", "config.json"))
    one = replace(config, base=bare, model=(config.base,), windows=1)
    with pytest.raises(UserError, match=r"No tokenizer can be loaded from .*bare .* as --model_name"):
        prepare(one)
    elsewhere = prepare(replace(one, model_name=str(config.base)))
    assert elsewhere.base.tokens == prepare(replace(config, windows=1)).base.tokens


def test_another_vocabulary_is_refused(config: EvaluateConfig, tmp_path: Path) -> None:
    other = shutil.copytree(config.base, tmp_path / "other")
    model = onnx.load(other / "model.onnx", load_external_data=False)
    next(value for value in model.graph.output if value.name == "logits").type.tensor_type.shape.dim[2].dim_value = 299
    onnx.save(model, other / "model.onnx")
    with pytest.raises(UserError, match="other has 299 tokens in its vocabulary and --base 300"):
        prepare(replace(config, model=(other,)))


@pytest.mark.parametrize("content", [b"", b"garbage" * 10], ids=["empty", "damaged"])
def test_a_file_that_is_no_model_is_named(config: EvaluateConfig, tmp_path: Path, content: bytes) -> None:
    other = shutil.copytree(config.base, tmp_path / "other")
    (other / "model.onnx").write_bytes(content)
    for changed in (replace(config, model=(other,)), replace(config, base=other)):
        with pytest.raises(UserError, match=r"other/model\.onnx is not a readable ONNX model"):
            prepare(changed)


def test_logits_that_olive_renamed_are_found(config: EvaluateConfig, tmp_path: Path) -> None:
    """Olive 0.13's OnnxBlockWiseRtnQuantization adds _Q4 to the names of what its operators make."""
    renamed = shutil.copytree(config.base, tmp_path / "renamed")
    model = onnx.load(renamed / "model.onnx", load_external_data=False)
    for names in [node.output for node in model.graph.node]:
        names[:] = ["logits_Q4" if name == "logits" else name for name in names]
    next(value for value in model.graph.output if value.name == "logits").name = "logits_Q4"
    onnx.save(model, renamed / "model.onnx")
    evaluation = compare(prepare(replace(config, model=(renamed,), windows=1)), progress_bar())
    assert evaluation.rows[1].accuracy == evaluation.rows[0].accuracy


def test_too_short_a_text_states_both_numbers(config: EvaluateConfig, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Not much.", encoding="utf-8")
    with pytest.raises(UserError, match="gives 0 windows of 48 tokens and --windows is 3"):
        prepare(replace(config, text=str(short)))


def test_a_missing_text_is_named(config: EvaluateConfig) -> None:
    with pytest.raises(UserError, match=r"--text missing\.txt can't be read"):
        prepare(replace(config, text="missing.txt"))


def test_another_level_in_its_files_makes_another_comparison(config: EvaluateConfig, tmp_path: Path) -> None:
    model = shutil.copytree(config.base, tmp_path / "model")
    one = replace(config, model=(model,), windows=1)
    before = prepare(one).comparison
    content = json.loads((model / "genai_config.json").read_text(encoding="utf-8"))
    content["model"]["decoder"]["session_options"][ACCURACY_LEVEL] = "1"
    (model / "genai_config.json").write_text(json.dumps(content), encoding="utf-8")
    after = prepare(one).comparison
    assert after != before
    assert after.accuracy_levels == (None, 1)
    assert prepare(replace(one, accuracy_level=4)).comparison.accuracy_levels == (4, 4)


def test_logits_are_written_as_they_come_and_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    """A mapped file that the disk has no room for would end the process without a word."""
    file, windows = tmp_path / "scratch" / "logits", np.random.default_rng(0).random((3, 50, 300), np.float32)
    file.parent.mkdir()

    def come() -> Iterator[np.ndarray]:
        for number, window in enumerate(windows):
            assert number == 0 or file.stat().st_size <= number * window.nbytes
            yield window

    np.testing.assert_array_equal(_record(come(), 3, file), windows)
    with full_after(2 * windows[0].nbytes), pytest.raises(UserError, match=r"logits can't be kept in .*; free space"):
        _record(come(), 3, file)


def test_a_component_that_gives_no_logits_is_not_compared_on_text(config: EvaluateConfig, tmp_path: Path) -> None:
    package = shutil.copytree(config.base, tmp_path / "package")
    add_vision(package)
    one = replace(config, base=package, model=(package,), windows=1)
    with pytest.raises(UserError, match=r"component vision \(.*vision\.onnx\) gives no logits .* pass --samples"):
        prepare(replace(one, component="vision"))
    assert prepare(replace(one, component="decoder")) is not None


def test_providers_that_do_not_load_are_named(
    config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = ProviderChoice(names=(CPU,), missing=(("cuda", "no driver"),))
    monkeypatch.setattr("stages.evaluation.compare.loadable", lambda _: found)
    assert prepare(replace(config, windows=1, eps="cuda,cpu")).comparison.providers == (CPU,)
    assert "--eps cuda isn't used: no driver." in caplog.messages
