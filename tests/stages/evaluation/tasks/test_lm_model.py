"""Our adapter answers lm-eval's requests as lm-eval's own Hugging Face model does."""

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
from stages.model.directory import locate_model
from stages.runtime.decoder import open_decoder
from stages.runtime.session import SessionSettings

pytest.importorskip("lm_eval", reason="lm-eval is an optional package")

from stages.evaluation.tasks.lm_model import OnnxRuntimeLM

SETTINGS = SessionSettings(accuracy_level=1)
QUIET = Progress(Console(quiet=True))


@pytest.fixture(scope="module")
def ours(tiny_model: Path):
    with open_decoder(locate_model(tiny_model), SETTINGS, None) as decoder:
        tokenizer = load_tokenizer(str(tiny_model))
        yield OnnxRuntimeLM(decoder, tokenizer, QUIET)


def instances(kind: str, arguments: list[tuple[object, ...]]):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


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
