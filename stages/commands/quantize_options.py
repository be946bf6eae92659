"""Options of ``stages.quantize`` and ``export``.

``QuantizeConfig`` inherits its options in groups, in the order in which ``--help`` lists them. Each group checks its
own options; ``QuantizeConfig`` checks those that depend on another group's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from stages.commands.calibrate_options import CalibrateConfig, TextOptions, cache_suffix
from stages.commands.options import AccuracyLevel, CommandOptions, Flag, default_folder, require
from stages.commands.parsing import RUN_EXPERTS, Target, parse_size, parse_target
from stages.records.sites import BlockAxis, GatherForm

Algorithm = Literal["rtn", "rtn_dq", "awq_lite", "awq_clip", "awq_full", "gptq", "awq_gptq", "signround"]
ROUNDED: tuple[Algorithm, ...] = ("rtn", "rtn_dq")
"""They read no statistics."""
OneShot = Literal["rtn_dq", "awq_lite", "awq_clip", "awq_full", "gptq", "awq_gptq"]
ScaleSearch = Literal["awq_lite", "awq_full", "awq_gptq"]
ScaleRange = Literal["signed", "full", "compat7"]
ScaleType = Literal["bytes", "narrow", "base"]
Rotary = Literal["computed", "stored"]
LmHead = Literal["4", "8", "none"]
Embedding = Literal["4", "8", "none"]
Experts = Literal["4", "8", "none"]
ShareEmbedding = Literal["auto", "on", "off"]
WeightOperator = Literal["dq", "matmul_nbits"]
PerChannelWord = Literal["channel"]
MixedRule = Literal["modelopt", "llamacpp"]
Sensitivity = Literal["cache", "measured"]
Verification = Literal["full", "quick", "off"]

_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 256
_SMALLEST_STEP = 0.001
_OF_SEARCHED = frozenset({"--layers_8bit", "--lm_head", "--block_size", "--int8_block_size"})
"""Options that say what becomes of weights which a checkpoint leaves in floating point."""
_AUTO, _ANY = "auto", "any"
"""Values of --target that name no runtime."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """Options that ``stages.quantize`` and ``export`` both hand to the exporter."""

    accuracy_level: AccuracyLevel | None
    verify: Verification


# The groups have no slots, so that one class can inherit from several.
@dataclass(frozen=True, kw_only=True)
class _ModelOptions(CommandOptions):
    """The base model and the output."""

    onnx_path: Path
    """Base model: the .onnx file or the ORT-GenAI folder that holds it."""
    output_path: Path
    """Where to write the quantized model: a folder, or the .onnx file in it. Must not exist yet."""
    component: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Part of a package of several models, as genai_config.json names it: vision, speech, encoder; or several of them,
    separated by commas, which are quantized one after the other into one output. Default: the one that the path names,
    else decoder. What text can't calibrate needs samples, or is rounded (rtn_dq)."""


