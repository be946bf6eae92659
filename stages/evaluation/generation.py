"""Generate each model's greedy answers to the same prompts, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from stages.commands.progress import Progress
from stages.evaluation.records import Answer, Generation
from stages.runtime.genai import cannot_run, open_genai

_OPTION = "--generate"


def generate(
    folders: Sequence[Path], prompts: Sequence[str], max_new_tokens: int, progress: Progress
) -> tuple[Generation, ...]:
    """Return each model's greedy answers to the same tokens: each prompt as the base writes it.

    One model is open at a time.

    Args:
        folders: the models' folders, the base first.
        prompts: what they answer.
        max_new_tokens: tokens of an answer at most.
        progress: shows how many answers are there.

    Raises:
        UserError: onnxruntime-genai isn't installed, or a model can't be run by it here.
    """
    task = progress.add_task("answers", total=len(folders) * len(prompts), unit="answers")
    answers: list[list[tuple[list[int], str]]] = []
    asked: list[list[int]] = []
    templated = False
    for folder in folders:
        session = open_genai(folder, _OPTION)
        answers.append([])
        try:
            if not asked:
                asked, templated = [session.prompt_tokens(prompt) for prompt in prompts], session.has_template
            for prompt in asked:
                tokens = list(session.generate(prompt, max_new_tokens))
                answers[-1].append((tokens, session.text(tokens)))
                progress.advance(task)
        except RuntimeError as error:
            raise cannot_run(folder, _OPTION, error) from error
        del session  # the next one would open beside it
    progress.remove_task(task)
    names = [folder.name for folder in folders]
    return tuple(
        Generation(prompt=prompt, templated=templated, answers=_compared(names, of_prompt))
        for prompt, *of_prompt in zip(prompts, *answers, strict=True)
    )


def _compared(names: Sequence[str], answers: Sequence[tuple[list[int], str]]) -> tuple[Answer, ...]:
    base, _ = answers[0]
    return tuple(
        Answer(model=name, text=text, tokens=len(tokens), same_tokens=common_prefix(base, tokens))
        for name, (tokens, text) in zip(names, answers, strict=True)
    )


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
