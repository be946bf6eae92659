"""Options of the commands that look at models: inspect, chat, evaluate, report, sweep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from stages.commands.options import AccuracyLevel, CommandOptions, Flag, default_folder, require
from stages.commands.quantize_options import Algorithm, LmHead, PerChannelWord

Keep = Literal["all", "best", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectConfig(CommandOptions):
    """Explain a model from any quantizer, a calibration cache, quantized weights, or a sweep, without running it."""

    examples: ClassVar[tuple[str, ...]] = (
        "models/int4",
        "models/base.calibration",
        "models/int4 --json --quiet",
    )

    path: Annotated[Path, tyro.conf.Positional]
    """The folder, or an .onnx file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatConfig(CommandOptions):
    """Chat with a model through onnxruntime-genai, or let it answer one prompt.

    Ctrl-C stops an answer; Ctrl-D, or Ctrl-C while you write, ends the chat.
    """

    examples: ClassVar[tuple[str, ...]] = (
        "models/int4",
        "models/int4 --prompt 'What is ONNX?'",
        "models/int4 --system 'Answer in one sentence.' --temperature 0.7",
    )

    model: Annotated[Path, tyro.conf.Positional]
    """The model's folder."""
    prompt: str | None = None
    """Answer this and leave. Standard output holds only the answer."""
    system: str | None = None
    """What the model is told before the first message."""
    max_new_tokens: int = 1024
    """Most tokens in an answer."""
    temperature: float = 0.0
    """0 takes the most likely token, so that answers repeat; above, tokens are drawn: 0.7 is usual."""

    def validate(self) -> None:
        """Raise OptionError naming the first option that can't be used."""
        require(self.max_new_tokens >= 1, "--max_new_tokens must be at least 1.")
        require(0 <= self.temperature < math.inf, "--temperature must be 0 or more.")
        require(self.prompt is not None or not self.printing.json, "--json goes with --prompt.")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig(CommandOptions):
    """Compare models with their base: perplexity, KL divergence, top-1 agreement and the worst tokens on the same text.

    On request also answers to prompts, lm-eval's tasks, speed and memory.
    """

    examples: ClassVar[tuple[str, ...]] = (
        "models/base models/int4",
        "models/base models/int4 models/int8 --speed",
        "models/base models/int4 --generate 'What is ONNX?'",
    )
    positional: ClassVar[tuple[str, ...]] = ("base", "model")

    base: Path
    """Base model: the .onnx file or its folder. Its tokenizer is used for all models."""
    model_name: str | None = None
    """Hub name or folder to take the tokenizer from. Default: the base's own folder."""
    model: tuple[Path, ...]
    """Models to compare: .onnx files or folders."""
    component: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Part of packages of several models to compare, as genai_config.json names it. Default: the one that the path
    names, else decoder."""
    samples: Path | None = None
    """Files that fill the graph's inputs in place of text, as for stages.quantize: a folder of images or of sounds, or
    .npz or .npy files. What the models give for them is compared: cosine similarity and relative error of each output.
    Those that calibrated the base are left out. Encoders of text are compared so on text, a paragraph or a few as a
    sample."""
    text: str = "offline"
    """A UTF-8 text file, or a text that needs no download: offline (topics of CPython's documentation that calibration
    never sees), code (of Python's standard library), notices (terms of licences)."""
    windows: int = 16
    """Number of windows of seq_len tokens, from the beginning of the text, or of samples."""
    seq_len: int = 512
    """Tokens in each window; of encoders of text the most tokens of a sample."""
    accuracy_level: AccuracyLevel | None = None
    """Accuracy level of all models alike, but for MatMulNBits nodes that name their own: 1 keeps activations in float32
    on CPU, 4 rounds them to int8. Default: that of each model's own files, at which it is used."""
    eps: str = "cpu"
    """Execution providers, tried in this order: cuda, cpu, dml, NvTensorRtRtx."""
    worst: int = 10
    """Predictions to keep for each model: those farthest from the base's. The report and --json show them, the terminal
    with --verbose."""
    generate: tuple[str, ...] = ()
    """Prompts that all models answer, greedily, through onnxruntime-genai; in the base's chat template if it has
    one."""
    max_new_tokens: int = 64
    """Most tokens in an answer."""
    lm_eval_tasks: tuple[str, ...] = ()
    """Tasks of lm-eval (an optional package): names that it knows, whose data come from the Hugging Face hub, local
    task files (.yaml), or folders of them."""
    lm_eval_limit: int | None = None
    """Samples of each task. Default: all."""
    speed: Flag = False
    """Measure tokens per second and memory through onnxruntime-genai, models alternately, each round in a process of
    its own."""
    speed_rounds: int = 5
    """Rounds for each model; the median counts."""
    speed_prompt_tokens: int = 128
    """Tokens in the prompt, from the beginning of the text."""
    speed_new_tokens: int = 64
    """Tokens to generate after the prompt."""
    results: Path | None = None
    """JSON file to write the numbers to, each part as soon as it is there; the same comparison on text is then shown
    from there and not run again. Prompts, tasks and speed that are asked for are always run."""
    report: Path | None = None
    """Folder of a report (report.json, report.html) to add all this to, such as stages.quantize leaves in its weights'
    folder; created if missing. The same comparison on text is taken from there, too."""

    @property
    def asks_for_text(self) -> bool:
        """Return whether something is asked for that only models that write text can do."""
        return bool(self.generate or self.lm_eval_tasks or self.speed)

    def validate(self) -> None:
        """Raise OptionError naming the first option that can't be used."""
        require(self.windows >= 1, "--windows must be at least 1.")
        require(self.seq_len >= 2, "--seq_len must be at least 2.")
        require(self.worst >= 0, "--worst must be 0 or more.")
        require(self.max_new_tokens >= 1, "--max_new_tokens must be at least 1.")
        require(self.lm_eval_limit is None or self.lm_eval_limit >= 1, "--lm_eval_limit must be at least 1.")
        require(self.speed_rounds >= 1, "--speed_rounds must be at least 1.")
        require(self.speed_prompt_tokens >= 1, "--speed_prompt_tokens must be at least 1.")
        require(self.speed_new_tokens >= 2, "--speed_new_tokens must be at least 2: the first ends the prompt's time.")
        require(
            self.samples is None or not self.asks_for_text,
            "--samples compares outputs; --generate, --lm_eval_tasks and --speed go with text.",
        )
        tokens = self.windows * self.seq_len
        require(
            not self.speed or self.speed_prompt_tokens <= tokens,
            f"--speed_prompt_tokens {self.speed_prompt_tokens} is more than the {tokens} tokens of text that are read.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig(CommandOptions):
    """Make a report's page from its report.json, or a new report of quantized weights."""

    examples: ClassVar[tuple[str, ...]] = (
        "models/int4.weights/report",
        "report --weights_path models/int4.weights",
        "report --weights_path models/int4.weights --base models/base --model models/int4",
    )

    report: tyro.conf.Positional[Path]
    """The report's folder, or that of the weights or the model that it is about."""
    weights_path: Path | None = None
    """Folder that stages.quantize saved its weights to, for the report's part on them."""
    base: Path | None = None
    """The base model of these weights; with --model, the report shows sizes too."""
    model: Path | None = None
    """The quantized model."""

    def validate(self) -> None:
        """Raise OptionError naming the first option that can't be used."""
        require((self.base is None) == (self.model is None), "--base and --model go together.")
        require(self.base is None or self.weights_path is not None, "--base and --model go with --weights_path.")


# Without slots, so that the commands below can inherit.
@dataclass(frozen=True, kw_only=True)
class SweepGrid:
    """Options of ``stages.quantize`` that take several values each: every combination is a point."""

    algo: tuple[Algorithm, ...] = ("rtn_dq", "awq_lite", "awq_clip", "awq_full", "gptq", "awq_gptq")
    """Algorithms; by default all that search one site at a time."""
    block_size: tuple[int | None, ...] = (32, 128)
    """Inputs that share a scale, or None: as stages.quantize chooses."""
    use_zero_point: tuple[bool | None, ...] = (None,)
    """With a zero point (True), without one (False), or None (default): as stages.quantize chooses."""
    enable_mixed_quant: tuple[bool, ...] = (False,)
    """All sites in INT4 (False), mixed INT4 and INT8 (True), or both."""
    int8_block_size: tuple[int | PerChannelWord | None, ...] = (None,)
    """Inputs that share an INT8 scale, where there is INT8, or None (default): as stages.quantize chooses."""
    lm_head: tuple[LmHead | None, ...] = (None,)
    """lm_head as INT4 (4), INT8 (8), unquantized (none), or None (default): as stages.quantize chooses."""
    use_column_major: tuple[bool, ...] = (False,)
    """Weights in MatMul's own layout (False), in rows of output channels (True), or both."""
    options: tuple[str, ...] = ("",)
    """Further options of stages.quantize, without their dashes, one value for each variant: '' 'layers_8bit=down_proj'
    'target=cuda accuracy_level=1'. None about the calibration, which all points share, nor about folders."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig(CommandOptions):
    """Options about where models are made and how they are judged."""

    base: Path
    """Base model: the .onnx file or its folder."""
    model_name: str | None = None
    """Hub name or folder to take the tokenizer from. Default: the base's own folder."""
    output: Path
    """Folder for the models, their records and the table; points that are there are not made again."""
    cache_dir: Path | None = None
    """Calibration cache. Default: the model's folder name with .calibration added."""
    text: tuple[str, ...] = ("offline",)
    """UTF-8 text files, or offline, code or notices, to evaluate on. Text that was calibrated on is refused."""
    windows: int = 16
    """Number of windows of seq_len tokens from each text."""
    seq_len: int = 512
    """Tokens in each window."""
    retry_failed: Flag = False
    """Retry points that failed before."""

    @property
    def cache_path(self) -> Path:
        """Return the folder of the calibration cache."""
        return self.cache_dir or default_folder(self.base, ".calibration")


@dataclass(frozen=True, kw_only=True)
class SweepConfig(BenchConfig, SweepGrid):
    """Quantize one base model in many ways from one cache and compare bytes, seconds, memory and accuracy.

    To continue a stopped sweep, run the same command again.
    """

    examples: ClassVar[tuple[str, ...]] = (
        "--base models/base --output sweep",
        "--base models/base --output sweep --algo gptq awq_gptq --block_size 32",
        "--base models/base --output sweep --options '' 'layers_8bit=down_proj' --keep best",
    )

    no_evaluation: Flag = False
    """Run no model; compare only held-out layer losses."""
    keep: Keep = "all"
    """Models that stay on disk: all, best (those that no other one beats in both bytes and loss), or none. Records stay
    in any case, and the printed command makes a model again."""
