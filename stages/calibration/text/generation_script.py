"""Scripts for a model that writes its own text: how a document opens, where each turn ends, and what comes then."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from stages.calibration.text.chat import ChatMarks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ScriptKind = Literal["text", "chat"]
_LOOP, _LONGEST_PERIOD = 64, 16
"""A loop: the last tokens, so many, are at most so many over and over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A stretch that the model writes, up to an end token, a limit, or a loop."""

    ends: frozenset[int]
    """Tokens that end it; ``then`` takes their place."""
    at_most: int | None
    """Tokens after which it ends in any case."""
    then: tuple[int, ...]
    """Tokens that are given after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationScript:
    """Given tokens, then turns of the model, over and over."""

    kind: ScriptKind
    opening: tuple[int, ...]
    turns: tuple[Turn, ...]

    def description(self) -> list[object]:
        """Return all that it consists of, as JSON can hold it."""
        return [self.kind, self.opening, [[sorted(turn.ends), turn.at_most, turn.then] for turn in self.turns]]

    @property
    def given(self) -> frozenset[int]:
        """Return every token that may come out without having been sampled."""
        return frozenset(self.opening).union(*(turn.then for turn in self.turns))


def text_script(tokenizer: PreTrainedTokenizerBase, marks: ChatMarks | None, eos: frozenset[int]) -> GenerationScript:
    """Return the script of documents from their first word on, one after the other.

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
        kind="text", opening=opening, turns=(Turn(ends=eos | {opening[0]}, at_most=None, then=then),)
    )


def chat_script(
    tokenizer: PreTrainedTokenizerBase, marks: ChatMarks, eos: frozenset[int], longest_question: int
) -> GenerationScript:
    """Return the script of conversations whose both sides the model writes: given what precedes a question, it asks.

    Xu et al. 2024 (Magpie, arXiv 2406.08464).

    Args:
        tokenizer: the model's.
        marks: its chat template's.
        eos: tokens that end generation.
        longest_question: tokens after which a question is answered though it has no end.
    """
    special = _special_tokens(tokenizer)
    opening = marks.opening or (_separator(tokenizer, marks),)
    question = Turn(ends=eos | (special & {*marks.to_answer[:1]}), at_most=longest_question, then=marks.to_answer)
    answer = Turn(ends=eos | (special & {*marks.to_end[:1]}), at_most=None, then=marks.to_end + opening)
    return GenerationScript(kind="chat", opening=opening, turns=(question, answer))


class WindowWriter:
    """Writes one window by a script: gives the script's tokens, and takes the model's in between."""

    def __init__(self, script: GenerationScript) -> None:
        self._script = script
        self._given = deque(script.opening)
        self._turn = 0
        self._written: list[int] = []

    def next(self, sampled: int) -> int:
        """Return the next token: the script's where it has one to give, else ``sampled``, else what follows a turn."""
        if self._given:
            return self._given.popleft()
        if not self._is_over(sampled):
            self._written.append(sampled)
            return sampled
        self._given.extend(self._script.turns[self._turn].then)
        self._turn = (self._turn + 1) % len(self._script.turns)
        self._written.clear()
        return self._given.popleft() if self._given else sampled

    def _is_over(self, sampled: int) -> bool:
        turn = self._script.turns[self._turn]
        return sampled in turn.ends or len(self._written) == turn.at_most or is_loop(self._written)


def is_loop(tokens: list[int]) -> bool:
    """Return whether the last 64 tokens repeat a few, at most 16, over and over: a model hardly ever leaves a loop."""
    last = tokens[-_LOOP:]
    return len(last) == _LOOP and any(last[period:] == last[:-period] for period in range(1, _LONGEST_PERIOD + 1))


def _separator(tokenizer: PreTrainedTokenizerBase, marks: ChatMarks | None) -> int:
    chat = set() if marks is None else {*marks.opening, *marks.to_answer, *marks.to_end}
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
    known = [token for token in special if token is not None]
    outside = [token for token in known if token not in chat]
    return int((outside or known or [0])[0])


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    added = (token for token, shape in tokenizer.added_tokens_decoder.items() if shape.special)
    return frozenset(tokenizer.all_special_ids).union(added)
