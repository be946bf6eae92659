"""One greedy sentence from each model: ``python -m scripts.generate --model DIR [DIR ...] --prompt "..."``."""

from __future__ import annotations

from collections.abc import Iterator

from scripts.generation import generate_sentence
from scripts.options import GenerateConfig
from stages.cli import run_command
from stages.errors import UserError
from stages.screen import Section, unwrapped


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
