"""Targets, requested formats and facts of models for the tests of the choice."""

from __future__ import annotations

from stages.commands.parsing import Release, Runtime, Target
from stages.quantization.targets.choose import choose_formats
from stages.quantization.targets.formats import FormatChoice, ModelFacts, RequestedFormats
from stages.records.formats import PerBlock
from stages.records.sites import FloatName

RUNTIMES: tuple[Runtime, ...] = ("cpu", "cuda", "dml", "trt-rtx", "webgpu", "qnn")
RELEASES: tuple[Release, ...] = tuple((1, minor) for minor in range(20, 33))


def facts(
    dtype: FloatName = "float32",
    *,
    gemm: bool = False,
    widths: tuple[int, ...] = (),
    in_features: tuple[int, ...] = (1024, 4096),
    head: bool = False,
) -> ModelFacts:
    return ModelFacts(
        dtypes=frozenset({dtype}),
        in_features=frozenset(in_features),
        has_gemm=gemm,
        has_lm_head=head,
        embedding_widths=frozenset(widths),
        embedding_bytes=sum(4 * 1000 * width for width in widths),
    )


def choose(
    runtime: Runtime,
    release: Release = (1, 32),
    requested: RequestedFormats | None = None,
    model: ModelFacts | None = None,
) -> FormatChoice:
    target = Target(runtime=runtime, release=release)
    return choose_formats(target, requested or RequestedFormats(), model or facts())


def stored(choice: FormatChoice, requested: RequestedFormats) -> list[tuple[int, int | None]]:
    """Return (bits, block size) of the kinds of sites that the choice leads to; None is a scale per channel."""
    kinds: list[tuple[int, int | None]] = [(4, choice.four_bit.block_size)]
    mixed = requested.mixed and not choice.keep_mixed_because
    if requested.named_eight_bit or mixed or choice.lm_head == "8":
        kinds.append((8, choice.eight_bit.block_size if isinstance(choice.eight_bit, PerBlock) else None))
    return kinds
