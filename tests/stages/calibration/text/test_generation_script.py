"""Scripts open documents as training did, and a writer mixes their tokens with the model's in the right order."""

from __future__ import annotations

from itertools import chain, repeat
from pathlib import Path

import pytest
import transformers
from tokenizers import processors

from stages.calibration.text.chat import ChatMarks, require_chat_template
from stages.calibration.text.chat_document import ChatDocument
from stages.calibration.text.generation_script import (
    GenerationScript,
    Turn,
    WindowWriter,
    chat_script,
    is_loop,
    text_script,
)
from tests.stages.calibration.chats import TEMPLATE

BOS, EOS = 0, 1


@pytest.fixture
def tokenizer(tiny_tokenizer: Path) -> transformers.PreTrainedTokenizerBase:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def written(script: GenerationScript, sampled: list[int]) -> list[int]:
    """Return what a writer writes until all of ``sampled``, one for each step, is used up."""
    writer = WindowWriter(script)
    return [writer.next(token) for token in sampled]


def test_given_tokens_come_first_and_end_tokens_are_replaced() -> None:
    question = Turn(ends=frozenset({9}), at_most=3, then=(20, 21))
    answer = Turn(ends=frozenset({8, 9}), at_most=None, then=(30,))
    script = GenerationScript(kind="chat", opening=(10, 11), turns=(question, answer))
    sampled = [1, 2, 3, 9, 5, 6, 7, 7, 7, 7, 8, 1, 1, 1, 1, 1]
    #          given  end given          answer   end   question, three at most, then given
    assert written(script, sampled) == [10, 11, 3, 20, 21, 6, 7, 7, 7, 7, 30, 1, 1, 1, 20, 21]
    assert script.given == {10, 11, 20, 21, 30}


def test_where_nothing_is_given_after_a_turn_the_next_one_begins_at_once() -> None:
    turns = (Turn(ends=frozenset({9}), at_most=None, then=()), Turn(ends=frozenset(), at_most=None, then=(5,)))
    assert written(GenerationScript(kind="chat", opening=(1,), turns=turns), [0, 2, 9, 9, 3]) == [1, 2, 9, 9, 3]


def test_a_model_that_turns_in_circles_begins_anew() -> None:
    script = GenerationScript(kind="text", opening=(1,), turns=(Turn(ends=frozenset(), at_most=None, then=(2, 1)),))
    circle = [*range(100, 116)]
    tokens = written(script, [0, 7, *circle * 6])
    assert tokens[: 2 + 64 + 2] == [1, 7, *circle * 4, 2, 1]
    assert len(tokens) == 2 + 96


@pytest.mark.parametrize(
    ("tokens", "loop"),
    [
        ([5] * 64, True),
        ([5] * 63, False),
        ([9, *[1, 2, 3] * 22], True),
        ([*range(16)] * 4, True),
        ([*range(17)] * 4, False),
        ([*[1, 2, 3] * 22, 4], False),
    ],
)
def test_a_loop_is_few_tokens_many_times(tokens: list[int], loop: bool) -> None:
    assert is_loop(tokens) == loop


def test_texts_begin_and_end_as_the_tokenizer_lets_them(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    script = text_script(tokenizer, None, frozenset({EOS}))
    assert written(script, [50, 50, EOS, 50, 50, BOS, 50, 50]) == [BOS, 50, EOS, BOS, 50, EOS, BOS, 50]


@pytest.mark.parametrize("in_chats", ["<s>", "</s>", "neither"])
def test_where_the_tokenizer_adds_nothing_texts_begin_with_a_token_that_is_not_the_chats(
    tokenizer: transformers.PreTrainedTokenizerBase, in_chats: str
) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    assert tokenizer("")["input_ids"] == []
    marks = {
        "<s>": ChatMarks(opening=(BOS, 70), to_answer=(80,), to_end=(BOS,)),
        "</s>": ChatMarks(opening=(60, 70), to_answer=(EOS, 80), to_end=(EOS,)),
        "neither": None,
    }
    separator = EOS if in_chats == "<s>" else BOS
    script = text_script(tokenizer, marks[in_chats], frozenset({EOS}))
    assert written(script, [50, 50, EOS, 50]) == [separator, 50, separator, 50]


def test_chats_are_what_the_template_makes_of_question_and_answer(
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> None:
    template = require_chat_template(tokenizer)
    script = chat_script(tokenizer, template.marks(), frozenset({EOS}), 100)
    question, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Where?", "Here."))
    expected = template.tokens(
        ChatDocument(messages=({"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}))
    )
    opening, to_answer = len(script.opening), len(script.turns[0].then)
    sampled = chain(repeat(5, opening), question, [EOS], repeat(5, to_answer - 1), answer, [EOS])
    assert written(script, list(sampled)) == expected
    # The next conversation begins as the first one did.
    assert script.turns[1].then[1:] == script.opening


def test_a_question_without_an_end_is_answered_all_the_same(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    script = chat_script(tokenizer, require_chat_template(tokenizer).marks(), frozenset({EOS}), 4)
    tokens = written(script, [50] * 40)
    start = len(script.opening)
    then = script.turns[0].then
    assert tokens[start : start + 4 + len(then)] == [50, 50, 50, 50, *then]
    assert set(tokens[start + 4 + len(then) :]) == {50}
