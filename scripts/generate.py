"""Print one greedy sentence from each model: ``python -m scripts.generate --model DIR [DIR ...] --prompt "..."``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from scripts.options import GenerateConfig
from stages.commands.output import Section, unwrapped
from stages.commands.run import run_command
from stages.errors import UserError
from stages.runtime.genai import GenaiSession, cannot_run, open_genai

_OPTION = "--model"
_SENTENCE_END = re.compile(r"[.!?](?=\s)|\n\n")


def generate_sentence(folder: Path, prompt: str, max_new_tokens: int) -> str:
    """Return the model's greedy answer, up to the end of its first sentence or its end token.

    Args:
        folder: an ORT-GenAI model.
        prompt: wrapped in the model's chat template where the folder has one.
        max_new_tokens: longest answer, in tokens.

    Raises:
        UserError: the folder isn't an ORT-GenAI model, or the runtime can't run it here.
    """
    session = open_genai(folder, _OPTION)
    try:
        return until_sentence_end(_decoded(session, prompt, max_new_tokens))
    except RuntimeError as error:
        raise cannot_run(folder, _OPTION, error) from error


def _decoded(session: GenaiSession, prompt: str, max_new_tokens: int) -> Iterator[str]:
    """Yield the answer's text, one token at a time."""
    decoder = session.tokenizer.create_stream()
    for token in session.greedy(session.prompt_tokens(prompt), max_new_tokens):
        yield decoder.decode(token)


def until_sentence_end(parts: Iterable[str]) -> str:
    """Join ``parts`` as far as the first full stop, question or exclamation mark before a space, or blank line."""
    text = ""
    for part in parts:
        text += part
        end = _SENTENCE_END.search(text)
        if end is not None:
            return text[: end.end()].strip()
    return text.strip()


def run(config: GenerateConfig) -> Iterator[Section]:
    """Print the prompt and each model's answer."""
    if config.max_new_tokens < 1:
        raise UserError("--max_new_tokens must be at least 1.")
    yield Section(name="prompt", table=unwrapped(f"prompt: {config.prompt}"), record=config.prompt)
    answers: dict[str, str] = {}
    for folder in config.model:
        answers[str(folder)] = sentence = generate_sentence(folder, config.prompt, config.max_new_tokens)
        yield Section(name="answers", table=unwrapped(f"{folder.name}: {sentence}"), record=answers)


if __name__ == "__main__":
    run_command(GenerateConfig, run, "python -m scripts.generate")
