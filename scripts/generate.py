"""One greedy sentence from each model: ``python -m scripts.generate --model DIR [DIR ...] --prompt "..."``."""

from __future__ import annotations

from rich.console import Console

from scripts.generation import generate_sentence
from scripts.options import GenerateConfig
from stages.cli import run_command
from stages.errors import UserError


def run(config: GenerateConfig, _: Console) -> None:
    """Print the prompt and each model's answer."""
    if config.max_new_tokens < 1:
        raise UserError("--max_new_tokens must be at least 1.")
    output = Console()
    output.print(f"prompt: {config.prompt}", highlight=False, markup=False, soft_wrap=True)
    for folder in config.model:
        sentence = generate_sentence(folder, config.prompt, config.max_new_tokens)
        output.print(f"{folder.name}: {sentence}", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    run_command(GenerateConfig, run, "python -m scripts.generate")
