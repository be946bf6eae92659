"""Define what goes into the choice of formats, and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from stages.commands.options import AccuracyLevel
from stages.commands.quantize_options import Embedding, Experts, LmHead, Rotary, ScaleRange, ScaleType
from stages.records.experts import ActivationKind, ExpertLayer
from stages.records.formats import NARROW_SCALES, EmbeddingTable, Granularity, PerBlock, WeightForm, torch_float
from stages.records.sites import ActivationGroup, BlockAxis, FloatName, GatherForm

EmbeddingBits = Literal[4, 8]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedFormats:
    """What a person asked for in so many words; None and False leave it to the target."""

    form: WeightForm | None = None
    block_size: int | None = None
    eight_bit: Granularity | None = None
    mixed: bool = False
    """INT8 at the sites that a rule finds: a runtime without INT8 may leave these as they are."""
    named_eight_bit: bool = False
    """INT8 at sites that were named: done whatever the runtime makes of it."""
    zero_point: bool | None = None
    scale_range: ScaleRange | None = None
    scale_type: ScaleType | None = None
    rotary: Rotary | None = None
    lm_head: LmHead | None = None
    lm_head_open: bool = False
    """Whether a budget or a plan file decides about lm_head."""
    embedding: Embedding | None = None
    embedding_axis: BlockAxis = 1
    gather_form: GatherForm | None = None
    gather_block_size: int | None = None
    accuracy_level: AccuracyLevel | None = None
    experts: Experts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFormat:
    """How a runtime's QMoE takes experts: what it reads, and what it doesn't."""

    bits: Literal[4, 8]
    whose: str = "the CPU's"
    """QMoE, in words."""
    dtypes: frozenset[FloatName] = frozenset({"float32", "float16"})
    activations: frozenset[ActivationKind] = frozenset(get_args(ActivationKind))
    blocks: tuple[int, ...] = (256, 128, 64, 32, 16)
    """Their sizes, from the largest; each must divide both of an expert's sizes."""
    per_channel: bool = True
    multiple: int = 2
    """What both of an expert's sizes must be a multiple of."""
    most: int | None = None
    """Experts that it chooses from; None: any number."""
    zero_points: bool = False
    router_weights: bool = False
    """Whether it reads a token's weights from an input, where they are no softmax over the chosen experts' scores."""
    takes_level: bool = False
    """Whether it has an accuracy level."""
    packed_unless_said: bool = False
    """Whether it takes codes for packed where weights_prepacked doesn't say that they aren't."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What of a base model matters to the choice."""

    dtypes: frozenset[FloatName]
    """Types of the sites' weights, in which the graph computes."""
    in_features: frozenset[int]
    has_gemm: bool = False
    has_lm_head: bool = False
    embedding_widths: frozenset[int] = frozenset()
    embedding_bytes: int = 0
    """Of all embeddings, in floating point."""
    has_experts: bool = False
    """Whether MoE nodes have experts that can be sites."""


def facts_of(
    groups: Sequence[ActivationGroup], tables: Sequence[EmbeddingTable], layers: Sequence[ExpertLayer] = ()
) -> ModelFacts:
    """Return the facts of a model with these MatMuls, embeddings and layers of experts."""
    sites = [site for group in groups for site in group.sites]
    return ModelFacts(
        dtypes=frozenset(site.dtype for site in sites),
        in_features=frozenset(site.in_features for site in sites),
        has_gemm=any(site.op_type == "Gemm" for site in sites),
        has_lm_head=any(site.is_lm_head for site in sites),
        embedding_widths=frozenset(table.hidden for table in tables),
        embedding_bytes=sum(table.vocabulary * table.hidden * torch_float(table.dtype).itemsize for table in tables),
        has_experts=bool(layers),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """One line of the table that a choice is shown in."""

    option: str
    chosen: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatChoice:
    """Every setting that a target can decide, decided."""

    form: WeightForm
    four_bit: PerBlock
    eight_bit: Granularity
    symmetric: bool
    scale_range: ScaleRange
    """Of INT4 without zero points."""
    gather_form: GatherForm
    gather_block_size: int
    accuracy_level: AccuracyLevel | None
    lm_head: LmHead | None = None
    """None: neither an option nor the target says what becomes of it."""
    embedding_bits: EmbeddingBits | None = None
    """None: embeddings stay as they are."""
    embedding_axis: BlockAxis = 1
    scale_type: ScaleType = "base"
    rotary: Rotary = "stored"
    keep_mixed_because: str = ""
    """Why sites that only a rule would store as INT8 stay as they are; empty where they become INT8."""
    experts: ExpertFormat | None = None
    """None: experts stay as they are, because of ``experts_stay``."""
    experts_stay: str = ""
    session_options: tuple[tuple[str, str], ...] = ()
    explanations: tuple[Explanation, ...] = ()
    warnings: tuple[str, ...] = ()
    """One sentence for each thing that the target will not run fast, or at all."""

    def scale_dtype(self, computed: FloatName) -> FloatName:
        """Return the type in which scales are stored, where the graph computes in ``computed``."""
        return NARROW_SCALES.get(computed, computed) if self.scale_type != "base" else computed


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenFormats:
    """What a budget may choose from; ``eight_bit`` is None where the runtime has no INT8."""

    four_bit: tuple[PerBlock, ...]
    """From the coarsest to the finest."""
    zero_points: tuple[bool, ...]
    """Of INT4: without, with, or both."""
    eight_bit: Granularity | None
