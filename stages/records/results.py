"""What the stages hand on: calibration statistics, quantized weights and their reports, the recipe, an export's checks.

Shapes: N = out_features, K = in_features, T = tokens, nB = blocks along K; V = vocabulary and D = hidden size.
Weights are always [N, K] here, whatever the graph stores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from stages.records.formats import EmbeddingPlan, QuantSpec, WeightForm
from stages.records.sites import ActivationGroup, MatMulSite, UnquantizedWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStats:
    """Second-order statistics of one activation over ``num_tokens`` tokens.

    Exactly one of ``gram`` ([K, K], float32, X^T X / T) and ``rows`` ([T, K], the model's type) is present; rows where
    T < K and they are smaller, because they are then cheaper to multiply with too.
    """

    num_tokens: int
    abs_mean: Tensor
    """[K] float32, mean over tokens of |x_k|."""
    gram: Tensor | None = None
    rows: Tensor | None = None

    @property
    def is_silent(self) -> bool:
        """Return whether nothing was seen: no token came here (an expert nobody chose), or only zeros."""
        return not bool(self.abs_mean.any())


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationStats:
    """The statistics that the search minimises over (``calibration``) and that may veto its choice (``held_out``)."""

    calibration: TokenStats
    held_out: TokenStats


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenWeights:
    """How much each token counts at one activation, [windows, length] float32: nats^2 a unit^2."""

    calibration: Tensor
    held_out: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchStats:
    """What a search minimizes over the sites that read one activation, and how much tokens and channels count.

    Where an error counts by what it does to the end loss, every token's x is multiplied by the root of its weight s in
    ``tokens``, so that G is the mean of s x^T x, and half the sum is a divergence in nats a token.
    """

    tokens: ActivationStats
    channel_weights: Mapping[str, Tensor]
    """By site: c, [N] float32, how much an error of each output channel counts, 1 on average; no site where all count
    alike."""
    token_weights: TokenWeights | None = None
    """s of every token; None where all count alike."""
    output_grams: Mapping[str, Tensor] = field(default_factory=dict)
    """By site whose outputs enter attention: H, [heads, size, size] float32, how errors of a head's channels count
    together: the mean of g^T g over tokens, g the loss's gradient there divided by the root of s."""
    own_tokens: int | None = None
    """Calibration tokens that the router sent to this expert; None for anything but an expert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """One site's stored weight: W[n, k] * input_scale[k] is approximated by (code - zero_point) * scale."""

    site: MatMulSite
    spec: QuantSpec
    codes: Tensor
    """[N, K] int8 (symmetric) or uint8 (asymmetric), unpacked."""
    scales: Tensor
    """[N, nB] in the spec's scale type."""
    zero_points: Tensor | None = None
    """[N, nB] uint8, or None where symmetric."""
    input_scale: Tensor | None = None
    """[K] float32 AWQ scale that the weight was multiplied with and the activation must be divided by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedTable:
    """One embedding's stored numbers: table[v, d] is approximated by code * scale."""

    packed: Tensor
    """[ceil(V * D * bits / 8)] uint8: signed codes in C order, INT4 two to a byte, as ONNX stores it; unpacked they
    would need twice the memory."""
    scales: Tensor
    """[V, nB] (axis 1) or [nB, D] (axis 0), in the table's type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteReport:
    """The choice for one site and its losses: one JSON line.

    Losses are mean squared output errors relative to the mean squared output: tr(D G D^T) / tr(W G W^T); None where no
    statistics were used (RTN).
    """

    site: str
    algorithm: str
    format: str
    """The QuantSpec's label."""
    bytes: int
    loss_rtn: float | None = None
    loss: float | None = None
    held_out_loss_rtn: float | None = None
    held_out_loss: float | None = None
    scale_family: str = "identity"
    alpha: float | None = None
    mean_clip_ratio: float | None = None
    block_loss_start: float | None = None
    """Where a decoder block was tuned: mean squared error of its output on held-out tokens, each relative to the
    token's squared length, before tuning."""
    block_loss: float | None = None
    """The same, after tuning."""
    tokens: int | None = None
    """Calibration tokens that the router sent to this expert; None for anything but an expert, or without any."""
    note: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SolvedGroup:
    """The solver's results for one activation group."""

    group: ActivationGroup
    weights: tuple[QuantizedWeight, ...]
    reports: tuple[SiteReport, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRecipe:
    """All that the exporter needs besides the weights themselves; stored as recipe.json beside them."""

    model_fingerprint: str
    weight_form: WeightForm
    fold_input_scales: bool
    groups: tuple[ActivationGroup, ...]
    """The groups that hold quantized sites, in graph order; only those sites."""
    kept: tuple[tuple[str, str], ...]
    """(site, why) for each site that stays as it is."""
    search: str
    """Fingerprint of the algorithm, options and cache: a folder with another one is refused, not mixed."""
    summary: str
    """The algorithm and options, for people to read."""
    embeddings: tuple[EmbeddingPlan, ...] = ()
    """The tables whose Gather nodes read codes."""
    unreached: tuple[UnquantizedWeights, ...] = ()
    """Large weights that no MatMul or Gemm reads, and so stay as they are."""
    session_options: tuple[tuple[str, str], ...] = ()
    """(key, value) that the target runtime needs in genai_config.json's session options. An accuracy level among them
    holds where none is asked for; MatMulNBits nodes carry it themselves."""
    experts_take_level: bool = False
    """Whether the QMoE of the target's release has an accuracy level."""
    experts_say_raw: bool = False
    """Whether it must say that its codes are in the operator's own order, not packed for a GPU."""
    byte_scales: bool = False
    """Whether INT4 scales beside zero points become multiples of one step a row."""
    computes_rotary: bool = False
    """Whether nodes compute the tables of rotary embeddings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFileUse:
    """Bytes of a data file, of the tensors in it, and of the padding between them."""

    file_bytes: int
    referenced_bytes: int
    padding_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteError:
    """max |y - y_ref| / max |y_ref| over 8 random tokens, at accuracy level 1 and at the runtime's default level."""

    site: str
    exact: float
    default: float
    """Of the first site of this format and shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableError:
    """max |y - y_ref| / max |y_ref| over the first, the last and a few random tokens."""

    table: str
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsError:
    """max |y - y_ref| / max |y_ref| of the worst expert of a QMoE node over two random tokens, at accuracy level 1."""

    node: str
    experts: int
    worst: int
    """Its index."""
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UnfusedSite:
    """A site that runs as DequantizeLinear and MatMul, and why."""

    site: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """The figures of a verified export; None where a check was not run, which ``skipped`` then explains."""

    sites: int
    data: DataFileUse | None = None
    """None in reports that an earlier version wrote."""
    fused: int | None
    unfused: tuple[UnfusedSite, ...] = ()
    worst_exact: SiteError | None = None
    """The site with the largest error at accuracy level 1."""
    worst_default: SiteError | None = None
    """The site with the largest error at the runtime's default level, which rounds activations to int8."""
    skipped: tuple[str, ...] = ()
    tables: tuple[TableError, ...] = ()
    experts: tuple[ExpertsError, ...] = ()
    rotary: tuple[TableError, ...] = ()
    """Tables of rotary embeddings that nodes compute, compared with the base's."""
    widened: bool = False
    """Whether a bfloat16 model ran as float32."""
    norms_written_out: bool = False
    """Whether the norms inside attention ran as nodes before it."""
    provider: str = "CPU"
    """Where its tokens ran: the CPU, or the execution provider that the model is for where the CPU can't run it."""
