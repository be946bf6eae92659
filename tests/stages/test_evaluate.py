"""``python -m stages.evaluate``: two models beside their base in everything it measures, kept and found again."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

import stages.evaluation.run
from stages.commands.quantize_options import QuantizeConfig
from stages.errors import UserError
from stages.evaluation.records import Evaluation, TaskScore
from stages.evaluation.tasks.lm_tasks import TaskRequest
from stages.model.directory import ModelDirectory
from stages.quantize import quantize
from stages.report.document import read_report
from tests.stages.report.parsed import parse
from tests.support.commands import Commands

TASKS = Path(__file__).parent / "lm_eval_tasks"
MODELS = ("base", "coarse", "twin")


@pytest.fixture(scope="module")
def folder(tiny_model: Path, unseen_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base, its copy called twin, an INT4 model called coarse, and a text."""
    folder = tmp_path_factory.mktemp("evaluated")
    for name in ("base", "twin"):
        shutil.copytree(tiny_model, folder / name)
    shutil.copyfile(unseen_text, folder / "text.txt")
    config = QuantizeConfig(
        onnx_path=folder / "base", output_path=folder / "coarse", algo="rtn_dq", block_size=32, target="any"
    )
    quantize(config)
    return folder


def arguments(folder: Path) -> list[object]:
    compared = ["--base", folder / "base", "--model", folder / "coarse", folder / "twin"]
    return [*compared, "--text", folder / "text.txt", "--windows", 2, "--seq_len", 32, "--worst", 2]


def in_use() -> list[object]:
    asked: list[object] = ["--generate", "The city", "A list", "--max_new_tokens", 5]
    return [*asked, "--speed", "--speed_rounds", 1, "--speed_prompt_tokens", 8, "--speed_new_tokens", 3]


@pytest.mark.slow
def test_all_of_it_is_shown_and_kept(folder: Path, tmp_path: Path, commands: Commands) -> None:
    report = tmp_path / "report"
    code, printed = commands.evaluate(*arguments(folder), *in_use(), "--report", report, "--verbose")
    assert code == 0, printed
    assert f"report: {report / 'report.html'}" in printed
    document = read_report(report)
    assert document.title == "coarse, twin"
    (found,) = document.evaluations
    _check_accuracy(found, printed)
    _check_use(found, printed)
    page = parse((report / "report.html").read_text(encoding="utf-8"))
    for part in ("kl", "positions-0", "worst-0", "answers", "speed"):
        assert page.by_id(part)


def _check_accuracy(found: Evaluation, printed: str) -> None:
    base, coarse, twin = found.rows
    assert [row.name for row in found.rows] == list(MODELS)
    assert twin.accuracy == base.accuracy
    assert twin.worst == ()
    accuracy = coarse.accuracy
    assert accuracy.divergence_99 is not None
    assert 0 < accuracy.mean_divergence < accuracy.divergence_99
    for figure in (f"{accuracy.perplexity:.3f}", f"{accuracy.mean_divergence:.5f}", f"{accuracy.divergence_99:.4f}"):
        assert figure in printed
    levels = "base and twin: none (nothing is quantized); coarse: 4 (ONNX Runtime's default on the CPU)"
    assert f"accuracy levels: {levels}" in " ".join(printed.split())
    assert len(coarse.worst) == 2
    # Of 62 predictions the percentile lies between the two worst.
    assert coarse.worst[0].divergence >= accuracy.divergence_99 >= coarse.worst[1].divergence
    assert f"{coarse.worst[0].divergence:.3f}" in printed
    assert sum(part.tokens for part in coarse.positions) == accuracy.tokens == 2 * 31


def _check_use(found: Evaluation, printed: str) -> None:
    assert [one.prompt for one in found.generations] == ["The city", "A list"]
    for generation in found.generations:
        assert [answer.model for answer in generation.answers] == list(MODELS)
        base, _, twin = generation.answers
        assert (twin.text, twin.same_tokens) == (base.text, base.tokens)
        assert f"{generation.prompt} (as it stands)" in printed
    assert found.speed is not None
    assert [model.model for model in found.speed.models] == list(MODELS)
    for model in found.speed.models:
        assert model.decode.median > 0
        assert f"{model.decode.median:.1f}" in printed


