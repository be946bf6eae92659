"""The help of every command: examples that work, groups, two screens, and nothing of Python."""

from __future__ import annotations

import shlex

import pytest

from genai_quant.command import COMMANDS
from scripts import options as of_scripts
from stages.commands.help import help_text, options_of
from stages.commands.options import CommandOptions
from stages.commands.parsing import parse_options

SCRIPTS = (
    of_scripts.LargeModelConfig,
    of_scripts.PeerConfig,
    of_scripts.TablesConfig,
    of_scripts.BenchmarkConfig,
    of_scripts.DropInConfig,
)
EVERY = [*(kind for kind, _ in COMMANDS.values()), *SCRIPTS]


@pytest.mark.parametrize("config", EVERY, ids=lambda config: config.__name__)
def test_help_fits_two_screens_and_begins_with_three_examples_that_parse(config: type) -> None:
    text = help_text(config, "genai-quant x", whole=False, width=80)
    lines = text.splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 80
    assert "None)" not in text
    examples: tuple[str, ...] = config.examples  # type: ignore[attr-defined]
    assert len(examples) == 3
    assert lines.index("examples:") < 12
    for example in examples:
        options: object = parse_options(config, "genai-quant x", shlex.split(example))
        assert isinstance(options, CommandOptions)
        options.validate()


@pytest.mark.parametrize("config", EVERY, ids=lambda config: config.__name__)
def test_all_help_has_every_option_and_the_whole_of_its_text(config: type) -> None:
    options, shown = options_of(config), " ".join(help_text(config, "genai-quant x", whole=True, width=80).split())
    for option in options:
        assert option.name in shown or option.name.upper() in shown
        assert option.text, f"--{option.name} has no docstring"
        if "stages." not in option.text:
            assert option.text in shown
    short = help_text(config, "genai-quant x", whole=False, width=80)
    needed = [option.name for option in options if option.is_required]
    assert all(f"--{name}" in short or name.upper() in short for name in needed)


def test_options_stand_in_groups_with_their_values_and_defaults() -> None:
    text = help_text(COMMANDS["quantize"][0], "genai-quant quantize", whole=True, width=80)
    groups = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert groups == ["examples", "model", "text", "formats", "search", "budget", "output", "advanced"]
    assert text.startswith("usage: genai-quant quantize BASE OUTPUT [options]\n")
    for words in (
        "--block_size INT ",
        "OUTPUT, --output_path PATH",
        "--lm_head {4,8,none}",
        "--int8_block_size INT|{channel}",
    ):
        assert words in text
    assert "--gptq_act_order, --no_gptq_act_order" in text
    assert "Default: 0.1." in " ".join(text.split())