@dataclass(frozen=True, kw_only=True)
class _AlgorithmOptions:
    """The algorithm, and the tuning of decoder blocks after it."""

    algo: Algorithm = "awq_gptq"
    """How weights are searched, from plain rounding to the most accurate. rtn: plain rounding, Q->DQ nodes. rtn_dq:
    plain rounding, DQ nodes. awq_lite: input scale search. awq_clip: range search. awq_full: both. gptq: range search,
    then GPTQ, whose codes compensate for each other's errors. awq_gptq: awq_full, then GPTQ. signround: another
    algorithm's result, tuned decoder block by decoder block with gradients (AutoRound)."""
    refine: bool = False
    """Solve each layer once more after the search. It is solved for the inputs that the quantized layers before it
    really produce, so that it compensates for their errors."""
    distill: Annotated[int, tyro.conf.arg(metavar="WINDOWS")] = 0
    """Train the scales of the finished codes until the model answers as the base does (KL through all layers), on so
    many windows of text, a tenth of them held out; 0: don't. It takes hours on a CPU for the smallest models, and is
    meant for a GPU. The text is what dataset names."""
    checkpoint: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Take the weights from a quantized Hugging Face folder of the same model, in place of a search: INT4 or INT8 of
    GPTQ, AWQ, AutoRound, compressed-tensors or Olive. Its codes and scales stay as they are. What it leaves in floating
    point stays so, but for what lm_head, embedding and layers_8bit name."""
    signround_start: OneShot = "awq_gptq"
    """Algorithm whose result signround tunes."""
    signround_iters: int = 200
    """Steps of signed gradient descent per block."""
    signround_lr: float | None = None
    """First step size of the descent, falling linearly to 0. Default: 1 / signround_iters."""
    signround_batch_size: int = 4
    """Windows in each step of the descent (published: 8), and in each of --distill; also how many --refine sends
    through a block at once."""
    signround_seed: int = 0
    """Seed of the order in which the descent sees the windows."""

    @property
    def tunes_blocks(self) -> bool:
        """Return whether decoder blocks are run after the search."""
        return self.refine or self.algo == "signround"

    @property
    def improves_search(self) -> bool:
        """Return whether anything follows the search: decoder blocks are tuned, or scales trained."""
        return self.tunes_blocks or self.distill > 0

    @property
    def search_algorithm(self) -> Algorithm:
        """Return the algorithm of the search, whatever follows it."""
        return self.signround_start if self.algo == "signround" else self.algo

    def _check_algorithm(self) -> None:
        require(self.distill == 0 or self.distill >= 2, "--distill must be 0, or at least 2: one window is held out.")
        _require_at_least(1, "--signround_iters", self.signround_iters)
        _require_positive("--signround_lr", self.signround_lr)
        _require_at_least(1, "--signround_batch_size", self.signround_batch_size)


@dataclass(frozen=True, kw_only=True)
class _FolderOptions:
    """The folders between the stages."""

    cache_dir: Path | None = None
    """Calibration cache, made where there is none. Default: the model's folder name with .calibration added. rtn and
    rtn_dq need none."""
    weights_path: Path | None = None
    """Folder for the quantized weights before export. Default: the output folder's name with .weights added."""


