"""Every option of the command lines: its name, default, help and validation, once.

Spelling follows the tool that this one replaces (underscores; hyphens work too). ``validate`` raises RecipeError with
the option's name; nothing here touches files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from stages.amounts import parse_bytes
from stages.errors import RecipeError
from stages.file_names import companion
from stages.records import BlockAxis, GatherForm
from stages.target.name import Target, parse_target

Algorithm = Literal["rtn", "rtn_dq", "awq_lite", "awq_clip", "awq_full", "gptq", "awq_gptq", "signround"]
OneShot = Literal["rtn_dq", "awq_lite", "awq_clip", "awq_full", "gptq", "awq_gptq"]
ScaleSearch = Literal["awq_lite", "awq_full", "awq_gptq"]
ScaleRange = Literal["signed", "full", "compat7"]
AccuracyLevel = Literal[0, 1, 2, 3, 4]
LmHead = Literal["4", "8", "none"]
WeightOperator = Literal["dq", "matmul_nbits"]
PerChannelWord = Literal["channel"]
MixedRule = Literal["modelopt", "llamacpp"]
Sensitivity = Literal["cache", "measured"]
Verification = Literal["full", "quick", "off"]
Keep = Literal["all", "best", "none"]
LogLevel = Literal["debug", "info", "warning", "error"]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]

PART_OF_FREE_MEMORY = 0.6
"""What --max_memory is where nobody says it."""
_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 256
_SMALLEST_STEP = 0.001


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RecipeError(message)


def _require_block_size(option: str, size: int | None, because: str) -> None:
    _require(
        size is None or (_SMALLEST_BLOCK <= size <= _LARGEST_BLOCK and size & (size - 1) == 0),
        f"{option} {size} is not a power of two from {_SMALLEST_BLOCK} to {_LARGEST_BLOCK}: {because}.",
    )


def beside(path: Path, suffix: str) -> Path:
    """The default companion folder of a model: ``models/base/model.onnx`` -> ``models/base<suffix>``."""
    folder = path.absolute()
    folder = folder.parent if folder.suffix.lower() == ".onnx" else folder
    try:
        return companion(folder, suffix)
    except ValueError as error:
        raise RecipeError(f"{path} lies at the root of a disk; put it into a folder.") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """What a command prints, and where."""

    quiet: Flag = False
    """Print warnings and errors alone; exit codes stay the same."""
    json: Flag = False
    """Print the results as one JSON document on standard output, in place of tables."""
    log_level: LogLevel = "info"
    """The least important messages that are printed."""
    log_file: Path | None = None
    """File that messages and progress are appended to, with their time."""


# Without slots, so that a command that takes the options of two others can inherit from both.
@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """What every command has."""

    printing: Annotated[OutputOptions, tyro.conf.arg(name="")] = OutputOptions()
    """An empty name: its options stand among the others."""

    def validate(self) -> None:
        """Raise RecipeError naming the first option that can't be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What both ``stages.quantize`` and ``export`` tell the exporter."""

    accuracy_level: AccuracyLevel | None
    verify: Verification


