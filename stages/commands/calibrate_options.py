"""Options of ``stages.calibrate``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from stages.commands.options import CommandOptions, default_folder, require
from stages.commands.parsing import parse_size

KeyValueScales = Literal["none", "per_channel", "per_tensor"]
PART_OF_FREE_MEMORY = 0.6
"""The default of --max_memory."""
DECIDE_TEXT = (
    "dataset", "calib_size", "seq_len", "apply_chat_template", "model_name", "seed", "use_random_calib",
    "token_weights", "samples",
)  # fmt: skip
"""Options that say what the statistics are of."""


def cache_suffix(component: str | None) -> str:
    """Return what the name of a model's folder gets for the cache: each component has its own statistics."""
    return ".calibration" if component in (None, "decoder") else f".{component}.calibration"


# Without slots, so that the commands below and those of other modules can inherit.
@dataclass(frozen=True, kw_only=True)
class TextOptions(CommandOptions):
    """The calibration text, and how the base model runs over it."""

    dataset: str | None = None
    """Calibration text: cnn, mix, pilevel, offline, self, or a file. These are cnn (cnn_dailymail), pilevel
    (pile-val-backup), offline (prose from CPython's own documentation, no download), self (text that the model writes,
    through onnxruntime-genai), mix (self, offline, code, languages, arithmetic and random in fixed parts, no download;
    each is a data set of its own too), a local .txt / .jsonl / .parquet file, or several of these separated by commas,
    which share the windows evenly or by weights, as in mix=3,notes.txt=1. Default: cnn where the Hugging Face hub
    answers, else mix."""
    samples: str | None = None
    """Files that calibrate a graph where text can't, such as an encoder or a projector: a folder of images or sounds,
    which the package's own processor reads, or .npz files whose names are the graph's inputs (.npy where it has one).
    Each file is a sample, or each row of its arrays. A tenth is held out from the search, another tenth (at most 32) is
    kept for --evaluate. Of several components NAME=PATH, separated by commas."""
    calib_size: int | None = None
    """Number of windows of seq_len tokens, or of samples; a tenth of them is held out from the search. Default: 128, or
    48 of mix; more of mix, self, cnn and pilevel where a MatMul has so many input channels that each would have fewer
    than three tokens."""
    seq_len: int = 512
    """Tokens in each window; windows are packed full, without padding. For encoders of text: the most tokens of a
    document, each of which is a sample."""
    apply_chat_template: bool = False
    """Make a conversation of each document with the tokenizer's chat template: from the messages of a .jsonl or
    .parquet row, or else from its text, the beginning as the user's message and the rest as the assistant's. With self:
    only chats."""
    model_name: str | None = None
    """Hub name or folder to take the tokenizer, or the processor of samples, from. Default: the model's own folder."""
    trust_remote_code: bool = False
    """Allow the tokenizer's own Python code to run."""
    seed: int = 0
    """Seed of the order of documents, of text that the model writes, and of random tokens."""
    use_random_calib: bool = False
    """Use random token ids in place of text: for smoke tests, never for accuracy."""
    token_weights: Literal["auto", "none"] = "auto"
    """How much each token counts in the statistics: by what an error there would do to the model's answers (auto; one
    backward pass through the float model), or all alike (none). auto means none where the model's layers can't be run
    one by one."""
    expert_rows: Literal["auto", "all", "none"] = "auto"
    """Keep every token's row of what experts in MoE nodes read, so that they can be calibrated: on the disk, tokens x
    hidden size for each such node, in the model's type. auto: where the base was built for a runtime with QMoE."""
    batch_size: int = 1
    """Windows in each forward pass."""
    calibration_eps: str = "cuda,cpu"
    """Execution providers for the forward passes, tried in this order: cuda, cpu, dml, NvTensorRtRtx."""
    max_memory: str | None = None
    """Memory for weights, statistics and activations, such as 8GB. A model that doesn't fit is run in parts, one range
    of layers after the other; each token still passes each layer once. Default: six tenths of what is free."""

    @property
    def names_text(self) -> bool:
        """Return whether an option asks for certain text, so that statistics of other text won't do."""
        return any(getattr(self, name) != getattr(TextOptions, name) for name in DECIDE_TEXT)

    def samples_of(self, component: str, *, unnamed: bool = True) -> Path | None:
        """Return the files that calibrate ``component``; None where text does.

        Args:
            component: as genai_config.json names it.
            unnamed: whether files count that are named for no component in particular.
        """
        named = self._named_samples
        return named.get(component, named.get("") if unnamed else None)

    @property
    def _named_samples(self) -> dict[str, Path]:
        """Return the paths in ``samples`` by component; that of no name in particular by nothing."""
        return dict(self._samples_as_typed)

    @property
    def _samples_as_typed(self) -> list[tuple[str, Path]]:
        if self.samples is None or Path(self.samples).exists():
            return [] if self.samples is None else [("", Path(self.samples))]
        entries = [entry.strip().partition("=") for entry in self.samples.split(",")]
        return [(name if path else "", Path(path or name)) for name, _, path in entries]

    @property
    def text_options(self) -> dict[str, Any]:
        """Return these options and their values."""
        return {field.name: getattr(self, field.name) for field in fields(TextOptions)}

    def _check_text(self) -> None:
        size = self.calib_size
        require(size is None or size >= 2, "--calib_size must be at least 2: one window to calibrate on, one held out.")
        require(self.seq_len >= 2, "--seq_len must be at least 2.")
        require(self.batch_size >= 1, "--batch_size must be at least 1.")
        require(self.seed >= 0, f"--seed {self.seed} must be 0 or more.")
        require(self.samples is None or not self.use_random_calib, "--samples and --use_random_calib contradict.")
        require(
            self.samples is None or all(path.name for path in self._named_samples.values()),
            f"--samples {self.samples} has a comma or a name without a path; write NAME=PATH,NAME=PATH.",
        )
        require(
            len(self._named_samples) == len(self._samples_as_typed),
            f"--samples {self.samples} names files twice for a component; pass one folder for each, as NAME=PATH.",
        )
        if self.max_memory is not None:
            parse_size(self.max_memory, "--max_memory")


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(TextOptions):
    """Run the base model once per batch and cache the statistics that stages.quantize searches with."""

    examples: ClassVar[tuple[str, ...]] = (
        "models/base",
        "models/base --dataset offline --calib_size 32",
        "models/base --dataset mix=3,notes.txt=1",
    )
    positional: ClassVar[tuple[str, ...]] = ("onnx_path",)

    onnx_path: Path
    """Base model: the .onnx file or the ORT-GenAI folder that holds it."""
    component: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Part of a package of several models to calibrate, as genai_config.json names it. Default: the one that the path
    names, else decoder."""
    cache_dir: Path | None = None
    """Folder for the cache. Default: the model's folder name with .calibration added."""
    add_position_ids: bool = False
    """Accepted for compatibility, without effect: the graph itself says whether it has position_ids."""
    kv_scales: KeyValueScales = "none"
    """Also write kv_scales.json into the cache: the scales of a quantized key/value cache, one for each channel of each
    head or one for each layer, as onnxruntime-genai's builder takes them (kv_cache_scale_file). Keys are measured so
    that the scales hold at every position, also beyond the calibration windows."""
    device: str = "auto"
    """Device that accumulates statistics: auto, cpu, cuda, cuda:1, mps."""
    overwrite: bool = False
    """Replace a cache of other tokens, other options or another model."""

    @property
    def cache_path(self) -> Path:
        """Return the folder of the cache."""
        return self.cache_dir or default_folder(self.onnx_path, cache_suffix(self.component))

    def validate(self) -> None:
        """Raise OptionError naming the first option that can't be used."""
        self._check_text()
        require(
            self.component is None or "," not in self.component,
            f"--component {self.component} names several; calibrate them one by one, or quantize them in one run.",
        )
