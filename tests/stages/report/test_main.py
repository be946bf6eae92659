"""The report that a run leaves, and ``python -m stages.report``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jinja2
import pytest
from pydantic import TypeAdapter

from stages.commands.parsing import parse_options
from stages.commands.quantize_options import QuantizeConfig
from stages.quantization.search.solver import GroupSolver
from stages.quantization.weights.store import open_store
from stages.quantize import quantize
from stages.records.results import VerifyReport
from stages.report.document import read_report
from tests.stages.report.parsed import parse
from tests.support.commands import Commands


def _arguments(model: Path, cache: Path, folder: Path) -> list[object]:
    paths: list[object] = ["--onnx_path", model, "--cache_dir", cache, "--output_path", folder / "int4"]
    return [*paths, "--algo", "awq_full", "--block_size", 32, "--layers_8bit", "layers.1/mlp/down_proj"]


@pytest.fixture
def arguments(tiny_model: Path, tiny_cache: Path, tmp_path: Path) -> list[object]:
    """Of a search of scales and ranges with an output called int4."""
    return _arguments(tiny_model, tiny_cache, tmp_path)


@pytest.fixture(scope="module")
def made(tiny_model: Path, tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what that search makes."""
    folder = tmp_path_factory.mktemp("made")
    words = [*map(str, _arguments(tiny_model, tiny_cache, folder)), "--target", "any"]
    quantize(parse_options(QuantizeConfig, "program", words))
    return folder