@dataclass(frozen=True, kw_only=True)
class _FormatOptions:
    """The number format of every site."""

    target: Annotated[str | None, tyro.conf.arg(metavar="auto|any|RUNTIME[@VERSION]")] = None
    """Runtime whose strengths decide what no option says: cpu, cuda, dml, trt-rtx, webgpu or qnn, with the version of
    ONNX Runtime if it isn't the installed one (cpu@1.24). auto (default): the runtime that the base model was built
    for. any: none in particular, with blocks of 128, lm_head and embedding as they are. What was decided is printed,
    with why; options given explicitly win."""
    block_size: int | None = None
    """Inputs that share a scale: a power of two from 16 to 256. Default: what suits the target best, 32 on the CPU."""
    enable_mixed_quant: bool = False
    """Store the qkv (or v) and down projections of the first eighth, the last eighth and every third of the other
    layers as INT8, and the rest as INT4."""
    mixed_rule: MixedRule = "modelopt"
    """Which of the other layers enable_mixed_quant takes: modelopt (the first of every three) or llamacpp (the
    last)."""
    target_bpw: float | None = None
    """Bits per weight to spend, scales and zero points included, over the sites that are quantized. Each site gets INT4
    in blocks of 128, 64 or 32, or INT8, as far as the target runs them, whichever serves it best, and lm_head is
    quantized or not, unless lm_head is given."""
    target_size: Annotated[str | None, tyro.conf.arg(metavar="SIZE")] = None
    """Bytes to spend: the model (.onnx file and external data, embeddings included) takes at most 1.1GB, 900MB or
    850MiB. Formats are chosen as for target_bpw. Default: none; on the CPU, where no option names a format, as many
    bytes as the target's formats take for all sites."""
    sensitivity: Sensitivity | None = None
    """How target_bpw and target_size judge what a site's error does to the answers. cache (default): from the
    statistics only. measured: the model runs once for each group of sites with that group quantized, on a few
    calibration windows; the result is kept beside the statistics."""
    plan: Path | None = None
    """A plan.toml with the format of every site. Runs with target_bpw or target_size write it beside the quantized
    weights; it may be edited."""
    layers_8bit: Annotated[str, tyro.conf.arg(metavar="PATTERNS")] = ""
    """Comma-separated layers (layers.0), node paths or parts of names (down_proj, lm_head) to store as INT8. They stand
    in place of enable_mixed_quant's choice."""
    int8_block_size: int | PerChannelWord | None = None
    """Inputs that share an INT8 scale: a power of two from 16 to 256, or channel for one scale per output channel.
    Default: what suits the target best, 128 on the CPU."""
    lm_head: LmHead | None = None
    """Store lm_head as INT4 (4) or INT8 (8), or leave it unquantized (none). It overrides exclude. Default: what suits
    the target best; with a budget, whatever serves it best."""

    experts: Experts | None = None
    """Store the experts of MoE nodes as INT4 (4) or INT8 (8), or leave them unquantized (none). Default: INT4 where the
    target runs QMoE. All experts of a node share one format: a pattern of exclude or layers_8bit that names one of them
    names them all. A budget chooses it node by node; 4 and 8 fix its bits."""

    @property
    def follows_base(self) -> bool:
        """Return whether the base model decides about the target."""
        return self.target is None or self.target.strip().lower() == _AUTO

    @property
    def parsed_target(self) -> Target | None:
        """Return the runtime that ``target`` names; None for auto and any; raise OptionError for any other word."""
        if self.target is None or self.target.strip().lower() in (_AUTO, _ANY):
            return None
        return parse_target(self.target)

    @property
    def has_budget(self) -> bool:
        """Return whether formats are chosen site by site for a number of bits or bytes."""
        return self.target_bpw is not None or self.target_size is not None

    @property
    def budget_description(self) -> str:
        """Return the budget as it was given."""
        return f"--target_size {self.target_size}" if self.target_bpw is None else f"--target_bpw {self.target_bpw:g}"

    def _check_formats(self) -> None:
        fusible = "ONNX Runtime fuses no other block size on every version"
        _require_block_size("--block_size", self.block_size, fusible)
        if self.int8_block_size != "channel":
            _require_block_size("--int8_block_size", self.int8_block_size, fusible)
        _ = self.parsed_target  # raises where it is none
        require(
            self.mixed_rule == "modelopt" or self.enable_mixed_quant, "--mixed_rule goes with --enable_mixed_quant."
        )
        require(self.sensitivity is None or self.has_budget, "--sensitivity goes with --target_bpw or --target_size.")
        _require_positive("--target_bpw", self.target_bpw)
        if self.target_size is not None:
            parse_size(self.target_size, "--target_size")
        if self.target_bpw is not None:
            _refuse_beside("--target_bpw", {"--target_size": self.target_size})
        if self.has_budget:
            budget = "--target_size" if self.target_bpw is None else "--target_bpw"
            _refuse_beside(budget, {"--enable_mixed_quant": self.enable_mixed_quant})


