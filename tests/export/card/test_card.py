"""README.md and genai_quant.json: what they say, what they leave alone, and that the program in the card runs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import yaml

from export.card.record import kinds_of, read_record
from export.card.write import update_card
from stages.commands.evaluate_options import InspectConfig
from stages.evaluation.records import Evaluation
from stages.inspect.__main__ import command as inspect
from stages.records.formats import EmbeddingPlan, EmbeddingTable
from stages.records.sites import UnquantizedWeights
from stages.system.version import this_version
from tests.export.builders import spec_of
from tests.export.exports import TinyExport, options, tiny_export
from tests.stages.report import sample
from tests.support.commands import Commands

BASE_CARD = "---\nlicense: apache-2.0\nbase_model: somebody/parent\ntags: [x]\n---\n# The base's own words\n"


def head_of(card: Path) -> Mapping[str, Any]:
    _, head, _ = card.read_text(encoding="utf-8").split("---\n", 2)
    found = yaml.safe_load(head)
    assert isinstance(found, dict)
    return found


def rows_of(card: Path, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, its own head left out."""
    lines = iter(card.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].splitlines())
    table = []
    for line in lines:
        if line.startswith("|"):
            table.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif table:
            break
    return table[2:]


def mixed_export(folder: Path) -> TinyExport:
    """An export with a site that stays and a weight that no MatMul reads."""
    tiny = tiny_export(folder, spec=spec_of(4, symmetric=False))
    kept = (("lm_head/MatMul", "a | reason"),)
    part = UnquantizedWeights(op_type="MoE", weights=("experts", "more"), num_bytes=8, share=0.5, reason="they stay")
    recipe = replace(tiny.store.recipe, kept=kept, unreached=(part,))
    return replace(tiny, store=replace(tiny.store, recipe=recipe))


def test_the_card_names_every_kind_of_layer_with_its_bits(tmp_path: Path) -> None:
    tiny = mixed_export(tmp_path)
    summary = tiny.run(options())
    card = tiny.output / "README.md"
    # 4 bits, a float32 scale and 4 bits of zero point for every block.
    described = "INT4, a float32 scale and a zero point for every 16 weights"
    assert rows_of(card, "Formats") == [
        ["up", "1", described, "6.250"],
        ["down", "1", described, "6.250"],
        ["lm_head", "1", "as in the base: a \\| reason", "-"],
        ["MoE experts", "2", "as in the base: they stay", "-"],
    ]
    record = read_record(tiny.output)
    assert record is not None
    assert [kind.kind for kind in record.formats] == ["up", "down", "lm_head", "MoE experts"]
    assert (record.base.bytes, record.bytes) == (summary.bytes_before, summary.bytes_after)
    assert record.base.fingerprint == tiny.store.recipe.model_fingerprint
    assert record.checks is not None
    assert (record.checks.sites, record.checks.fused) == (2, 2)
    assert head_of(card) == {
        "library_name": "onnxruntime-genai",
        "pipeline_tag": "text-generation",
        "tags": ["onnx", "onnxruntime", "onnxruntime-genai", "int4", "genai-quant"],
    }
    tiny.run(options("off"), overwrite=True)
    assert "| checked | no |" in card.read_text(encoding="utf-8")


def test_a_table_that_is_stored_once_says_so(tmp_path: Path) -> None:
    tiny = tiny_export(tmp_path)
    table = EmbeddingTable(weight="wte", gathers=("x",), vocabulary=300, hidden=64, transposed=True, dtype="float32")
    own = EmbeddingPlan(table=table, axis=1, block_size=32, form="gather_block_quantized", bits=8)
    shared = replace(own, shared_with="/lm_head/MatMul")
    store = replace(tiny.store, recipe=replace(tiny.store.recipe, embeddings=(own, shared)))
    found = [(kind.format, kind.bits_per_weight) for kind in kinds_of(store) if kind.kind == "embedding wte"]
    assert found == [("INT8, a float32 scale for every 32 weights", 9.0), ("the stored weight of lm_head", None)]


def test_equal_exports_write_equal_files(tmp_path: Path) -> None:
    tiny = mixed_export(tmp_path)
    names = ("README.md", "genai_quant.json")
    tiny.run(options())
    first = [(tiny.output / name).read_bytes() for name in names]
    tiny.run(options(), overwrite=True)
    assert [(tiny.output / name).read_bytes() for name in names] == first
    assert str(tmp_path).encode() not in b"".join(first)