@pytest.fixture
def finished(made: Path, tmp_path: Path) -> None:
    """Let the search have been run already: int4 and int4.weights are there."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """Where that search leaves its report."""
    return tmp_path / "int4.weights" / "report"


def _blocked_page(report: Path, _: pytest.MonkeyPatch) -> None:
    (report / "report.html").unlink()
    (report / "report.html" / "in the way").mkdir(parents=True)


def _broken_page(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = jinja2.Template.render

    def fail(template: jinja2.Template, **values: object) -> str:
        if template.name == "page.html.j2":
            raise ZeroDivisionError("no such scale")
        return real(template, **values)

    monkeypatch.setattr(jinja2.Template, "render", fail)


@pytest.mark.usefixtures("finished")
@pytest.mark.slow
@pytest.mark.parametrize(("spoil", "reason"), [(_blocked_page, "can't be written to"), (_broken_page, "no such scale")])
def test_a_report_that_fails_leaves_the_finished_model(
    spoil: Callable[[Path, pytest.MonkeyPatch], None],
    reason: str,
    arguments: list[object],
    report: Path,
    tmp_path: Path,
    commands: Commands,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tmp_path / "int4" / "model.onnx"
    saved = model.read_bytes()
    shutil.rmtree(model.parent)
    spoil(report, monkeypatch)
    code, printed = commands.quantize(*arguments)
    assert code == 0, printed
    assert model.read_bytes() == saved
    assert "the model is finished, but its report is not" in printed
    assert reason in printed
    assert f"python -m stages.report {report}" in printed


def test_a_run_leaves_its_report(arguments: list[object], report: Path, tmp_path: Path, commands: Commands) -> None:
    code, printed = commands.quantize(*arguments)
    assert code == 0, printed
    assert str(report / "report.html") in printed
    document = read_report(report)
    found = document.quantization
    assert document.title == "int4"
    origin, model = document.origin, arguments[1]
    assert origin.command.startswith(f"genai-quant quantize --onnx_path {model} --output_path {tmp_path / 'int4'} ")
    assert origin.command.endswith("--block_size 32 --layers_8bit layers.1/mlp/down_proj")
    assert (origin.base, origin.base_fingerprint) == (
        Path(str(model)).name,
        open_store(report.parent).recipe.model_fingerprint,
    )
    assert "windows of" in origin.calibration
    assert origin.version == version("genai-quant")
    assert found is not None
    stored = {one.site: one for one in open_store(report.parent).reports()}
    assert {site.report.site: site.report for site in found.sites} == stored
    assert {site.report.format for site in found.sites} == {"4b32", "8ch"}
    assert [site.kind for site in found.sites if site.report.format == "8ch"] == ["mlp/down_proj"]
    assert [(one.kind, one.layer) for one in found.kept] == [("lm_head", None)]
    assert sum(part.after for part in found.sizes) == sum(
        (tmp_path / "int4" / name).stat().st_size for name in ("model.onnx", "model.onnx.data")
    )
    checked = TypeAdapter(VerifyReport).validate_json((report.parent / "verification.json").read_bytes())
    assert found.verified == checked
    assert checked.worst_exact is not None
    (report / "report.html").unlink()
    assert commands.report(tmp_path / "int4")[0] == 0, "its weights lie beside it"
    page = parse((report / "report.html").read_text(encoding="utf-8"))
    for part in ("sizes", "bits", "sites", "checks"):
        assert page.by_id(part)
    assert {site.stored for site in found.sites} == {
        "INT4, a float32 scale for every 32 weights",
        "INT8, a float32 scale for every output channel",
    }


@pytest.mark.usefixtures("finished")
@pytest.mark.slow
def test_a_damaged_report_is_named_before_the_search(
    arguments: list[object], report: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    (report / "report.json").write_text("{", encoding="utf-8")
    monkeypatch.setattr(GroupSolver, "solve", lambda *_: pytest.fail("searched"))
    code, printed = commands.quantize(*arguments, "--overwrite")
    assert code == 2
    assert f"{report / 'report.json'} can't be read" in printed


@pytest.mark.usefixtures("finished")
@pytest.mark.slow
def test_evaluations_stay_when_a_run_is_repeated(
    arguments: list[object], report: Path, tiny_model: Path, unseen_text: Path, tmp_path: Path, commands: Commands
) -> None:
    compared = ["--base", tiny_model, "--model", tmp_path / "int4", "--text", unseen_text, "--windows", 1]
    code, printed = commands.evaluate(*compared, "--seq_len", 32, "--report", report)
    assert code == 0, printed
    both = read_report(report)
    assert both.quantization is not None
    assert len(both.evaluations) == 1
    assert commands.quantize(*arguments, "--overwrite")[0] == 0
    assert read_report(report).evaluations == both.evaluations


@pytest.mark.usefixtures("finished")
@pytest.mark.slow
def test_a_page_is_made_again(report: Path, tiny_model: Path, tmp_path: Path, commands: Commands) -> None:
    page = (report / "report.html").read_bytes()
    (report / "report.html").unlink()
    code, printed = commands.report(report)
    assert code == 0, printed
    assert (report / "report.html").read_bytes() == page
    # From weights only: everything but sizes.
    weights, other = report.parent, tmp_path / "other"
    assert commands.report(other, "--weights_path", weights)[0] == 0
    whole, without = read_report(report).quantization, read_report(other).quantization
    assert whole is not None
    assert without is not None
    assert (without.sites, without.kept, without.sizes) == (whole.sites, whole.kept, ())
    models = ["--base", tiny_model, "--model", tmp_path / "int4"]
    assert commands.report(other, "--weights_path", weights, *models)[0] == 0
    assert read_report(other).quantization == whole


@pytest.mark.usefixtures("finished")
@pytest.mark.slow
@pytest.mark.parametrize("content", ["{", '{"sites": 3, "merged": 3}'])
def test_unreadable_checks_are_said(report: Path, tmp_path: Path, commands: Commands, content: str) -> None:
    checks = report.parent / "verification.json"
    checks.write_text(content, encoding="utf-8")
    code, printed = commands.report(tmp_path / "other", "--weights_path", report.parent)
    assert code == 0
    assert f"{checks} can't be read (it is damaged or of another version)" in printed
    checks.unlink()
    assert "can't be read" not in commands.report(tmp_path / "other", "--weights_path", report.parent)[1]


@pytest.mark.usefixtures("finished")
@pytest.mark.slow
def test_a_report_of_an_earlier_version_stays_readable_and_a_damaged_one_stops_the_dry_run_too(
    arguments: list[object], report: Path, tmp_path: Path, commands: Commands
) -> None:
    earlier = json.loads((report / "report.json").read_text(encoding="utf-8"))
    for added_later in ("data", "tables", "widened"):
        del earlier["quantization"]["verified"][added_later]
    del earlier["origin"], earlier["quantization"]["embeddings"]
    for site in earlier["quantization"]["sites"]:
        del site["stored"]
    (report / "report.json").write_text(json.dumps(earlier), encoding="utf-8")
    code, printed = commands.quantize(
        *arguments[:4], "--output_path", tmp_path / "again", *arguments[6:], "--weights_path", report.parent
    )
    assert code == 0, printed
    (report / "report.json").write_text("{", encoding="utf-8")
    code, printed = commands.quantize(
        *arguments[:4],
        "--output_path",
        tmp_path / "third",
        *arguments[6:],
        "--weights_path",
        report.parent,
        "--dry_run",
    )
    assert "can't be read as a report of this version" in printed


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "holds no report.json; pass a report's folder, or --weights_path too."),
        (["--base", "x"], "--base and --model go together."),
        (["--base", "x", "--model", "y"], "--base and --model go with --weights_path."),
    ],
)
def test_what_no_page_can_be_made_from_is_said(
    tmp_path: Path, commands: Commands, more: list[object], said: str
) -> None:
    code, printed = commands.report(tmp_path / "none", *more)
    assert code == 2
    assert said in printed
    assert not (tmp_path / "none").exists()


@pytest.mark.usefixtures("finished")
@pytest.mark.slow
def test_unfinished_weights_make_no_page(report: Path, tmp_path: Path, commands: Commands) -> None:
    next(report.parent.glob("*.safetensors")).unlink()
    code, printed = commands.report(tmp_path / "other", "--weights_path", report.parent)
    assert code == 2
    assert "isn't complete; run python -m stages.quantize again to finish it." in printed