@dataclass(frozen=True, kw_only=True)
class _StorageOptions:
    """The operators and number ranges in which formats are stored."""

    use_column_major: bool = False
    """Store weights in rows of output channels with a Transpose after them, for execution providers that need it. ONNX
    Runtime's CPU and CUDA providers don't fuse INT4 in this form and run it many times slower."""
    weight_operator: WeightOperator | None = None
    """dq: DequantizeLinear and MatMul, standard operators that ONNX Runtime fuses when it loads the model.
    matmul_nbits: the fused operator itself. Default: dq, or matmul_nbits where nothing fuses dq (bfloat16, and some
    targets)."""
    embedding: Embedding | None = None
    """Store the token embedding as INT4 (4) or INT8 (8), or leave it unquantized (none). Default: quantized where the
    target has an operator that reads only the rows it needs."""
    share_embedding: ShareEmbedding = "auto"
    """Store an embedding and an lm_head that are one weight in the base as one table that both read. auto (default):
    where the target runs it."""
    gather_quantize_axis: BlockAxis | None = None
    """Older name for embedding 4: 1 groups numbers of one token, as embedding does; 0 groups tokens."""
    gather_block_size: int | None = None
    """Numbers of the embedding that share a scale: a power of two from 16 to 256. Default: 32, or what suits the target
    best."""
    gather_form: GatherForm | None = None
    """gather_block_quantized (default): one node that reads only the rows it needs. dq: DequantizeLinear and Gather,
    standard operators, but ONNX Runtime dequantizes the whole table for every token."""
    use_zero_point: tyro.conf.DisallowNone[bool | None] = None
    """Use unsigned codes with a zero point per block (4 / block_size more bits per weight), or signed ones without.
    Default: what suits the target best; a budget decides site by site."""
    scale_range: ScaleRange | None = None
    """Range of INT4 codes without zero points. full: scale = max(-min/8, max/7), all sixteen levels. signed: the same,
    but with a negative scale where a block's largest magnitude is positive, so that the larger side always has the
    extra level: smaller errors at the same size. compat7: |w|max/7, as the tool that this one replaces. Default: signed
    where the target is cpu, cuda or webgpu, else full, since TensorRT accepts only positive scales."""

    scale_type: ScaleType | None = None
    """Type of stored scales. base: the graph's own. narrow: float16 where the graph is float32, half a bit less for
    each weight in blocks of 32, with a Cast behind them that ONNX Runtime computes when it loads the model. bytes: the
    same, but INT4 scales beside zero points are multiples of one number a row, a quarter of a bit less again. Default:
    bytes where the target is cpu, else base."""
    rotary_tables: Rotary | None = None
    """The cosines and sines of rotary embeddings. computed: where their frequencies give the stored numbers, nodes that
    ONNX Runtime computes when it loads the model. stored: as in the base. Default: computed where the target is cpu,
    else stored."""

    @property
    def requested_embedding(self) -> Embedding | None:
        """Return what shall become of the embedding, under either name; None: the target decides."""
        return "4" if self.embedding is None and self.gather_quantize_axis is not None else self.embedding

    @property
    def embedding_axis(self) -> BlockAxis:
        """Return 1 where numbers of one token share a scale, 0 where numbers of several tokens do."""
        return 1 if self.gather_quantize_axis is None else self.gather_quantize_axis

    def _check_storage(self) -> None:
        _require_block_size("--gather_block_size", self.gather_block_size, "GatherBlockQuantized takes no other")
        require(
            self.embedding != "none" or self.gather_quantize_axis is None,
            "--embedding none and --gather_quantize_axis contradict each other; leave one out.",
        )
        require(
            self.share_embedding != "on" or self.requested_embedding != "none",
            "--share_embedding on stores the embedding quantized, and --embedding none doesn't; leave one out.",
        )


