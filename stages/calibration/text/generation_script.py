"""What is given to a model that writes freely: how a document opens, where it ends, and what comes then."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from stages.calibration.text.chat import ChatMarks

ScriptKind = Literal["text", "chat"]
_LOOP, _LONGEST_PERIOD = 64, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A stretch that the model writes: up to a loop, or a token of ``ends``, which ``then`` takes the place of."""

    ends: frozenset[int]
    at_most: int | None
    """Tokens after which it ends in any case."""
    then: tuple[int, ...]
    """Tokens that are given after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationScript:
    """Given tokens, then passages in turn, over and over."""

    kind: ScriptKind
    opening: tuple[int, ...]
    passages: tuple[Passage, ...]

    def description(self) -> list[object]:
        """All that it consists of, as JSON can hold it."""
        passages = [[sorted(passage.ends), passage.at_most, passage.then] for passage in self.passages]
        return [self.kind, self.opening, passages]

    @property
    def given(self) -> frozenset[int]:
        """Every token that may come out without having been sampled."""
        return frozenset(self.opening).union(*(passage.then for passage in self.passages))


def text_script(tokenizer: PreTrainedTokenizerBase, marks: ChatMarks | None, eos: frozenset[int]) -> GenerationScript:
    """Documents from their first word on, one after the other.

    They open with what the tokenizer puts before any text; where that is nothing, with the first of its special tokens
    (BOS, EOS, padding, unknown) that its chat template doesn't write: the one between documents in pretraining.

    Args:
        tokenizer: the model's.
        marks: its chat template's, None where there is none.
        eos: tokens that end generation.
    """
    added: list[int] = tokenizer("")["input_ids"]
    opening = tuple(added[:1]) or (_separator(tokenizer, marks),)
    end = tokenizer.eos_token_id
    # Text from other sources ends with EOS too; a separator alone does both.
    then = (end, *opening) if added and end is not None and end not in opening else opening
    return GenerationScript(
        kind="text", opening=opening, passages=(Passage(ends=eos | {opening[0]}, at_most=None, then=then),)
    )


def chat_script(
    tokenizer: PreTrainedTokenizerBase, marks: ChatMarks, eos: frozenset[int], longest_question: int
) -> GenerationScript:
    """Conversations of which the model writes both sides: given what stands before a question, it asks one.

    Xu et al. 2024 (Magpie, arXiv 2406.08464). A question of ``longest_question`` tokens gets its answer unasked.
    """
    special = _special_tokens(tokenizer)
    opening = marks.opening or (_separator(tokenizer, marks),)
    question = Passage(ends=eos | (special & {*marks.to_answer[:1]}), at_most=longest_question, then=marks.to_answer)
    answer = Passage(ends=eos | (special & {*marks.to_end[:1]}), at_most=None, then=marks.to_end + opening)
    return GenerationScript(kind="chat", opening=opening, passages=(question, answer))


class WindowWriter:
    """Writes one window by a script: gives its tokens, takes the model's in between."""

    def __init__(self, script: GenerationScript) -> None:
        self._script = script
        self._given = deque(script.opening)
        self._passage = 0
        self._written: list[int] = []

    def next(self, sampled: int) -> int:
        """The next token: the script's where it has one to give, else ``sampled``, else what follows a passage."""
        if self._given:
            return self._given.popleft()
        if not self._is_over(sampled):
            self._written.append(sampled)
            return sampled
        self._given.extend(self._script.passages[self._passage].then)
        self._passage = (self._passage + 1) % len(self._script.passages)
        self._written.clear()
        return self._given.popleft() if self._given else sampled

    def _is_over(self, sampled: int) -> bool:
        passage = self._script.passages[self._passage]
        return sampled in passage.ends or len(self._written) == passage.at_most or is_loop(self._written)


def is_loop(tokens: list[int]) -> bool:
    """Whether the last 64 tokens are a few, at most 16, over and over: a model that does so hardly ever stops."""
    last = tokens[-_LOOP:]
    return len(last) == _LOOP and any(last[period:] == last[:-period] for period in range(1, _LONGEST_PERIOD + 1))


def _separator(tokenizer: PreTrainedTokenizerBase, marks: ChatMarks | None) -> int:
    chat = set() if marks is None else {*marks.opening, *marks.to_answer, *marks.to_end}
    named = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
    there = [token for token in named if token is not None]
    outside = [token for token in there if token not in chat]
    return int((outside or there or [0])[0])


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    added: Sequence[int] = [token for token, shape in tokenizer.added_tokens_decoder.items() if shape.special]
    return frozenset(tokenizer.all_special_ids) | frozenset(added)
