"""lm-eval on ONNX Runtime gives the numbers of its own Hugging Face model; wrong requests are one sentence."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path

import pytest
from rich.console import Console

from stages.calibration.text.tokenizer import load_tokenizer
from stages.commands.progress import Progress
from stages.errors import UserError
from stages.evaluation import lm_tasks
from stages.evaluation.lm_tasks import TaskRequest, find_tasks, run_tasks
from stages.evaluation.records import TaskScore
from stages.model.directory import locate_model
from stages.runtime.decoder import open_decoder
from stages.runtime.session import SessionSettings

pytest.importorskip("lm_eval", reason="lm-eval is an optional package")

from stages.evaluation.lm_model import OnnxRuntimeLM

TASKS = Path(__file__).parent / "lm_eval_tasks"
SETTINGS = SessionSettings(accuracy_level=1)
QUIET = Progress(Console(quiet=True))


@pytest.fixture(scope="module")
def request_of_all() -> TaskRequest:
    return find_tasks([str(TASKS)], None)


@pytest.fixture(scope="module")
def hugging_face(tiny_hf: Path):
    """lm-eval's own model of the same weights."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(tiny_hf), device="cpu", dtype="float32", batch_size=3)


@pytest.fixture(scope="module")
def ours(tiny_model: Path):
    with open_decoder(locate_model(tiny_model), SETTINGS, None) as decoder:
        tokenizer = load_tokenizer(str(tiny_model), trust_remote_code=False)
        yield OnnxRuntimeLM(decoder, tokenizer, QUIET)


def instances(kind: str, arguments: list[tuple[object, ...]]):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


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


# Spaces at the end of a context, no context, one that is the first token already, one too long for the model.
PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is ", "Paris"),
    ("", "Once upon a time"),
    ("<s>", "Once upon a time"),
    ("a word and " * 300, "another word"),
    ("x", " y"),
]


def test_likelihoods_are_those_of_lm_evals_own_model(ours: OnnxRuntimeLM, hugging_face) -> None:
    asked = instances("loglikelihood", PAIRS)
    assert len(ours.tok_encode(PAIRS[4][0])) > ours.max_length
    found, wanted = ours.loglikelihood(asked), hugging_face.loglikelihood(asked)
    for (mine, my_greedy), (theirs, their_greedy) in zip(found, wanted, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
        assert my_greedy == their_greedy


def test_rolling_likelihoods_are_those_of_lm_evals_own_model(ours: OnnxRuntimeLM, hugging_face) -> None:
    long = " ".join(f"Line {number} holds {number * number % 89} apples." for number in range(80))
    assert len(ours.tok_encode(long)) > 2 * ours.max_length
    asked = instances("loglikelihood_rolling", [(long,), ("A short text.",)])
    assert ours.loglikelihood_rolling(asked) == pytest.approx(hugging_face.loglikelihood_rolling(asked), rel=1e-4)


def test_answers_are_those_of_lm_evals_own_model(ours: OnnxRuntimeLM, hugging_face) -> None:
    settings = [
        {"until": ["\n"], "max_gen_toks": 20, "do_sample": False},
        {"until": "e", "max_gen_toks": 20},
        {"until": [], "max_gen_toks": 7},
    ]
    asked = instances("generate_until", [("The city of", setting) for setting in settings])
    found = ours.generate_until(asked)
    assert found == hugging_face.generate_until(asked)
    assert "e" not in found[1]
    assert found[2]


def test_an_end_token_of_the_models_configuration_ends_answers(
    ours: OnnxRuntimeLM, tiny_model: Path, tmp_path: Path
) -> None:
    settings = {"until": [], "max_gen_toks": 12}
    (whole,) = ours.generate_until(instances("generate_until", [("The city of", settings)]))
    folder = shutil.copytree(tiny_model, tmp_path / "two-ends")
    with open_decoder(locate_model(folder), SETTINGS, None) as decoder:
        third = list(islice(decoder.continuation(ours.tok_encode("The city of")), 3))[-1]
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = [1, third]
    (folder / "genai_config.json").write_text(json.dumps(config))
    with open_decoder(locate_model(folder), SETTINGS, None) as decoder:
        model = OnnxRuntimeLM(decoder, ours.tokenizer, QUIET)
        (cut,) = model.generate_until(instances("generate_until", [("The city of", settings)]))
    assert whole.startswith(cut)
    assert len(cut) < len(whole)


def test_sampling_and_too_long_a_request_are_refused(ours: OnnxRuntimeLM) -> None:
    with pytest.raises(UserError, match="asks for sampling"):
        ours.generate_until(instances("generate_until", [("x", {"do_sample": True, "temperature": 0.7})]))
    with pytest.raises(UserError, match=r"needs 601 tokens at once, but .* reads at most 512"):
        ours.generate_until(instances("generate_until", [("x", {"max_gen_toks": 600})]))
    with pytest.raises(UserError, match="tokens at once"):
        ours.loglikelihood(instances("loglikelihood", [("x", "many words " * 300)]))


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