@dataclass(frozen=True, kw_only=True)
class _SearchOptions:
    """Fineness and effort of the search."""

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
    """Smallest clip ratio to try."""
    awqclip_bsz_col: int = 1024
    """Output channels searched at once: fewer need less memory, with the same result."""
    gptq_damping: float = 0.5
    """Part of the mean squared activation that GPTQ and coordinate descent add to every channel's. The papers' 0.01
    fits the calibration text so closely that other kinds of text get worse, which text held out of the same source
    can't show."""
    gptq_act_order: bool = True
    """Quantize the channels with the largest activations first; the stored layout is the same."""
    descent_passes: int = 2
    """Passes of coordinate descent over all columns after GPTQ, which set each code and scale to its best value given
    the others; 0: only GPTQ."""

    def _check_search(self) -> None:
        _require_step("--awqlite_alpha_step", self.awqlite_alpha_step)
        require(0 < self.awqclip_alpha_min <= 1, "--awqclip_alpha_min must lie in (0, 1].")
        _require_step("--awqclip_alpha_step", self.awqclip_alpha_step)
        _require_at_least(1, "--awqclip_bsz_col", self.awqclip_bsz_col)
        _require_positive("--gptq_damping", self.gptq_damping)
        require(self.descent_passes >= 0, "--descent_passes must be 0 or more.")


