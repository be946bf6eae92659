"""Tasks get the scores of lm-eval's own Hugging Face model; wrong requests are one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from stages.commands.progress import Progress
from stages.errors import UserError
from stages.evaluation.records import TaskScore
from stages.evaluation.tasks import lm_tasks
from stages.evaluation.tasks.lm_tasks import TaskRequest, find_tasks, run_tasks
from stages.model.directory import locate_model
from stages.runtime.session import SessionSettings

pytest.importorskip("lm_eval", reason="lm-eval is an optional package")

TASKS = Path(__file__).parent / "lm_eval_tasks"
SETTINGS = SessionSettings(accuracy_level=1)
QUIET = Progress(Console(quiet=True))


@pytest.fixture(scope="module")
def request_of_all() -> TaskRequest:
    return find_tasks([str(TASKS)], None)


def test_tasks_have_the_scores_of_lm_evals_own_model(tiny_model: Path, hugging_face, request_of_all) -> None:
    from lm_eval.evaluator import simple_evaluate

    scores = run_tasks(locate_model(tiny_model), request_of_all, SETTINGS, QUIET)
    expected = simple_evaluate(hugging_face, tasks=list(request_of_all.specs), task_manager=request_of_all.manager)
    found = {(score.task, score.metric): score for score in scores}
    wanted = {
        (task, key.partition(",")[0]): value
        for task, metrics in expected["results"].items()
        for key, value in metrics.items()
        if "," in key and "_stderr" not in key
    }
    assert {task for task, _ in found} == {"places", "counting", "prose"}
    assert set(found) == set(wanted)
    # Two float32 implementations; word perplexity is exp of a sum over a hundred tokens.
    assert {key: score.value for key, score in found.items()} == pytest.approx(wanted, rel=1e-4)
    accuracy = found["places", "acc"]
    assert accuracy.model == tiny_model.name
    assert accuracy.samples == 8
    assert accuracy.stderr == pytest.approx(expected["results"]["places"]["acc_stderr,none"])
    # A random model should be wrong sometimes and right sometimes, or the comparison shows little.
    assert 0 < accuracy.value < 1


def test_a_limit_runs_fewer_samples(tiny_model: Path) -> None:
    request = find_tasks([str(TASKS / "places.yaml")], 3)
    scores: tuple[TaskScore, ...] = run_tasks(locate_model(tiny_model), request, SETTINGS, QUIET)
    assert {score.samples for score in scores} == {3}


def test_requests_that_cannot_be_met_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--lm_eval_tasks .*missing\.yaml doesn't exist"):
        find_tasks([str(tmp_path / "missing.yaml")], None)
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: [", encoding="utf-8")
    with pytest.raises(UserError, match=r"broken\.yaml can't be read \(ParserError"):
        find_tasks([str(broken)], None)
    monkeypatch.setattr(lm_tasks, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="needs lm-eval, which isn't installed: pip install 'lm-eval"):
        find_tasks([str(TASKS)], None)


def test_missing_data_are_one_sentence(tiny_model: Path, tmp_path: Path) -> None:
    task = (TASKS / "places.yaml").read_text().replace("places.jsonl", "nowhere.jsonl")
    (tmp_path / "places.yaml").write_text(task, encoding="utf-8")
    request = find_tasks([str(tmp_path)], None)
    with pytest.raises(UserError, match=r"lm-eval stopped \(.*nowhere\.jsonl"):
        run_tasks(locate_model(tiny_model), request, SETTINGS, QUIET)
