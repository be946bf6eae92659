"""The output folder: complete, runnable, and there only when whole."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

import export.run
from export.save import Destination
from stages.errors import GraphError, UserError
from stages.quantization.weights.store import QuantizedStore
from stages.quantization.weights.validate import PartName
from stages.records.formats import WeightForm
from stages.records.sites import MatMulSite
from tests.export.builders import relative_difference, spec_of
from tests.export.exports import TinyExport, options, tiny_export


def logits(path: Path) -> np.ndarray:
    settings = ort.SessionOptions()
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return session.run(None, {"input_ids": np.arange(7)[None]})[0]


@pytest.mark.parametrize("form", list(WeightForm))
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_output_runs_as_it_stands_and_computes_what_the_base_does(
    tmp_path: Path, form: WeightForm, symmetric: bool
) -> None:
    tiny = tiny_export(tmp_path, spec=spec_of(4, symmetric=symmetric), form=form)
    summary = tiny.run(options())
    assert [outcome.how for outcome in summary.folds] == ["norm", "linear"]
    # float32 rounding through three layers.
    assert relative_difference(logits(summary.onnx_file), logits(tiny.base.onnx_file)) < 1e-5
    report = summary.report
    assert report is not None
    fused = 0 if form is WeightForm.DQ_COLUMN_MAJOR else 2
    assert (report.sites, report.fused, len(report.unfused), report.skipped) == (2, fused, 2 - fused, ())
    assert report.worst_exact is not None
    assert 0 < report.worst_exact.exact < 1e-4
    saved = json.loads((tiny.store.folder / "verification.json").read_text(encoding="utf-8"))
    assert (saved["fused"], len(saved["unfused"])) == (fused, 2 - fused)
    assert saved["worst_exact"]["site"] == report.worst_exact.site


@pytest.mark.parametrize("opset", [14, 17])
def test_an_older_base_is_converted_and_the_table_says_so(tmp_path: Path, opset: int) -> None:
    tiny = tiny_export(tmp_path, opset=opset)
    summary = tiny.run(options())
    assert summary.notes[0].startswith(f"converted from opset {opset} to 21")
    assert ir.load(summary.onnx_file).opset_imports[""] == 21
    assert ir.load(tiny.base.onnx_file).opset_imports[""] == opset
    assert relative_difference(logits(summary.onnx_file), logits(tiny.base.onnx_file)) < 1e-5


@pytest.mark.parametrize("form", [WeightForm.DQ, WeightForm.MATMUL_NBITS])
def test_an_export_reads_each_tensor_of_the_store_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: WeightForm
) -> None:
    tiny = tiny_export(tmp_path, form=form)
    read: Counter[str] = Counter()
    load = QuantizedStore.tensor

    def counted(store: QuantizedStore, index: int, site: MatMulSite, part: PartName) -> torch.Tensor | None:
        tensor = load(store, index, site, part)
        read[f"{site.name}:{part}"] += tensor is not None
        return tensor

    monkeypatch.setattr(QuantizedStore, "tensor", counted)
    monkeypatch.setattr(QuantizedStore, "read", lambda *_: pytest.fail("read a whole weight"))
    tiny.run(options("off"))
    # The scales of up take down's input scale: whether they can is tried before they are written.
    assert +read == {
        "up/MatMul:codes": 1, "up/MatMul:scales": 2, "up/MatMul:input_scale": 1,
        "down/MatMul:codes": 1, "down/MatMul:scales": 1, "down/MatMul:input_scale": 1,
    }  # fmt: skip


def test_every_side_file_is_there_and_nothing_else(tmp_path: Path) -> None:
    tiny = tiny_export(tmp_path)
    tiny.run(options())
    names = {str(path.relative_to(tiny.output)) for path in tiny.output.rglob("*") if path.is_file()}
    side_files = {"genai_config.json", "tokenizer.json", str(Path("adapters", "a.bin"))}
    assert names == {"model.onnx", "model.onnx.data", "README.md", "genai_quant.json"} | side_files
    assert (tiny.output / "adapters" / "a.bin").read_bytes() == b"\x00\x01"


def test_the_data_file_holds_the_referenced_bytes_and_no_more(tmp_path: Path) -> None:
    tiny = tiny_export(tmp_path)
    summary = tiny.run(options("quick"))
    model = ir.load(summary.onnx_file)
    tensors = [value.const_value for value in model.graph.initializers.values()]
    external = [tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]
    size = (tiny.output / "model.onnx.data").stat().st_size
    assert sum(tensor.nbytes for tensor in external) == size
    assert summary.report is not None
    assert summary.report.data.referenced_bytes == size
    # The weights that were replaced are gone.
    assert {"up.weight", "down.weight", "gain"}.isdisjoint(model.graph.initializers)
    onnx_size = summary.onnx_file.stat().st_size
    assert summary.bytes_after == size + onnx_size


@pytest.mark.parametrize(("level", "expected"), [(None, None), (1, "1"), (4, "4")])
def test_genai_config_names_the_graph_and_the_accuracy_level(
    tmp_path: Path, level: int | None, expected: str | None
) -> None:
    tiny = tiny_export(tmp_path, name=str(Path("quantized", "int4.onnx")))
    summary = tiny.run(options("off", level))
    assert summary.onnx_file == tmp_path / "quantized" / "int4.onnx"
    assert summary.onnx_file.is_file()
    content = json.loads((tmp_path / "quantized" / "genai_config.json").read_text())
    decoder = content["model"]["decoder"]
    assert decoder["filename"] == "int4.onnx"
    assert decoder["session_options"].get("session.qdq_matmulnbits_accuracy_level") == expected
    assert decoder["session_options"]["log_id"] == "kept"
    assert (decoder["hidden_size"], content["search"]) == (64, {"top_k": 50})


def _for_target(tiny: TinyExport, form: WeightForm, *session_options: tuple[str, str]) -> TinyExport:
    recipe = replace(tiny.store.recipe, weight_form=form, session_options=session_options)
    return replace(tiny, store=replace(tiny.store, recipe=recipe))


def _session_options(tiny: TinyExport, accuracy_level: int | None = None) -> dict[str, str]:
    tiny.run(options("off", accuracy_level), overwrite=True)
    content = json.loads((tiny.output / "genai_config.json").read_text())
    session_options: dict[str, str] = content["model"]["decoder"]["session_options"]
    return session_options


def test_session_options_of_the_recipe_reach_genai_config(tmp_path: Path) -> None:
    level, blocks = "session.qdq_matmulnbits_accuracy_level", "session.qdq_matmulnbits_block_size"
    tiny = _for_target(tiny_export(tmp_path), WeightForm.DQ, (blocks, "128"), (level, "4"))
    assert _session_options(tiny) == {"log_id": "kept", blocks: "128", level: "4"}
    assert _session_options(tiny, accuracy_level=1) == {"log_id": "kept", blocks: "128", level: "1"}


def test_matmulnbits_nodes_carry_the_accuracy_level_themselves(tmp_path: Path) -> None:
    level = "session.qdq_matmulnbits_accuracy_level"
    tiny = _for_target(tiny_export(tmp_path), WeightForm.MATMUL_NBITS, (level, "4"), ("session.x", "1"))
    assert _session_options(tiny) == {"log_id": "kept", "session.x": "1"}
    assert _session_options(tiny, accuracy_level=1) == {"log_id": "kept", "session.x": "1"}


def test_an_accuracy_level_without_genai_config_is_noted(tmp_path: Path) -> None:
    tiny = tiny_export(tmp_path)
    tiny.base.genai_config_path.unlink()
    without = type(tiny.base)(folder=tiny.base.folder, onnx_file=tiny.base.onnx_file, has_genai_config=False)
    summary = type(tiny)(base=without, store=tiny.store, output=tiny.output).run(options("quick", 1))
    assert "set session.qdq_matmulnbits_accuracy_level to 1" in summary.notes[0]


def test_an_existing_output_is_refused_unless_overwritten(tmp_path: Path) -> None:
    tiny = tiny_export(tmp_path)
    tiny.run(options("off"))
    (tiny.output / "mark").write_text("first")
    with pytest.raises(UserError, match="already exists"):
        tiny.run(options("off"))
    assert (tiny.output / "mark").exists()
    tiny.run(options("off"), overwrite=True)
    assert not (tiny.output / "mark").exists()


def test_a_folder_that_is_no_earlier_output_is_never_deleted(tmp_path: Path) -> None:
    tiny = tiny_export(tmp_path)
    tiny.output.mkdir()
    (tiny.output / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="isn't an earlier output"):
        tiny.run(options("off"), overwrite=True)
    assert (tiny.output / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("name", ["base", "base/model.onnx", "."])
def test_an_output_that_would_replace_the_base_is_refused(tmp_path: Path, name: str) -> None:
    tiny = tiny_export(tmp_path)
    with pytest.raises(UserError, match="would replace the base model"):
        Destination.from_path(tmp_path / name, tiny.base, overwrite=True)


def test_an_output_inside_the_base_is_warned_of_unless_one_works_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tiny, inside = tiny_export(tmp_path), tmp_path / "base" / "new" / "int4"
    destination = Destination.from_path(inside, tiny.base, overwrite=False)
    destination.warn_inside(tiny.base.folder)
    assert f"base model's own folder; beside it would be {tmp_path / 'int4'}." in caplog.text
    caplog.clear()
    monkeypatch.chdir(tiny.base.folder)
    destination.warn_inside(tiny.base.folder)
    assert caplog.text == ""


def test_outputs_inside_the_base_folder_are_not_copied_into_each_other(tmp_path: Path) -> None:
    tiny = tiny_export(tmp_path)
    for name in ("first", "second"):
        destination = Destination(folder=tmp_path / "base" / name, onnx_name="model.onnx", overwrite=False)
        export.run.export_model(tiny.base, tiny.store, destination, options("quick"))
    for name in ("first", "second"):
        entries = {path.name for path in (tmp_path / "base" / name).iterdir()}
        side_files = {"genai_config.json", "tokenizer.json", "adapters"}
        assert entries == {"model.onnx", "model.onnx.data", "README.md", "genai_quant.json"} | side_files


def test_an_output_that_holds_the_weights_is_refused(tmp_path: Path) -> None:
    tiny = tiny_export(tmp_path / "run")
    destination = Destination(folder=tiny.store.folder.parent, onnx_name="m.onnx", overwrite=True)
    with pytest.raises(UserError, match="quantized weights"):
        export.run.export_model(tiny.base, tiny.store, destination, options("off"))
    assert tiny.store.group_file(0).is_file()


@pytest.mark.parametrize("step", ["copy_side_files", "patch_genai_config", "verify"])
def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    tiny = tiny_export(tmp_path)
    before = set(tmp_path.iterdir())

    def fail(*_: object) -> None:
        assert not tiny.output.exists()
        raise GraphError("injected")

    monkeypatch.setattr(export.run, step, fail)
    with pytest.raises(GraphError, match="injected"):
        tiny.run(options())
    assert set(tmp_path.iterdir()) == before


def test_a_full_disk_is_a_message_and_leaves_the_old_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = tiny_export(tmp_path)
    tiny.run(options("off"))
    old = (tiny.output / "model.onnx.data").read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ir, "save", fail)
    with pytest.raises(UserError, match=r"can't be written \(No space left on device\)"):
        tiny.run(options("off"), overwrite=True)
    assert (tiny.output / "model.onnx.data").read_bytes() == old


def name_component(folder: Path, name: str, filename: str) -> None:
    content = json.loads((folder / "genai_config.json").read_text())
    content["model"][name] = {"filename": filename, "shared_initializers": [{"name": "embedding"}]}
    (folder / "genai_config.json").write_text(json.dumps(content))


def test_a_component_that_shares_the_weights_of_the_base_gets_its_own(tmp_path: Path) -> None:
    """As onnxruntime-genai's builder writes the head that predicts several tokens: its lm_head is the decoder's."""
    tiny = tiny_export(tmp_path)
    shutil.copy(tiny.base.onnx_file, tiny.base.folder / "mtp.onnx")
    name_component(tiny.base.folder, "mtp", "mtp.onnx")
    summary = tiny.run(options("quick"))
    for name in ("model.onnx", "mtp.onnx"):
        model = ir.load(tiny.output / name)
        tensors = [value.const_value for value in model.graph.initializers.values()]
        external = {tensor.location for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
        assert external == {f"{name}.data"}
    ids = {"input_ids": np.array([[1, 2, 3]])}
    (found,), (expected,) = (
        ort.InferenceSession(folder / name).run(None, ids)
        for folder, name in ((tiny.output, "mtp.onnx"), (tiny.base.folder, "model.onnx"))
    )
    np.testing.assert_array_equal(found, expected)
    assert "shared_initializers" not in (tiny.output / "genai_config.json").read_text()
    assert summary.folder_bytes == sum(file.stat().st_size for file in tiny.output.rglob("*") if file.is_file())


def test_what_a_package_lacks_is_lacking_in_the_output_too_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = tiny_export(tmp_path)
    name_component(tiny.base.folder, "speech", "speech/model.onnx")
    tiny.run(options("off"))
    assert f"lacks {Path('speech/model.onnx')}, which a part of the model needs" in caplog.text


def test_another_model_of_the_base_folder_keeps_its_name(tmp_path: Path) -> None:
    tiny = tiny_export(tmp_path, name=str(Path("quantized", "vision.onnx")))
    shutil.copy(tiny.base.onnx_file, tiny.base.folder / "vision.onnx")
    name_component(tiny.base.folder, "vision", "vision.onnx")
    with pytest.raises(UserError, match=r"another model called vision\.onnx"):
        tiny.run(options("off"))
    assert not (tmp_path / "quantized").exists()


def test_a_damaged_base_is_a_message(tmp_path: Path) -> None:
    tiny = tiny_export(tmp_path)
    tiny.base.onnx_file.write_bytes(b"not a model at all")
    with pytest.raises(GraphError, match="not a readable ONNX model"):
        tiny.run(options("off"))


def test_missing_external_data_is_a_message(tmp_path: Path) -> None:
    tiny = tiny_export(tmp_path)
    (tiny.base.folder / "model.onnx.data").unlink()
    with pytest.raises(GraphError, match="missing"):
        tiny.run(options("off"))
