"""Our own folders: a calibration cache, quantized weights, finished or not, and a sweep."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from stages.calibration.cache import find_cache
from stages.evaluation.accuracy import Accuracy
from stages.evaluation.bench.runs import Record
from stages.evaluation.records import ModelRow
from stages.inspect.artifacts import CacheReport, is_sweep, report_cache, report_sweep, report_weights
from stages.quantization.weights.store import open_store
from stages.records.formats import WeightForm
from tests.support.commands import Commands


def cache_report(folder: Path) -> CacheReport:
    cache = find_cache(folder)
    assert cache is not None
    return report_cache(cache)


@pytest.fixture
def cache(tiny_cache: Path, tmp_path: Path) -> Path:
    """A copy of the shared cache without the forecasts that other tests left there."""
    return Path(shutil.copytree(tiny_cache, tmp_path / "cache", ignore=shutil.ignore_patterns("forecast.json")))


def test_a_cache(cache: Path, tiny_text: Path) -> None:
    found = cache_report(cache)
    assert (found.calibration_windows, found.held_out_windows, found.seq_len) == (18, 2, 32)
    assert str(tiny_text) in found.source or tiny_text.name in found.source
    # Two layers: the inputs of qkv, o, gate and up, down; then lm_head.
    assert (found.activations, found.widths) == (9, ((64, 7), (96, 2)))
    assert found.providers == ("CPUExecutionProvider",)
    assert (found.damaged, found.forecasts) == ((), 0)
    assert found.bytes == sum(file.stat().st_size for file in cache.iterdir())
    assert found.made_from.startswith("a model with the fingerprint ")


def test_a_cache_names_the_base_model_beside_it(tiny_cache: Path, tiny_model: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    cache = Path(shutil.copytree(tiny_cache, tmp_path / "base.calibration"))
    assert cache_report(cache).made_from == str(base)
    with (base / "model.onnx.data").open("r+b") as file:
        file.write(b"other weights")
    assert cache_report(cache).made_from == f"another model than {base} holds now"
    (base / "model.onnx").unlink()
    assert cache_report(cache).made_from == f"{base}, which can't be read now"


def test_a_damaged_cache(cache: Path) -> None:
    spoilt = next(file for file in sorted(cache.glob("*.safetensors")) if file.name != "tokens.safetensors")
    spoilt.write_bytes(b"spoilt")
    (cache / "notes.txt").write_text("mine", encoding="utf-8")
    found = cache_report(cache)
    assert len(found.damaged) == 1
    assert spoilt.name in found.damaged[0]
    assert found.activations == 9
    assert found.files == ("notes.txt",)


@pytest.fixture
def weights(tiny_model: Path, tmp_path: Path, commands: Commands) -> Path:
    """Quantized weights of the tiny model: rounded to INT4 in blocks of 16, the embedding too."""
    given = ["--onnx_path", tiny_model, "--output_path", tmp_path / "int4", "--algo", "rtn_dq", "--block_size", 16]
    code, printed = commands.quantize(*given, "--gather_quantize_axis", 1, "--verify", "off")
    assert code == 0, printed
    return tmp_path / "int4.weights"


def test_finished_weights(weights: Path) -> None:
    found = report_weights(open_store(weights))
    assert (found.groups, found.finished, found.embeddings) == (8, 8, 1)
    assert found.bits_per_weight == pytest.approx(6)
    assert found.weight_form is WeightForm.DQ
    assert len(found.sites) == 10
    assert [site.format for site in found.sites] == ["4b16"] * 10
    assert [name for name, _ in found.kept] == ["/lm_head/MatMul"]
    assert "report.jsonl" in found.files
    assert not any(name.endswith((".safetensors", "recipe.json")) for name in found.files)


def test_unfinished_weights(weights: Path) -> None:
    store = open_store(weights)
    store.group_file(3).unlink()
    found = report_weights(store)
    assert (found.groups, found.finished) == (8, 7)
    assert found.bits_per_weight == pytest.approx(6)
    assert len(found.sites) < 10
    for index in range(8):
        store.group_file(index).unlink(missing_ok=True)
    nothing = report_weights(store)
    assert (nothing.finished, nothing.bits_per_weight, nothing.sites) == (0, None, ())


def accuracy(divergence: float) -> Accuracy:
    return Accuracy(tokens=100, perplexity=20.5, mean_divergence=divergence, top1_agreement=0.75)


def record(size: int | None, divergence: float | None, failure: str | None = None) -> Record:
    scores = {} if divergence is None else {"0123456789abcdef": accuracy(divergence)}
    return Record(command=("quantize", "--fast"), inputs="i", bytes=size, accuracy=scores, failure=failure)


def write(folder: Path, records: dict[str, Record]) -> None:
    for name, found in records.items():
        (folder / f"{name}.run.json").write_bytes(TypeAdapter(Record).dump_json(found))


def test_a_sweep(tmp_path: Path) -> None:
    write(tmp_path, {"best": record(10, 0.1), "beaten": record(20, 0.2), "broken": record(None, None, "it failed")})
    base = ModelRow(name="base", bytes=40, accuracy=accuracy(0.0))
    (tmp_path / "base.01234567.0123456789abcdef.json").write_bytes(TypeAdapter(ModelRow).dump_json(base))
    (tmp_path / "best").mkdir()
    found = report_sweep(tmp_path)
    (text,) = found.texts
    assert (text.text, text.base) == ("0123456789abcdef", base)
    models = {model.name: model for model in text.models}
    assert {name: model.unbeaten for name, model in models.items()} == {"best": True, "beaten": False, "broken": False}
    assert models["broken"].failure == "it failed"
    assert models["best"].command == "quantize --fast"
    assert (found.failed, found.deleted) == (1, ("beaten", "broken"))


def test_a_sweep_without_text(tmp_path: Path) -> None:
    write(tmp_path, {"only": record(10, None)})
    (text,) = report_sweep(tmp_path).texts
    assert (text.text, text.base, [model.name for model in text.models]) == (None, None, ["only"])


def test_a_folder_without_records_is_no_sweep(tmp_path: Path) -> None:
    (tmp_path / "x.run.json").write_text("{}", encoding="utf-8")
    assert not is_sweep(tmp_path)
    write(tmp_path, {"x": record(1, 1.0)})
    assert is_sweep(tmp_path)