# The groups stand in reverse: dataclasses list the fields of the last base first.
@dataclass(frozen=True, kw_only=True)
class QuantizeConfig(
    _SearchOptions, _StorageOptions, _FormatOptions, _FolderOptions, _AlgorithmOptions, TextOptions, _ModelOptions
):
    """Quantize a base model: calibrate where that wasn't done yet, search quantized weights, and export the model."""

    examples: ClassVar[tuple[str, ...]] = (
        "models/base models/int4 --evaluate",
        "models/base models/int4 --target_size 900MB",
        "models/base models/int4 --dry_run",
    )
    positional: ClassVar[tuple[str, ...]] = ("onnx_path", "output_path")

    exclude: Annotated[str | None, tyro.conf.arg(metavar="PATTERNS")] = None
    """Comma-separated parts of the names of nodes to leave unquantized. Default: nothing, or lm_head where target is
    any and there is no budget (target_bpw, target_size), which decides about lm_head too."""
    accuracy_level: AccuracyLevel | None = None
    """Accuracy level for genai_config.json's session options and, with matmul_nbits, for the nodes themselves. On the
    CPU the default 4 rounds activations to int8: up to 1.7 times as fast as 1, which keeps them in float32, at next to
    no loss. INT8 weights below 4 are slower than floating point."""
    verify: Verification = "full"
    """Checks of the result. full: fusion of every site, every site's output, bytes. quick: all but the sites' outputs.
    off: none."""
    evaluate: Flag = False
    """Compare the result with the base model on text of other kinds than it was calibrated on: KL divergence,
    perplexity, most likely tokens and, with onnxruntime-genai, decoding speed."""
    dry_run: Flag = False
    """Say what would be done, without doing it. That is every site's format, where input scales go, bytes, memory,
    seconds. Only the graph is read, and for a budget the calibration cache, if there is one, and the weights."""
    device: str = "auto"
    """Device of the search: auto, cpu, cuda, cuda:1, mps."""
    overwrite: bool = False
    """Replace an existing output, quantized weights of other options, and a calibration of other text."""

    @property
    def cache_path(self) -> Path:
        """Return the folder of the calibration cache."""
        return self.cache_dir or default_folder(self.onnx_path, cache_suffix(self.component))

    @property
    def components(self) -> tuple[str, ...]:
        """Return the components that are named, none or more."""
        return () if self.component is None else tuple(name.strip() for name in self.component.split(","))

    @property
    def parts(self) -> tuple[QuantizeConfig, ...]:
        """Return what is done to each component, one after the other; this where there is one."""
        return tuple(map(self.of_component, self.components)) if len(self.components) > 1 else (self,)

    def of_component(self, component: str) -> QuantizeConfig:
        """Return what is done to one of several components: with places of its own, and only what it can be used for.

        Samples without a component's name are of those that aren't decoders, and of a decoder whose encoder is among
        them, which hears them through it. What needs text goes with decoders.
        """
        first, weights, cache = component == self.components[0], self.weights_folder, self.cache_dir
        beside = default_folder(self.onnx_path, cache_suffix(component))
        if cache is not None:
            beside = cache if first else cache.with_name(f"{cache.name}.{component}")
        found = replace(
            self,
            component=component,
            cache_dir=beside,
            weights_path=weights if first else weights.with_name(f"{weights.name}.{component}"),
        )
        if component == "decoder":
            own = self.samples_of(component, unnamed="encoder" in self.components)
            return replace(found, samples=None if own is None else str(own))
        return replace(found, refine=False, distill=0, algo=self.search_algorithm)

    @property
    def calibration(self) -> CalibrateConfig:
        """Return how stage one makes the cache."""
        return CalibrateConfig(
            onnx_path=self.onnx_path,
            component=self.component,
            cache_dir=self.cache_path,
            device=self.device,
            overwrite=self.overwrite,
            **self.text_options | {"expert_rows": self._expert_rows},
        )

    @property
    def _expert_rows(self) -> str:
        """Return whether stage one keeps what experts read: not where they stay as they are."""
        target = self.parsed_target
        if self.experts == "none" or (target is not None and target.runtime not in RUN_EXPERTS):
            return "none"
        asked = self.experts is not None or target is not None
        return "all" if asked and self.expert_rows == "auto" else self.expert_rows

    @property
    def weights_folder(self) -> Path:
        """Return the folder for the quantized weights."""
        return self.weights_path or default_folder(self.output_path, ".weights")

    @property
    def export_options(self) -> ExportOptions:
        """Return the options of the exporter."""
        return ExportOptions(accuracy_level=self.accuracy_level, verify=self.verify)

    @property
    def needs_cache(self) -> bool:
        """Return whether the search reads calibration statistics."""
        return self.searches_sites and (self.has_budget or self.improves_search or self.algo not in ROUNDED)

    @property
    def leaves_formats_open(self) -> bool:
        """Return whether nothing chooses each site's format: no budget, rule, file, nor INT4's whole format by name."""
        chosen = self.has_budget or self.enable_mixed_quant or self.layers_8bit or self.plan or self.checkpoint
        return not chosen and None in (self.block_size, self.use_zero_point)

    @property
    def searches_sites(self) -> bool:
        """Return whether any MatMul's codes are searched: beside a checkpoint only those that options name."""
        return self.checkpoint is None or self.lm_head in ("4", "8") or bool(self.layers_8bit)

    def validate(self) -> None:
        """Raise OptionError naming the first option that can't be used."""
        self._check_text()
        self._check_formats()
        self._check_storage()
        self._check_algorithm()
        self._check_search()
        if self.algo == "rtn":
            self._check_rtn()
        require(
            self.weight_operator != "matmul_nbits" or not self.use_column_major,
            "--weight_operator matmul_nbits can't be combined with --use_column_major; leave one out.",
        )
        if self.plan is not None:
            _refuse_beside("--plan", self._formats_given)
        self._check_components()
        if self.checkpoint is not None:
            self._check_checkpoint()

    def _check_components(self) -> None:
        names = self.components
        require(
            len(set(names)) == len(names) and all(names), f"--component {self.component} names one twice, or nothing."
        )
        if len(names) > 1:
            one = "goes with one --component: each has its own"
            require(not self.has_budget, f"{self.budget_description if self.has_budget else ''} {one} bytes.".strip())
            require(self.plan is None, f"--plan {one} sites.")
            require(self.checkpoint is None, f"--checkpoint {one} weights.")

    def require_no_text(self) -> None:
        """Raise OptionError where an option runs text through the model, which a graph that runs on samples can't."""
        what = "which a graph that is calibrated on samples doesn't take; leave them out."
        require(not self.improves_search, f"--refine, --distill and --algo signround run text through it, {what}")
        require(self.sensitivity != "measured", f"--sensitivity measured runs text through it, {what}")

    def _check_checkpoint(self) -> None:
        """Refuse what would change the codes of a checkpoint, or their formats."""
        require(
            not self.improves_search and self.algo != "rtn",
            "--checkpoint takes codes as they are, and --refine, --distill and the algorithms rtn and signround change "
            "them; leave those out.",
        )
        for_searched = _OF_SEARCHED if self.searches_sites else {"--lm_head"}
        formats = {name: given for name, given in self._formats_given.items() if name not in for_searched}
        zero_point = None if self.searches_sites else self.use_zero_point
        _refuse_beside("--checkpoint", formats | {"--plan": self.plan, "--use_zero_point": zero_point is not None})

    def _check_rtn(self) -> None:
        """Refuse what needs packed codes: ``--algo rtn`` stores floating-point weights with Q and DQ nodes."""
        require(
            not self.use_column_major, "--use_column_major works only with DQ nodes; use --algo rtn_dq in place of rtn."
        )
        require(
            self.weight_operator != "matmul_nbits",
            "--weight_operator matmul_nbits can't be combined with --algo rtn; use --algo rtn_dq, which rounds alike.",
        )
        require(
            not self.improves_search,
            "--algo rtn stores floating-point weights, which --refine and --distill can't improve; use --algo rtn_dq.",
        )
        require(
            not self.has_budget,
            "--algo rtn stores floating-point weights with Q and DQ nodes, so it can't keep to a budget; use rtn_dq.",
        )

    @property
    def _formats_given(self) -> dict[str, object]:
        """Return the options that decide about formats, with whether each was given."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig(CommandOptions):
    """Write saved quantized weights into the base graph again, without searching."""

    examples: ClassVar[tuple[str, ...]] = (
        "--onnx_path models/base --weights_path models/int4.weights --output_path models/again",
        "--onnx_path models/base --weights_path int4.weights --output_path nbits --weight_operator matmul_nbits",
        "--onnx_path models/base --weights_path int4.weights --output_path fast --accuracy_level 4",
    )

    onnx_path: Path
    """The base model that the weights were made from."""
    weights_path: Path
    """Folder that stages.quantize saved its weights to."""
    output_path: Path
    """Where to write the quantized model: a folder, or the .onnx file in it. Must not exist yet."""
    component: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Part of a package of several models that the weights were made from. Default: the one that the path names, else
    decoder."""
    weight_operator: WeightOperator | None = None
    """dq or matmul_nbits. Default: the form that stages.quantize chose."""
    accuracy_level: AccuracyLevel | None = None
    """Accuracy level for genai_config.json's session options, with matmul_nbits for its nodes (1: exact on CPU, 4:
    fast)."""
    verify: Verification = "full"
    """Checks of the result. full: fusion of every site, every site's output, bytes. quick: all but the sites' outputs.
    off: none."""
    overwrite: bool = False
    """Replace an existing output."""

    @property
    def export_options(self) -> ExportOptions:
        """Return the options of the exporter."""
        return ExportOptions(accuracy_level=self.accuracy_level, verify=self.verify)


def _require_block_size(option: str, size: int | None, because: str) -> None:
    require(
        size is None or (_SMALLEST_BLOCK <= size <= _LARGEST_BLOCK and size & (size - 1) == 0),
        f"{option} {size} is not a power of two from {_SMALLEST_BLOCK} to {_LARGEST_BLOCK}: {because}.",
    )


def _require_step(option: str, step: float) -> None:
    require(_SMALLEST_STEP <= step <= 1, f"{option} must lie in [{_SMALLEST_STEP}, 1].")


def _require_positive(option: str, value: float | None) -> None:
    require(value is None or 0 < value < math.inf, f"{option} must be more than 0 and finite.")


def _require_at_least(least: int, option: str, value: int) -> None:
    require(value >= least, f"{option} must be at least {least}.")


def _refuse_beside(option: str, others: Mapping[str, object]) -> None:
    for other, given in others.items():
        require(not given, f"{option} decides about every site's format, and so does {other}; leave one out.")
