"""Every option of the command lines: its name, default, help and validation, once.

Spelling follows the tool that this one replaces (underscores; hyphens work too). ``validate`` raises OptionError with
the option's name; nothing here touches files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from stages.commands.options import AccuracyLevel, CommandOptions, Flag, default_folder, require
from stages.commands.quantize_options import Algorithm, LmHead, PerChannelWord

Keep = Literal["all", "best", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectConfig(CommandOptions):
    """Explain a model of any quantizer, a calibration cache, quantized weights, or a sweep. Nothing is run."""

    path: Annotated[Path, tyro.conf.Positional]
    """The folder, or an .onnx file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig(CommandOptions):
    """Compare models with their base: on the same text (perplexity, KL divergence, top-1 agreement, the worst tokens),
    and if asked for in their answers, on lm-eval's tasks, in speed and memory."""

    base: Path
    """Base model: the .onnx file or its folder; its tokenizer is used for all."""
    model: tuple[Path, ...]
    """Models to compare: .onnx files or folders."""
    text: str = "offline"
    """A UTF-8 text file, or offline: those topics of CPython's documentation that calibration never sees."""
    windows: int = 16
    """Windows of seq_len tokens, from the beginning of the text."""
    seq_len: int = 512
    """Tokens in a window."""
    accuracy_level: AccuracyLevel = 1
    """1 computes activations in float32 on CPU; the runtime's default 4 rounds them to int8, in every model alike."""
    eps: str = "cpu"
    """Execution providers, tried in this order: cuda, cpu, dml, NvTensorRtRtx."""
    worst: int = 10
    """Predictions to show of each model: those farthest from the base's."""
    generate: tuple[str, ...] = ()
    """Prompts that all models answer, greedily, through onnxruntime-genai; in the base's chat template if it has
    one."""
    max_new_tokens: int = 64
    """Tokens of such an answer at most."""
    lm_eval_tasks: tuple[str, ...] = ()
    """Tasks of lm-eval (an optional package): names of its own, whose data come from the Hugging Face hub, or local
    task files (.yaml) or folders of them."""
    lm_eval_limit: int | None = None
    """Samples of each task; default: all."""
    speed: Flag = False
    """Tokens a second and memory through onnxruntime-genai: models in turns, each round in a process of its own."""
    speed_rounds: int = 5
    """Rounds of each model; the median counts."""
    speed_prompt_tokens: int = 128
    """Tokens of the prompt, from the beginning of the text."""
    speed_new_tokens: int = 64
    """Tokens generated behind it."""
    results: Path | None = None
    """Where the numbers are written, as JSON; the same comparison is then shown from there, not run again. Prompts,
    tasks and speed that are asked for are always run."""
    report: Path | None = None
    """Folder of a report (report.json, report.html) to add all this to, such as stages.quantize leaves inside its
    weights' folder; made where there is none. The same comparison is taken from there, too."""

    def validate(self) -> None:
        """Raise OptionError naming the first option that can't be used."""
        require(self.windows >= 1, "--windows must be at least 1.")
        require(self.seq_len >= 2, "--seq_len must be at least 2.")
        require(self.worst >= 0, "--worst must be 0 or more.")
        require(self.max_new_tokens >= 1, "--max_new_tokens must be at least 1.")
        require(self.lm_eval_limit is None or self.lm_eval_limit >= 1, "--lm_eval_limit must be at least 1.")
        require(self.speed_rounds >= 1, "--speed_rounds must be at least 1.")
        require(self.speed_prompt_tokens >= 1, "--speed_prompt_tokens must be at least 1.")
        require(self.speed_new_tokens >= 2, "--speed_new_tokens must be at least 2: one ends the prompt's time.")
        tokens = self.windows * self.seq_len
        require(
            not self.speed or self.speed_prompt_tokens <= tokens,
            f"--speed_prompt_tokens {self.speed_prompt_tokens} is more than the {tokens} tokens of text that are read.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig(CommandOptions):
    """Make a report's page from its report.json, or a report of quantized weights that have none."""

    report: tyro.conf.Positional[Path]
    """The report's folder."""
    weights_path: Path | None = None
    """Folder that stages.quantize saved its weights to: the report's part on them is made from it."""
    base: Path | None = None
    """The base model of these weights; with --model the report tells sizes too."""
    model: Path | None = None
    """The quantized model."""

    def validate(self) -> None:
        """Raise OptionError naming the first option that can't be used."""
        require((self.base is None) == (self.model is None), "--base and --model go together.")
        require(self.base is None or self.weights_path is not None, "--base and --model go with --weights_path.")


# Without slots, so that the commands below can inherit.
@dataclass(frozen=True, kw_only=True)
class SweepGrid:
    """Options of ``stages.quantize`` with several values each: every combination is a point."""

    algo: tuple[Algorithm, ...] = ("rtn_dq", "awq_lite", "awq_clip", "awq_full", "gptq", "awq_gptq")
    """Algorithms; by default all that search one site at a time."""
    block_size: tuple[int | None, ...] = (32, 128)
    """Inputs that share a scale; None: as stages.quantize chooses."""
    use_zero_point: tuple[bool, ...] = (False, True)
    """Without a zero point, with one, or both."""
    enable_mixed_quant: tuple[bool, ...] = (False,)
    """All sites in INT4, mixed INT4 and INT8, or both."""
    int8_block_size: tuple[int | PerChannelWord | None, ...] = (None,)
    """Inputs that share an INT8 scale where there is INT8; None: as stages.quantize chooses."""
    lm_head: tuple[LmHead | None, ...] = (None,)
    """lm_head as INT4 (4), INT8 (8), as it is (none), or several of these; None: as stages.quantize chooses."""
    use_column_major: tuple[bool, ...] = (False,)
    """Weights as MatMul wants them, in rows of output channels, or both."""
    options: tuple[str, ...] = ("",)
    """Further options of stages.quantize without their dashes, a value for each variant: '' 'layers_8bit=down_proj'
    'target=cuda accuracy_level=1'."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig(CommandOptions):
    """Where models are made and how they are judged."""

    base: Path
    """Base model: the .onnx file or its folder."""
    output: Path
    """Folder for the models, their records and the table; what is there is not made again."""
    cache_dir: Path | None = None
    """Calibration cache; default: the model's folder name with .calibration added."""
    text: tuple[str, ...] = ("offline",)
    """UTF-8 text files, or offline, to judge on. Text that was calibrated on is refused."""
    windows: int = 16
    """Windows of seq_len tokens of each text."""
    seq_len: int = 512
    """Tokens in a window."""
    retry_failed: Flag = False
    """Try again what failed before."""

    @property
    def cache_path(self) -> Path:
        return self.cache_dir or default_folder(self.base, ".calibration")


@dataclass(frozen=True, kw_only=True)
class SweepConfig(BenchConfig, SweepGrid):
    """Quantize one base model in many ways from one cache and compare them: bytes, seconds, memory, accuracy.

    A sweep that is stopped goes on with the same command.
    """

    no_evaluation: Flag = False
    """Run no model: compare held-out layer losses alone."""
    keep: Keep = "all"
    """Which models stay on disk: all, best (those that no other one beats in bytes and loss), or none. Their records
    stay in any case, and each can be made again with the command that is printed."""
