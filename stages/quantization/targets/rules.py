"""Define what the rules of every runtime are made of, and the rules that several share.

Each runtime has a module with two functions: ``prefer`` says what it runs fast, ``warnings`` what it does not.
Sources are named where a rule stands; ORT#n is an issue or pull request of microsoft/onnxruntime. "Run" means run on
the CPU (x86) with 1.20.1, 1.21.1, 1.22.1, 1.23.2, 1.24.1, 1.24.4, 1.25.1, 1.28.0 and 1.31.1; no other provider was run,
and the reasons say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from stages.commands.options import AccuracyLevel
from stages.commands.parsing import Release, Runtime, Target
from stages.commands.quantize_options import LmHead, Rotary, ScaleRange, ScaleType
from stages.quantization.targets.formats import EmbeddingBits, ExpertFormat, FormatChoice, ModelFacts, RequestedFormats
from stages.records.formats import Granularity, PerChannel, WeightForm

T = TypeVar("T")

DQ_FUSES_ALL: Release = (1, 25)
"""First to fuse 8-bit codes, scales per channel and Gemm (ORT#27614, #27769), and float16 scales on CPU (ORT#27640)."""
READS_BYTES: Release = (1, 23)
"""First whose GatherBlockQuantized takes INT8, and INT4 as MatMulNBits stores it: bytes, and how many bits (run)."""
_SHARING: frozenset[Runtime] = frozenset({"cpu", "cuda", "webgpu"})
"""Runtimes with MatMulNBits and GatherBlockQuantized."""
_LOADS_COLUMN_MAJOR_INT8: Release = (1, 28)
"""First CPU release that loads column-major INT8 per channel without a zero point."""
FROM_DQ = frozenset({WeightForm.DQ, WeightForm.QDQ})
BLOCKS = (128, 64, 32)
"""INT4 blocks that a budget chooses from where the runtime says nothing else."""
NEVER_BFLOAT16 = "DequantizeLinear with bfloat16 scales is never fused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a rule may look at."""

    release: Release
    requested: RequestedFormats
    facts: ModelFacts

    @property
    def is_bfloat16(self) -> bool:
        return "bfloat16" in self.facts.dtypes

    @property
    def version(self) -> str:
        return _version(self.release)

    def lm_head(self, preferred: LmHead) -> LmHead | None:
        """Return what becomes of lm_head; None where there is none, or a budget or plan file decides about it."""
        if not self.facts.has_lm_head or self.requested.lm_head_open:
            return None
        return self.requested.lm_head or preferred

    def stores_eight_bit(self, eight_bit: Granularity | None, lm_head: LmHead | None) -> bool:
        """Return whether any site becomes INT8.

        Args:
            eight_bit: the runtime's INT8; None: it has none, and sites that only a rule finds don't become INT8.
            lm_head: what becomes of it.
        """
        requested = self.requested
        return requested.named_eight_bit or lm_head == "8" or (requested.mixed and eight_bit is not None)


def _version(release: Release) -> str:
    return f"ONNX Runtime {release[0]}.{release[1]}"


@dataclass(frozen=True, slots=True)
class Preference(Generic[T]):
    """A value, and why the runtime runs it best."""

    value: T
    why: str


POSITIVE: Preference[ScaleRange] = Preference("full", "negative scales may not run there")
SIGNED: Preference[ScaleRange] = Preference(
    "signed",
    "a negative scale gives the larger side of a block the level more, and ONNX Runtime's own quantizer writes it",
)


STORED_TABLES: Preference[Rotary] = Preference("stored", "nobody watched a runtime compute them there")
UNCAST: Preference[ScaleType] = Preference("base", "nobody ran a Cast between scales and their operator there")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferences:
    """What a runtime would have where nobody asked for anything else."""

    form: Preference[WeightForm]
    block_size: Preference[int]
    eight_bit: Preference[Granularity | None]
    """None: the runtime has no INT8."""
    zero_point: Preference[bool]
    lm_head: Preference[LmHead]
    embedding: Preference[EmbeddingBits | None]
    """None: the runtime has no GatherBlockQuantized, which reads only the rows it needs."""
    experts: Preference[ExpertFormat | None]
    """None: it has no QMoE that reads what can be written here."""
    open_blocks: tuple[int, ...] = BLOCKS
    """INT4 blocks that it runs fast."""
    gather_block_size: Preference[int] = Preference(32, "as exact as INT4 weights of that size")
    int8_gather_block_size: Preference[int] | None = None
    """Of INT8 embeddings; None: as of INT4."""
    scale_range: Preference[ScaleRange] = POSITIVE
    """Of INT4 without zero points."""
    scale_type: Preference[ScaleType] = UNCAST
    rotary: Preference[Rotary] = STORED_TABLES
    accuracy_level: Preference[AccuracyLevel | None] | None = None
    """None where the level means nothing to the runtime."""
    session_options: tuple[tuple[str, str], ...] = ()

    def table_block_size(self, bits: EmbeddingBits | None) -> Preference[int]:
        """Return the block size of embeddings that have ``bits``."""
        return self.int8_gather_block_size if bits == 8 and self.int8_gather_block_size else self.gather_block_size


@dataclass(frozen=True, slots=True)
class Rules:
    """One runtime's two functions; warnings are whole sentences."""

    prefer: Callable[[Request], Preferences]
    warnings: Callable[[Request, FormatChoice], Iterator[str]]


def unfused_in_dq(request: Request, *, eight_bit: bool, float16: bool) -> str:
    """Return what of the model's needs its release leaves unfused behind DequantizeLinear; empty from 1.25 on.

    Args:
        request: the release and the model.
        eight_bit: whether any site becomes INT8.
        float16: whether float16 scales are among it, as they are only on the CPU.
    """
    if request.release >= DQ_FUSES_ALL:
        return ""
    needs = {
        "8-bit codes": eight_bit,
        "float16 scales": float16 and "float16" in request.facts.dtypes,
        "Gemm": request.facts.has_gemm,
    }
    return " or ".join(name for name, needed in needs.items() if needed)


def dq_warnings(request: Request, unfused: str, fix: str) -> Iterator[str]:
    """Warn of DequantizeLinear where nothing fuses it.

    Args:
        request: the release and the model.
        unfused: what ``unfused_in_dq`` returned.
        fix: what to do about it.
    """
    if request.is_bfloat16:
        yield f"{NEVER_BFLOAT16}; choose --weight_operator matmul_nbits."
    if unfused:
        yield (
            f"{request.version} fuses no DequantizeLinear with {unfused}: it copies such a weight to floating point "
            f"for every token; {fix}."
        )


def column_major_warnings(request: Request, choice: FormatChoice, *, eight_bit: bool) -> Iterator[str]:
    """Warn of a Transpose behind DequantizeLinear, on the providers that ONNX Runtime's rule covers.

    Args:
        request: the release.
        choice: the formats.
        eight_bit: whether any site becomes INT8.
    """
    yield (
        "ONNX Runtime fuses no INT4 behind a Transpose (86 times slower at 4096 x 4096 on the CPU); leave "
        "--use_column_major out."
    )
    if eight_bit and choice.eight_bit == PerChannel() and request.release < _LOADS_COLUMN_MAJOR_INT8:
        yield (
            f"{request.version} may refuse to load column-major INT8 with a scale per channel and no zero point; leave "
            "--use_column_major out or use 1.28 or later."
        )


def smallest_head(eight_bit: Preference[Granularity | None]) -> Preference[LmHead]:
    """Return INT8 for lm_head where the runtime has it, else INT4."""
    if eight_bit.value is None:
        return Preference("4", f"{eight_bit.why}, and in floating point it is the largest weight of a small model")
    return Preference("8", "at next to no loss, and read whole for each token in a half to a quarter of its bytes")


def looks_up_quantized(choice: FormatChoice) -> bool:
    """Return whether GatherBlockQuantized will stand in the graph."""
    return choice.embedding_bits is not None and choice.gather_form == "gather_block_quantized"


def why_not_shared(target: Target | None) -> str:
    """Return why a runtime shouldn't read one table as embedding and as lm_head; empty where it can."""
    if target is None or (target.runtime in _SHARING and target.release >= READS_BYTES):
        return ""
    if target.runtime not in _SHARING:
        return f"one table for both needs MatMulNBits and GatherBlockQuantized, which {target.runtime} doesn't run"
    return f"{_version(target.release)} reads no such table; {_version(READS_BYTES)} is the first"


def lookup_since(request: Request, first: Release, what: str) -> Preference[EmbeddingBits | None]:
    """Return INT8 for embeddings from ``first`` on, the release that brought ``what``; before it, they stay."""
    if request.release >= first:
        return Preference(8, f"{what}, which reads only the rows it needs; not run here")
    return Preference(None, f"{request.version} looks up on the CPU; from {first[0]}.{first[1]} on {what}")


def looks_up_on_cpu(request: Request, choice: FormatChoice, first: Release) -> Iterator[str]:
    """Warn of GatherBlockQuantized before the provider's ``first`` release with a kernel."""
    if looks_up_quantized(choice) and request.release < first:
        yield (
            f"{request.version} runs GatherBlockQuantized on the CPU, not on this provider; leave --embedding out or "
            f"use {first[0]}.{first[1]} or later."
        )
