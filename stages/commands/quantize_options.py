"""Every option of the command lines: its name, default, help and validation, once.

Spelling follows the tool that this one replaces (underscores; hyphens work too). ``validate`` raises OptionError with
the option's name; nothing here touches files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from stages.commands.options import AccuracyLevel, CommandOptions, Flag, default_folder, require
from stages.commands.parsing import Target, parse_size, parse_target
from stages.records.sites import BlockAxis, GatherForm

Algorithm = Literal["rtn", "rtn_dq", "awq_lite", "awq_clip", "awq_full", "gptq", "awq_gptq", "signround"]


OneShot = Literal["rtn_dq", "awq_lite", "awq_clip", "awq_full", "gptq", "awq_gptq"]


ScaleSearch = Literal["awq_lite", "awq_full", "awq_gptq"]


ScaleRange = Literal["signed", "full", "compat7"]


LmHead = Literal["4", "8", "none"]


WeightOperator = Literal["dq", "matmul_nbits"]


PerChannelWord = Literal["channel"]


MixedRule = Literal["modelopt", "llamacpp"]


Sensitivity = Literal["cache", "measured"]


Verification = Literal["full", "quick", "off"]


_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 256


_SMALLEST_STEP = 0.001


def _require_block_size(option: str, size: int | None, because: str) -> None:
    require(
        size is None or (_SMALLEST_BLOCK <= size <= _LARGEST_BLOCK and size & (size - 1) == 0),
        f"{option} {size} is not a power of two from {_SMALLEST_BLOCK} to {_LARGEST_BLOCK}: {because}.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What both ``stages.quantize`` and ``export`` tell the exporter."""

    accuracy_level: AccuracyLevel | None
    verify: Verification


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
        return self.cache_dir or default_folder(self.onnx_path, ".calibration")

    @property
    def weights_folder(self) -> Path:
        return self.weights_path or default_folder(self.output_path, ".weights")

    @property
    def export_options(self) -> ExportOptions:
        return ExportOptions(accuracy_level=self.accuracy_level, verify=self.verify)

    @property
    def parsed_target(self) -> Target | None:
        """The runtime that ``target`` names; OptionError where it names none."""
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
        """Raise OptionError naming the first option that can't be used."""
        fusible = "ONNX Runtime fuses no other block size on every version"
        _require_block_size("--block_size", self.block_size, fusible)
        if self.int8_block_size != "channel":
            _require_block_size("--int8_block_size", self.int8_block_size, fusible)
        if self.target is not None:
            parse_target(self.target)
        require(
            not (self.use_column_major and self.algo == "rtn"),
            "--use_column_major goes with DequantizeLinear alone; use --algo rtn_dq in place of rtn.",
        )
        require(
            self.weight_operator != "matmul_nbits" or not (self.use_column_major or self.algo == "rtn"),
            "--weight_operator matmul_nbits is another form than --use_column_major and --algo rtn ask for; leave them "
            "out (rtn_dq rounds in the same way).",
        )
        self._validate_bits()
        _require_block_size("--gather_block_size", self.gather_block_size, "GatherBlockQuantized takes no other")
        require(
            _SMALLEST_STEP <= self.awqlite_alpha_step <= 1, f"--awqlite_alpha_step must lie in [{_SMALLEST_STEP}, 1]."
        )
        require(0 < self.awqclip_alpha_min <= 1, "--awqclip_alpha_min must lie in (0, 1].")
        require(
            _SMALLEST_STEP <= self.awqclip_alpha_step <= 1, f"--awqclip_alpha_step must lie in [{_SMALLEST_STEP}, 1]."
        )
        require(self.signround_iters >= 1, "--signround_iters must be at least 1.")
        require(
            self.signround_lr is None or 0 < self.signround_lr < math.inf, "--signround_lr must be positive and finite."
        )
        require(self.signround_batch_size >= 1, "--signround_batch_size must be at least 1.")
        require(0 < self.gptq_damping < math.inf, "--gptq_damping must be above 0 and finite.")
        require(self.descent_passes >= 0, "--descent_passes must be 0 or more.")
        require(self.awqclip_bsz_col >= 1, "--awqclip_bsz_col must be at least 1.")

    def _validate_bits(self) -> None:
        """What decides about the sites' formats: one of a budget, a plan, a rule."""
        require(
            self.mixed_rule == "modelopt" or self.enable_mixed_quant, "--mixed_rule goes with --enable_mixed_quant."
        )
        require(self.sensitivity is None or self.has_budget, "--sensitivity goes with --target_bpw or --target_size.")
        require(
            self.target_bpw is None or 0 < self.target_bpw < math.inf, "--target_bpw must be more than 0 and finite."
        )
        if self.target_size is not None:
            parse_size(self.target_size, "--target_size")
        if self.has_budget:
            given = {
                "--enable_mixed_quant": self.enable_mixed_quant,
                "--target_size": self.target_bpw and self.target_size,
            }
            self._refuse_beside("--target_size" if self.target_bpw is None else "--target_bpw", given)
            require(
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
            require(not given, f"{option} decides about every site's format, and so does {other}; leave one out.")


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