# Without slots, so that a command that takes the options of both stages can inherit from both configurations.
@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(CommandOptions):
    """Run the base model once per batch and cache the statistics that stage two searches with."""

    onnx_path: Path
    """Base model: the .onnx file or the ORT-GenAI folder that holds it."""
    model_name: str | None = None
    """Hub name or folder to take the tokenizer from; default: the model's own folder."""
    dataset: str = "cnn"
    """cnn (cnn_dailymail), pilevel (pile-val-backup), offline (prose in CPython's own documentation, no download), self
    (the model writes it, through onnxruntime-genai), a local .txt / .jsonl / .parquet file, or several of these
    separated by commas, which share the windows evenly."""
    apply_chat_template: bool = False
    """Make a conversation of each document with the tokenizer's chat template: the messages of a .jsonl or .parquet
    row; else its text, the beginning as the user's message and the rest as the assistant's. With self: chats alone."""
    calib_size: int = 128
    """Windows of seq_len tokens in all; a tenth of them is held out from the search."""
    seq_len: int = 512
    """Tokens in a window; windows are packed full, without padding."""
    batch_size: int = 1
    """Windows in one forward pass."""
    calibration_eps: str = "cuda,cpu"
    """Execution providers for the forward passes, tried in this order: cuda, cpu, dml, NvTensorRtRtx."""
    max_memory: str | None = None
    """Memory for weights, statistics and activations, such as 8GB. What doesn't fit at once is run in parts, a range of
    layers after the other; each token still passes each layer once. Default: six tenths of what is free."""
    cache_dir: Path | None = None
    """Folder for the cache; default: the model's folder name with .calibration added."""
    use_random_calib: bool = False
    """Random token ids in place of text (smoke tests; never for accuracy)."""
    add_position_ids: bool = False
    """Accepted for compatibility: the graph itself tells whether it has position_ids."""
    trust_remote_code: bool = False
    """Allow the tokenizer's own Python code to run."""
    device: str = "auto"
    """Where statistics are accumulated: auto, cpu, cuda, cuda:1, mps."""
    seed: int = 0
    """Seed of the document order, of what the model writes itself, and of random tokens."""
    overwrite: bool = False
    """Replace a cache of other tokens, options or model."""

    @property
    def cache_path(self) -> Path:
        return self.cache_dir or beside(self.onnx_path, ".calibration")

    def validate(self) -> None:
        """Raise RecipeError naming the first option that can't be used."""
        _require(self.calib_size >= 2, "--calib_size must be at least 2: one window to calibrate on, one held out.")
        _require(self.seq_len >= 2, "--seq_len must be at least 2.")
        _require(self.batch_size >= 1, "--batch_size must be at least 1.")
        _require(self.seed >= 0, f"--seed {self.seed} must be 0 or more.")
        if self.max_memory is not None:
            parse_bytes(self.max_memory, "--max_memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeConfig(CommandOptions):
    """Search quantized weights from the cache, save them, and export the model."""

    onnx_path: Path
    """Base model: the .onnx file or the ORT-GenAI folder that holds it."""
    output_path: Path
    """Where the quantized model goes: a folder, or the .onnx file in it. Must not exist yet."""
    algo: Algorithm = "awq_gptq"
    """rtn: rounding, Q->DQ nodes. rtn_dq: rounding, DQ nodes. awq_lite: input scale search. awq_clip: range search.
    awq_full: both. gptq: range search, then codes that make up for each other's errors. awq_gptq: awq_full, then the
    same. signround: another one's result, tuned decoder block by decoder block with gradients (AutoRound)."""
    refine: bool = False
    """After the search go through the decoder blocks once more: each layer is solved again for what the quantized
    layers before it really give, so that it makes up for their errors."""
    signround_start: OneShot = "awq_gptq"
    """The algorithm whose result signround tunes."""
    signround_iters: int = 200
    """Steps of signed gradient descent a block."""
    signround_lr: float | None = None
    """First step of the descent, falling linearly to 0; default: 1 / signround_iters."""
    signround_batch_size: int = 4
    """Windows in one step of the descent; 8 as published. Also how many --refine sends through a block at once."""
    signround_seed: int = 0
    """Seed of the order in which the descent sees the windows."""
    cache_dir: Path | None = None
    """Calibration cache; default: the model's folder name with .calibration added. rtn and rtn_dq need none."""
    weights_path: Path | None = None
    """Folder for the quantized weights before export; default: the output folder's name with .weights added."""
    target: Annotated[str | None, tyro.conf.arg(metavar="RUNTIME[@VERSION]")] = None
    """cpu, cuda, dml, trt-rtx, webgpu or qnn, with the version of ONNX Runtime if it isn't the newest (cpu@1.24):
    store weights as that runtime runs them fast, and say why. Options that are given win; default: no runtime in
    particular."""
    block_size: int | None = None
    """Inputs that share a scale: a power of two from 16 to 256; default: 128, or what --target runs best."""
    enable_mixed_quant: bool = False
    """INT8 for the qkv (or v) and down projections of the first eighth, the last eighth and every third of the other
    layers; INT4 for the rest."""
    mixed_rule: MixedRule = "modelopt"
    """Which of the other layers enable_mixed_quant takes: modelopt (the first of every three) or llamacpp (the
    last)."""
    target_bpw: float | None = None
    """Bits a weight to spend, scales and zero points counted, over the sites that are quantized: INT4 in blocks of 128,
    64 or 32 or INT8, whichever serves each site best, and lm_head quantized or not, unless it is named."""
    target_size: Annotated[str | None, tyro.conf.arg(metavar="SIZE")] = None
    """The same, for a model (.onnx file and external data, embeddings and all) of at most 1.1GB, 900MB or 850MiB."""
    sensitivity: Sensitivity | None = None
    """How target_bpw and target_size know what a site's error does to the answers. cache (default): from the
    statistics alone. measured: the model runs once for each group of sites with that group quantized, on a few
    calibration windows; kept beside the statistics."""
    plan: Path | None = None
    """A plan.toml with the format of every site, as runs with target_bpw or target_size write it beside the quantized
    weights, edited or not."""
    layers_8bit: Annotated[str, tyro.conf.arg(metavar="PATTERNS")] = ""
    """Comma-separated layers (layers.0), node paths or parts of names (down_proj, lm_head) to store as INT8, in place
    of enable_mixed_quant's choice."""
    int8_block_size: int | PerChannelWord | None = None
    """Inputs that share an INT8 scale: a power of two from 16 to 256, or channel for one scale per output channel;
    default: channel, or what --target runs best."""
    lm_head: LmHead | None = None
    """Store lm_head as INT4 (4) or INT8 (8), or leave it (none), whatever exclude says; default: exclude decides."""
    use_column_major: bool = False
    """Store weights in rows of output channels with a Transpose behind them, for execution providers that ask for it.
    ONNX Runtime's CPU and CUDA providers don't fuse INT4 in this form and run it many times slower."""
    weight_operator: WeightOperator | None = None
    """dq: DequantizeLinear and MatMul, standard operators that ONNX Runtime fuses when it loads. matmul_nbits: the
    fused operator itself. Default: dq, and matmul_nbits where nothing fuses dq (bfloat16, or a target that says so)."""
    gather_quantize_axis: BlockAxis | None = None
    """Store the token embedding as INT4 too: 1 groups numbers of one token (use this one), 0 groups tokens; default:
    it stays as it is."""
    gather_block_size: int | None = None
    """Numbers of the embedding that share a scale: a power of two from 16 to 256; default: 32, or what --target runs
    best."""
    gather_form: GatherForm | None = None
    """gather_block_quantized (default): one node that reads only the rows it needs. dq: DequantizeLinear and Gather,
    standard operators, but ONNX Runtime dequantizes the whole table for every token."""
    use_zero_point: bool = False
    """Unsigned codes with a zero point per block (4 / block_size more bits a weight)."""
    scale_range: ScaleRange | None = None
    """INT4 without zero points. full: scale = max(-min/8, max/7), all sixteen levels. signed: the same with a negative
    scale where a block reaches farther up than down, so that the larger side always has the level more: smaller errors
    at the same bytes. compat7: |w|max/7, as the tool that this one replaces. Default: signed where --target is cpu,
    cuda or webgpu, else full, since TensorRT takes positive scales alone."""
    awqlite_alpha_step: float = 0.1
    """Step of the exponent in the input scale search."""
    awqlite_run_per_subgraph: bool = False
    """Search one input scale for all sites that read an activation even where none is folded. Sites whose scale is
    folded always share one."""
    awqlite_disable_fuse_nodes: bool = False
    """Keep every input scale as a Mul node; without awqlite_run_per_subgraph each site then gets its own."""
    awqclip_alpha_step: float = 0.05
    """Step of the clip ratio."""
    awqclip_alpha_min: float = 0.5
    """Smallest clip ratio tried."""
    awqclip_bsz_col: int = 1024
    """Output channels searched at once: smaller needs less memory, the result is the same."""
    gptq_damping: float = 0.5
    """Part of the mean squared activation that GPTQ and the descent add to every channel's. The papers' 0.01 fits the
    calibration text so closely that other kinds of text lose; what is held out of the same text sees no difference."""
    gptq_act_order: bool = True
    """Quantize the loudest channels first; the stored layout is the same."""
    descent_passes: int = 2
    """Walks over all columns after GPTQ that set each code and scale to its best value beside the others; 0: GPTQ
    alone."""
    exclude: Annotated[str | None, tyro.conf.arg(metavar="PATTERNS")] = None
    """Comma-separated parts of node names that stay as they are; '' quantizes all. Default: lm_head, but with a budget
    (target_bpw, target_size) nothing: it decides about lm_head too."""
    accuracy_level: AccuracyLevel | None = None
    """Written into genai_config.json's session options: 1 keeps activations in float32 on CPU, the runtime's default 4
    rounds them to int8 (faster, less exact). Into the nodes themselves with matmul_nbits, whose default is exact."""
    verify: Verification = "full"
    """full: fusion of every site, every site's output, bytes. quick: all but the sites' outputs. off."""
    dry_run: Flag = False
    """Say what would be done, and do nothing: every site's format, where input scales go, bytes, memory, seconds. Reads
    the graph alone; a budget is spent where the cache is there."""
    device: str = "auto"
    """Where the search runs: auto, cpu, cuda, cuda:1, mps."""
    overwrite: bool = False
    """Replace an output (and quantized weights of other options) that is there."""

    @property
    def cache_path(self) -> Path:
        return self.cache_dir or beside(self.onnx_path, ".calibration")

    @property
    def weights_folder(self) -> Path:
        return self.weights_path or beside(self.output_path, ".weights")

    @property
    def export_options(self) -> ExportOptions:
        return ExportOptions(accuracy_level=self.accuracy_level, verify=self.verify)

    @property
    def parsed_target(self) -> Target | None:
        """The runtime that ``target`` names; RecipeError where it names none."""
        return None if self.target is None else parse_target(self.target)

    @property
    def tunes_blocks(self) -> bool:
        """Whether decoder blocks are run after the search."""
        return self.refine or self.algo == "signround"

    @property
    def search_algorithm(self) -> Algorithm:
        """The algorithm of the search, whatever follows it."""
        return self.signround_start if self.algo == "signround" else self.algo

    @property
    def has_budget(self) -> bool:
        """Whether formats are chosen site by site for a number of bits or bytes."""
        return self.target_bpw is not None or self.target_size is not None

    @property
    def budget_in_words(self) -> str:
        """The budget as it was given."""
        return f"--target_size {self.target_size}" if self.target_bpw is None else f"--target_bpw {self.target_bpw:g}"

    @property
    def excluded(self) -> str:
        """The patterns of sites that stay as they are."""
        if self.exclude is not None:
            return self.exclude
        return "" if self.has_budget else "lm_head"

    @property
    def needs_cache(self) -> bool:
        return self.has_budget or self.tunes_blocks or self.algo not in ("rtn", "rtn_dq")

    def validate(self) -> None:
        """Raise RecipeError naming the first option that can't be used."""
        fusible = "ONNX Runtime fuses no other block size on every version"
        _require_block_size("--block_size", self.block_size, fusible)
        if self.int8_block_size != "channel":
            _require_block_size("--int8_block_size", self.int8_block_size, fusible)
        if self.target is not None:
            parse_target(self.target)
        _require(
            not (self.use_column_major and self.algo == "rtn"),
            "--use_column_major goes with DequantizeLinear alone; use --algo rtn_dq in place of rtn.",
        )
        _require(
            self.weight_operator != "matmul_nbits" or not (self.use_column_major or self.algo == "rtn"),
            "--weight_operator matmul_nbits is another form than --use_column_major and --algo rtn ask for; leave them "
            "out (rtn_dq rounds in the same way).",
        )
        self._validate_bits()
        _require_block_size("--gather_block_size", self.gather_block_size, "GatherBlockQuantized takes no other")
        _require(
            _SMALLEST_STEP <= self.awqlite_alpha_step <= 1, f"--awqlite_alpha_step must lie in [{_SMALLEST_STEP}, 1]."
        )
        _require(0 < self.awqclip_alpha_min <= 1, "--awqclip_alpha_min must lie in (0, 1].")
        _require(
            _SMALLEST_STEP <= self.awqclip_alpha_step <= 1, f"--awqclip_alpha_step must lie in [{_SMALLEST_STEP}, 1]."
        )
        _require(self.signround_iters >= 1, "--signround_iters must be at least 1.")
        _require(
            self.signround_lr is None or 0 < self.signround_lr < math.inf, "--signround_lr must be positive and finite."
        )
        _require(self.signround_batch_size >= 1, "--signround_batch_size must be at least 1.")
        _require(0 < self.gptq_damping < math.inf, "--gptq_damping must be above 0 and finite.")
        _require(self.descent_passes >= 0, "--descent_passes must be 0 or more.")
        _require(self.awqclip_bsz_col >= 1, "--awqclip_bsz_col must be at least 1.")

    def _validate_bits(self) -> None:
        """What decides about the sites' formats: one of a budget, a plan, a rule."""
        _require(
            self.mixed_rule == "modelopt" or self.enable_mixed_quant, "--mixed_rule goes with --enable_mixed_quant."
        )
        _require(self.sensitivity is None or self.has_budget, "--sensitivity goes with --target_bpw or --target_size.")
        _require(
            self.target_bpw is None or 0 < self.target_bpw < math.inf, "--target_bpw must be more than 0 and finite."
        )
        if self.target_size is not None:
            parse_bytes(self.target_size, "--target_size")
        if self.has_budget:
            given = {
                "--enable_mixed_quant": self.enable_mixed_quant,
                "--target_size": self.target_bpw and self.target_size,
            }
            self._refuse_beside("--target_size" if self.target_bpw is None else "--target_bpw", given)
            _require(
                self.algo != "rtn",
                "--algo rtn writes weights in floating point with Q and DQ nodes, so no budget of bytes holds for it; "
                "use rtn_dq.",
            )
        if self.plan is not None:
            self._refuse_beside("--plan", self._formats_given)

    @property
    def _formats_given(self) -> dict[str, object]:
        """The options that decide about formats, with whether each was given."""
        return {
            "--target_bpw": self.target_bpw,
            "--target_size": self.target_size,
            "--enable_mixed_quant": self.enable_mixed_quant,
            "--layers_8bit": self.layers_8bit,
            "--lm_head": self.lm_head,
            "--exclude": self.exclude is not None,
            "--block_size": self.block_size,
            "--int8_block_size": self.int8_block_size,
        }

    @staticmethod
    def _refuse_beside(option: str, others: Mapping[str, object]) -> None:
        for other, given in others.items():
            _require(not given, f"{option} decides about every site's format, and so does {other}; leave one out.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig(CommandOptions):
    """Write saved quantized weights into the base graph again, without searching."""

    onnx_path: Path
    """The base model that the weights were made from."""
    weights_path: Path
    """Folder that stages.quantize saved its weights to."""
    output_path: Path
    """Where the quantized model goes: a folder, or the .onnx file in it. Must not exist yet."""
    weight_operator: WeightOperator | None = None
    """dq or matmul_nbits, in place of the form that stages.quantize chose."""
    accuracy_level: AccuracyLevel | None = None
    """Written into genai_config.json's session options, with matmul_nbits into its nodes (1: exact on CPU, 4: fast)."""
    verify: Verification = "full"
    """full: fusion of every site, every site's output, bytes. quick: all but the sites' outputs. off."""
    overwrite: bool = False
    """Replace an output that is there."""

    @property
    def export_options(self) -> ExportOptions:
        return ExportOptions(accuracy_level=self.accuracy_level, verify=self.verify)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig(CommandOptions):
    """A whole run out of one file: calibrate where the search needs it, quantize, export, evaluate."""

    config: Annotated[Path, tyro.conf.Positional]
    """YAML (or JSON) with the sections calibrate, quantize, export and evaluate, each with that command's options; or
    an Olive workflow."""
    dry_run: Flag = False
    """Say what would be done, and do nothing."""


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
        """Raise RecipeError naming the first option that can't be used."""
        _require(self.windows >= 1, "--windows must be at least 1.")
        _require(self.seq_len >= 2, "--seq_len must be at least 2.")
        _require(self.worst >= 0, "--worst must be 0 or more.")
        _require(self.max_new_tokens >= 1, "--max_new_tokens must be at least 1.")
        _require(self.lm_eval_limit is None or self.lm_eval_limit >= 1, "--lm_eval_limit must be at least 1.")
        _require(self.speed_rounds >= 1, "--speed_rounds must be at least 1.")
        _require(self.speed_prompt_tokens >= 1, "--speed_prompt_tokens must be at least 1.")
        _require(self.speed_new_tokens >= 2, "--speed_new_tokens must be at least 2: one ends the prompt's time.")
        tokens = self.windows * self.seq_len
        _require(
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
        """Raise RecipeError naming the first option that can't be used."""
        _require((self.base is None) == (self.model is None), "--base and --model go together.")
        _require(self.base is None or self.weights_path is not None, "--base and --model go with --weights_path.")


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
        return self.cache_dir or beside(self.base, ".calibration")


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