def test_the_bases_card_keeps_its_words_under_another_name(tmp_path: Path) -> None:
    tiny = tiny_export(tmp_path)
    (tiny.base.folder / "README.md").write_text(BASE_CARD)
    (tiny.base.folder / "README.base.md").write_text("older still")
    (tiny.base.folder / "config.json").write_text('{"_name_or_path": "owner/base-1.5B"}')
    tiny.run(options("off"))
    kept = {path.name: path.read_text() for path in tiny.output.glob("README*.base.md")}
    assert kept == {"README.base.md": "older still", "README.base.base.md": BASE_CARD}
    head = head_of(tiny.output / "README.md")
    # The parent of the base is not the base.
    assert (head["base_model"], head["base_model_relation"]) == ("owner/base-1.5B", "quantized")
    assert head["license"] == "apache-2.0"


@pytest.mark.parametrize("name", ["/home/somebody/base", "base", 7, None])
def test_what_is_no_name_of_the_hub_stays_out_of_the_head(tmp_path: Path, name: object) -> None:
    tiny = tiny_export(tmp_path)
    (tiny.base.folder / "config.json").write_text(json.dumps({"_name_or_path": name}))
    (tiny.base.folder / "README.md").write_text("---\n[not: yaml\n---\n")
    tiny.run(options("off"))
    assert {"base_model", "license"}.isdisjoint(head_of(tiny.output / "README.md"))
    assert "somebody" not in (tiny.output / "README.md").read_text(encoding="utf-8")


def test_the_graph_names_what_made_it_and_its_base(tmp_path: Path) -> None:
    tiny = tiny_export(tmp_path)
    base = ir.load(tiny.base.onnx_file)
    base.producer_name, base.producer_version = "maker", "1.2"
    ir.save(base, tiny.base.onnx_file)
    onnx_file = tiny.run(options("off")).onnx_file
    made = ir.load(onnx_file)
    assert (made.producer_name, made.producer_version) == ("genai-quant", this_version().number)
    assert made.metadata_props["base_model.producer"] == "maker 1.2"
    record = read_record(tiny.output)
    assert record is not None
    assert record.base.producer == "maker 1.2"


def of_one_model(found: Evaluation) -> Evaluation:
    assert found.speed is not None
    return replace(found, rows=found.rows[:2], speed=replace(found.speed, models=found.speed.models[:2]))


def test_what_was_measured_is_added(tmp_path: Path) -> None:
    tiny = tiny_export(tmp_path)
    tiny.run(options("off"))
    card = tiny.output / "README.md"
    assert "Not measured" in card.read_text(encoding="utf-8")
    measured = of_one_model(sample.evaluation())
    elsewhere = replace(measured, comparison=replace(measured.comparison, text="/home/somebody/b.txt"), speed=None)
    update_card(tiny.output, (measured, elsewhere))
    accuracy = measured.rows[1].accuracy
    rows = rows_of(card, "Accuracy")
    assert [row[0] for row in rows] == [measured.comparison.text, "b.txt"]
    assert rows[0][4:] == [
        f"{accuracy.perplexity:.3f}",
        f"{accuracy.mean_divergence:.4f}",
        f"{100 * accuracy.top1_agreement:.1f} %",
    ]
    assert measured.speed is not None
    assert f"decoding {measured.speed.models[0].decode.median:.1f} and" in card.read_text(encoding="utf-8")
    record = read_record(tiny.output)
    assert record is not None
    assert record.evaluation is not None
    assert record.evaluation.texts[1].divergence == accuracy.mean_divergence


def test_a_folder_without_a_record_is_never_written_to(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("somebody's")
    update_card(tmp_path, (of_one_model(sample.evaluation()),))
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "somebody's"


def test_a_real_output_tells_its_command_and_its_program_runs(
    tiny_model: Path, tiny_cache: Path, tmp_path: Path, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, "base")
    made = "--onnx_path base --output_path int4 --algo awq_clip --block_size 32 --verify off --target any --cache_dir"
    assert commands.quantize(*made.split(), tiny_cache)[0] == 0
    card = Path("int4", "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"```console\n(genai-quant quantize .*)\n```", card)
    assert sorted(shlex.split(command)[2:]) == sorted([*made.split(), str(tiny_cache)])
    assert "| calibration text | tiny.txt (18 + 2 windows of 32 tokens) |" in card
    record = read_record(Path("int4"))
    assert record is not None
    assert record.origin is not None
    assert record.origin.options["algo"] == "awq_clip"
    (program,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    capsys.readouterr()
    exec(program, {})
    assert capsys.readouterr().out.startswith("The capital of France is")

    again = "--onnx_path base --weights_path int4.weights --output_path nbits --weight_operator matmul_nbits"
    assert commands.export(*again.split(), "--verify", "off")[0] == 0
    card = Path("nbits", "README.md").read_text(encoding="utf-8")
    assert f"```console\n{command}\ngenai-quant export --onnx_path base" in card
    assert "stored as com.microsoft MatMulNBits" in card
    _, printed = commands.run(InspectConfig, inspect, ("nbits",))
    assert re.search(rf"made by +genai-quant {this_version().number}", printed)
    assert re.search(r"made from +base: genai-quant quantize --onnx_path base", printed)