def test_the_same_comparison_is_not_run_again(
    folder: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept.json"
    report = ["--report", tmp_path / "report"]
    code, first = commands.evaluate(*arguments(folder), "--generate", "The city", "--results", kept, *report)
    assert code == 0, first
    monkeypatch.setattr(stages.evaluation.run, "compare", lambda *_: pytest.fail("evaluated again"))
    for place in (["--results", kept], report):
        code, again = commands.evaluate(*arguments(folder), *place)
        assert code == 0, again
        table = again[again.index("Accuracy on") :].split("report: ")[0].splitlines()
        assert len(table) > 12
        assert set(table) <= set(first.splitlines())
    # Another prompt is added; what is known stays.
    code, more = commands.evaluate(*arguments(folder), "--generate", "A list", *report)
    assert code == 0, more
    (found,) = read_report(tmp_path / "report").evaluations
    assert [one.prompt for one in found.generations] == ["The city", "A list"]
    # What only the report knows stays there, too.
    code, both = commands.evaluate(*arguments(folder), "--results", kept, *report)
    assert code == 0, both
    (found,) = read_report(tmp_path / "report").evaluations
    assert {one.prompt for one in found.generations} == {"The city", "A list"}


def test_finished_parts_are_kept_where_a_later_one_stops(
    folder: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise UserError("no answers today.")

    def stop_at_twin(model: ModelDirectory, *_: object) -> tuple[TaskScore, ...]:
        if model.folder.name == "twin":
            raise KeyboardInterrupt
        name = model.folder.name
        return (TaskScore(model=name, task="t", metric="acc", filter="", value=0.5, stderr=None, samples=8),)

    monkeypatch.setattr(stages.evaluation.run, "generate", fail)
    request = TaskRequest(specs=(), limit=None, manager=None)
    monkeypatch.setattr(stages.evaluation.run, "find_tasks", lambda *_: request)
    monkeypatch.setattr(stages.evaluation.run, "run_tasks", stop_at_twin)
    report = tmp_path / "report"
    code, printed = commands.evaluate(*arguments(folder), "--generate", "The city", "--report", report)
    assert (code, "no answers today" in printed) == (2, True), printed
    (compared,) = read_report(report).evaluations
    assert [row.name for row in compared.rows] == list(MODELS)
    monkeypatch.setattr(stages.evaluation.run, "compare", lambda *_: compared)
    code, printed = commands.evaluate(*arguments(folder), "--lm_eval_tasks", "t", "--report", report)
    assert code == 130, printed
    (found,) = read_report(report).evaluations
    assert (found.rows, [score.model for score in found.tasks]) == (compared.rows, ["base", "coarse"])
    code, printed = commands.evaluate(*arguments(folder), "--lm_eval_tasks", "t")
    assert code == 130
    assert "finished parts of an evaluation are kept with --results or --report only" in " ".join(printed.split())


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is an optional package")
def test_local_tasks_are_scored_for_every_model(folder: Path, tmp_path: Path, commands: Commands) -> None:
    task = TASKS / "places.yaml"
    code, printed = commands.evaluate(*arguments(folder), "--lm_eval_tasks", task, "--report", tmp_path / "report")
    assert code == 0, printed
    (found,) = read_report(tmp_path / "report").evaluations
    scores = {(score.model, score.metric): score for score in found.tasks}
    assert set(scores) == {(model, metric) for model in MODELS for metric in ("acc", "acc_norm")}
    assert scores["twin", "acc"].value == scores["base", "acc"].value
    assert {score.samples for score in found.tasks} == {8}
    assert f"{scores['coarse', 'acc'].value:.4f}" in printed


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--worst", -1], "--worst must be 0 or more."),
        (["--windows", 0], "--windows must be at least 1."),
        (["--speed_new_tokens", 1], "--speed_new_tokens must be at least 2: the first ends the prompt's time."),
        (["--speed", "--speed_prompt_tokens", 65], "65 is more than the 64 tokens of text that are read."),
    ],
)
def test_options_are_checked_first(folder: Path, commands: Commands, more: list[object], said: str) -> None:
    code, printed = commands.evaluate(*arguments(folder), *more)
    assert code == 2
    assert said in printed
    assert "Traceback" not in printed


def test_a_report_of_another_kind_is_refused_first(
    folder: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages.evaluation.run, "compare", lambda *_: pytest.fail("evaluated"))
    (tmp_path / "report.json").write_text("[]", encoding="utf-8")
    code, printed = commands.evaluate(*arguments(folder), "--report", tmp_path)
    assert code == 2
    assert "report.json can't be read as a report of this version" in printed
    assert (tmp_path / "report.json").read_text(encoding="utf-8") == "[]"


@pytest.mark.parametrize("option", [["--speed", "--speed_prompt_tokens", 8], ["--generate", "The city"]])
def test_a_model_that_the_runtime_cannot_open_is_named_first(
    folder: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch, option: list[object]
) -> None:
    monkeypatch.setattr(stages.evaluation.run, "compare", lambda *_: pytest.fail("evaluated"))
    bare = shutil.copytree(folder / "coarse", tmp_path / "bare")
    (bare / "genai_config.json").unlink()
    code, printed = commands.evaluate(*arguments(folder), "--model", bare, *option)
    assert code == 2
    assert f"{option[0]} {bare} has no genai_config.json" in printed
