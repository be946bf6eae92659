"""Every base, target and release: what is chosen runs fast; what was asked for and does not is warned of."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from stages.commands.parsing import Release, Runtime, parse_target
from stages.commands.quantize_options import Embedding, LmHead
from stages.errors import OptionError
from stages.model.directory import ModelDirectory
from stages.quantization.targets.choose import choose_formats, open_formats, target_of_base
from stages.quantization.targets.formats import FormatChoice, ModelFacts, RequestedFormats
from stages.quantization.targets.rules import why_not_shared
from stages.records.formats import PerBlock, PerChannel, WeightForm
from stages.records.sites import FloatName
from tests.reference.runtimes import lookup_is_fast, weight_is_fast
from tests.stages.quantization.targets.requests import RELEASES, RUNTIMES, choose, facts, stored

# Releases at which something changes, and the ends.
BOUNDARIES = tuple((1, minor) for minor in (21, 22, 23, 24, 25, 32))
BASES: tuple[tuple[FloatName, bool], ...] = (
    ("float32", False),
    ("float32", True),
    ("float16", False),
    ("bfloat16", False),
)
HEADS: tuple[LmHead, ...] = ("4", "8", "none")
FORMS = (None, WeightForm.DQ, WeightForm.MATMUL_NBITS, WeightForm.DQ_COLUMN_MAJOR, WeightForm.QDQ)
REQUESTS = [
    *(
        RequestedFormats(form=form, eight_bit=eight, mixed=mixed, named_eight_bit=named)
        for form, eight, mixed, named in product(
            FORMS, (None, PerChannel(), PerBlock(block_size=64)), (False, True), (False, True)
        )
        if mixed or named or eight is None
    ),
    *(
        RequestedFormats(form=form, block_size=block, zero_point=zero_point, mixed=True)
        for form, block, zero_point in product(FORMS[:3], (None, 32, 64, 256), (False, True))
        if block or zero_point
    ),
    *(RequestedFormats(lm_head=head, named_eight_bit=head == "8") for head in HEADS),
    *(RequestedFormats(accuracy_level=level, mixed=True) for level in (0, 1, 4)),
]


def _all_fast(
    runtime: Runtime, release: Release, choice: FormatChoice, requested: RequestedFormats, model: ModelFacts
) -> bool:
    (dtype,) = model.dtypes
    return all(
        weight_is_fast(
            runtime,
            release,
            form=str(choice.form),
            bits=bits,
            block=block,
            dtype=dtype,
            zero_point=not choice.symmetric,
            gemm=model.has_gemm,
            in_features=model.in_features,
            level=choice.accuracy_level,
        )
        for bits, block in stored(choice, requested)
    )


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_what_nobody_asked_for_is_never_slow_and_never_a_form_that_no_runtime_fuses(runtime: Runtime) -> None:
    for release, (dtype, gemm), mixed in product(RELEASES, BASES, (False, True)):
        requested, model = RequestedFormats(mixed=mixed), facts(dtype, gemm=gemm, widths=(1024,), head=True)
        choice = choose(runtime, release, requested, model)
        where = (runtime, release, dtype, gemm, mixed, choice)
        assert choice.four_bit.block_size in (32, 64, 128), where
        assert choice.form in (WeightForm.DQ, WeightForm.MATMUL_NBITS), where
        assert choice.gather_form == "gather_block_quantized", where
        assert choice.symmetric is (runtime != "cpu"), where
        assert choice.lm_head == ("4" if choice.keep_mixed_because else "8"), where
        assert choice.embedding_bits is None or lookup_is_fast(
            runtime, release, form=choice.gather_form, axis=1, block=choice.gather_block_size, width=1024
        ), where
        # What is slow then is the base model or the release itself, and that is said.
        assert _all_fast(runtime, release, choice, requested, model) or choice.warnings, where


def _is_hopeless(runtime: Runtime, release: Release, dtype: FloatName) -> bool:
    """Whether the runtime can't run the base's type fast in any form."""
    if runtime == "qnn":
        return dtype != "float32" or release < (1, 24)
    first = {"cpu": None, "cuda": (1, 23), "dml": None, "trt-rtx": (1, 20), "webgpu": None}[runtime]
    return dtype == "bfloat16" and (first is None or release < first)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_only_a_base_or_release_that_the_runtime_cannot_run_is_warned_of_unasked(runtime: Runtime) -> None:
    for release, (dtype, gemm) in product(RELEASES, BASES):
        choice = choose(runtime, release, model=facts(dtype, gemm=gemm, widths=(1024,), head=True))
        assert bool(choice.warnings) == _is_hopeless(runtime, release, dtype), (release, dtype, gemm, choice.warnings)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_warning_stands_exactly_where_a_request_makes_something_slow(runtime: Runtime) -> None:
    for requested, release, (dtype, gemm) in product(REQUESTS, BOUNDARIES, BASES):
        model = facts(dtype, gemm=gemm, head=True)
        choice = choose(runtime, release, requested, model)
        where = (requested, release, dtype, gemm, choice)
        assert choice.form == (requested.form or choice.form), where
        assert choice.four_bit.block_size == (requested.block_size or choice.four_bit.block_size), where
        assert choice.eight_bit == (requested.eight_bit or choice.eight_bit), where
        assert requested.zero_point in (None, not choice.symmetric), where
        left_out = requested.mixed and bool(choice.keep_mixed_because)
        fast = _all_fast(runtime, release, choice, requested, model) and not left_out
        assert bool(choice.warnings) is not fast, where


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_lookup_that_is_slow_or_wrong_is_warned_of(runtime: Runtime) -> None:
    for release, axis, form, block, width in product(
        ((1, 22), (1, 32)), (0, 1), (None, "dq"), (None, 64), (1024, 48, 40)
    ):
        requested = RequestedFormats(embedding="4", embedding_axis=axis, gather_form=form, gather_block_size=block)
        choice = choose(runtime, release, requested, facts(widths=(width,)))
        assert choice.gather_form == (form or "gather_block_quantized")
        assert block in (None, choice.gather_block_size)
        fast = lookup_is_fast(
            runtime, release, form=choice.gather_form, axis=axis, block=choice.gather_block_size, width=width
        )
        others = choose(runtime, release).warnings
        assert (set(choice.warnings) == set(others)) is fast, (release, requested, width, choice)


def test_for_any_runtime_the_defaults_are_what_they_were() -> None:
    for dtype, form in (
        ("float32", WeightForm.DQ),
        ("float16", WeightForm.DQ),
        ("bfloat16", WeightForm.MATMUL_NBITS),
    ):
        assert choose_formats(None, RequestedFormats(mixed=True), facts(dtype, head=True)) == FormatChoice(
            form=form,
            four_bit=PerBlock(block_size=128),
            eight_bit=PerChannel(),
            symmetric=True,
            scale_range="full",
            gather_form="gather_block_quantized",
            gather_block_size=32,
            accuracy_level=None,
        )


def test_for_any_runtime_requests_are_taken_as_they_are() -> None:
    requested = RequestedFormats(
        form=WeightForm.MATMUL_NBITS,
        block_size=16,
        eight_bit=PerBlock(block_size=64),
        zero_point=True,
        lm_head="4",
        embedding="4",
        embedding_axis=0,
        gather_block_size=64,
        accuracy_level=1,
    )
    assert choose_formats(None, requested, facts(head=True)) == FormatChoice(
        form=WeightForm.MATMUL_NBITS,
        four_bit=PerBlock(block_size=16),
        eight_bit=PerBlock(block_size=64),
        symmetric=False,
        scale_range="full",
        lm_head="4",
        embedding_bits=4,
        embedding_axis=0,
        gather_form="gather_block_quantized",
        gather_block_size=64,
        accuracy_level=1,
    )


@pytest.mark.parametrize(
    ("requested", "words"),
    [
        (RequestedFormats(form=WeightForm.DQ_COLUMN_MAJOR), "leave --use_column_major out"),
        (RequestedFormats(embedding="4", gather_form="dq"), "leave --gather_form dq out"),
        (RequestedFormats(lm_head="8", named_eight_bit=True, accuracy_level=1), "leave --accuracy_level out or store"),
        (RequestedFormats(mixed=True, form=WeightForm.MATMUL_NBITS), "choose --accuracy_level 4 or store no INT8"),
    ],
)
def test_what_is_slower_than_the_base_is_warned_of_for_the_cpu_and_for_any_runtime(
    requested: RequestedFormats, words: str
) -> None:
    model = facts(widths=(1024,), head=True)
    (warning,) = choose_formats(None, requested, model).warnings
    assert words in warning
    # The CPU's own choice for MatMulNBits is level 4.
    expected = () if requested.form is WeightForm.MATMUL_NBITS else (warning,)
    assert choose("cpu", requested=requested, model=model).warnings == expected


def test_below_level_4_the_cpu_gets_no_int8_that_nobody_asked_for() -> None:
    for level, head in ((None, "8"), (4, "8"), (1, "4"), (0, "4")):
        choice = choose("cpu", requested=RequestedFormats(accuracy_level=level), model=facts(head=True))
        assert (choice.lm_head, choice.warnings) == (head, ())


@pytest.mark.parametrize(
    ("provider", "dtype", "runtime", "why"),
    [
        (None, "float32", "cpu", "genai_config.json names no provider"),
        (None, "float16", "cpu", "genai_config.json names no provider"),
        (None, "bfloat16", "cuda", "bfloat16, which only CUDA"),
        ("cuda", "float16", "cuda", "the provider cuda"),
        ("DML", "float16", "dml", "the provider DML"),
        ("NvTensorRtRtx", "float16", "trt-rtx", "the provider NvTensorRtRtx"),
        ("webgpu", "float16", "webgpu", "the provider webgpu"),
        ("qnn", "float32", "qnn", "the provider qnn"),
        ("OpenVINO", "float32", None, "OpenVINO, which has no rules here"),
    ],
)
def test_the_target_follows_the_base(provider: str | None, dtype: FloatName, runtime: str | None, why: str) -> None:
    place = Path("base")
    directory = ModelDirectory(folder=place, onnx_file=place / "a.onnx", has_genai_config=True, provider=provider)
    found = target_of_base(directory, facts(dtype))
    assert (found.target and found.target.runtime) == runtime
    assert why in found.why


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_line_has_a_reason_and_every_warning_is_one_sentence(runtime: Runtime) -> None:
    seen: set[str] = set()
    for release, (dtype, _), mixed, named in product(BOUNDARIES, BASES, (False, True), (False, True)):
        embedding: Embedding | None = "4" if named else None
        requested = RequestedFormats(mixed=mixed, named_eight_bit=named, embedding=embedding, zero_point=named)
        choice = choose(runtime, release, requested, facts(dtype, widths=(40,), head=True))
        assert all(line.option and line.chosen and line.why for line in choice.explanations)
        assert len({line.option for line in choice.explanations}) == len(choice.explanations)
        seen |= set(choice.warnings)
    for warning in seen:
        assert warning.endswith("."), warning
        assert "\n" not in warning
        assert ". " not in warning, warning


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_negative_scales_are_the_default_where_they_are_known_to_run(runtime: Runtime) -> None:
    known = runtime in ("cpu", "cuda", "webgpu")
    choice = choose(runtime, requested=RequestedFormats(zero_point=False))
    line = next(line for line in choice.explanations if line.option == "--scale_range")
    assert line.chosen == ("signed" if known else "full")
    assert choice.scale_range == line.chosen
    assert choose(runtime, requested=RequestedFormats(scale_range="compat7")).scale_range == "compat7"
    assert choose(runtime, requested=RequestedFormats(form=WeightForm.QDQ)).scale_range == "full"
    assert choose_formats(None, RequestedFormats(), facts()).scale_range == "full"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_only_the_cpu_has_narrow_scales_where_nobody_asks(runtime: Runtime) -> None:
    known, asked = runtime == "cpu", RequestedFormats(scale_type="narrow")
    stored = "float16" if known else "float32"
    choice = choose(runtime)
    assert choice.scale_dtype("float32") == stored
    shown = "bytes, float16" if known else stored
    assert next(line for line in choice.explanations if line.option == "--scale_type").chosen == shown
    assert choice.scale_dtype("bfloat16") == "bfloat16"
    assert choose(runtime, requested=asked).scale_dtype("float32") == "float16"
    assert choose_formats(None, RequestedFormats(), facts()).scale_dtype("float32") == "float32"
    # A QuantizeLinear divides by its scale, in the graph's own type.
    assert choose(runtime, requested=replace(asked, form=WeightForm.QDQ)).scale_dtype("float32") == "float32"


def test_tensorrt_is_warned_of_negative_scales_that_were_asked_for() -> None:
    requested = RequestedFormats(scale_range="signed", zero_point=False)
    assert any("positive scales" in warning for warning in choose("trt-rtx", requested=requested).warnings)
    assert not any("positive scales" in warning for warning in choose("cpu", requested=requested).warnings)


@pytest.mark.parametrize(
    ("target", "blocks", "zero_points", "eight_bit"),
    [
        (None, (128, 64, 32), (False, True), PerBlock(block_size=128)),
        ("cpu", (128, 64, 32), (False, True), PerBlock(block_size=128)),
        ("cpu@1.22", (128, 64, 32), (False, True), None),
        ("cuda", (128, 64, 32), (False,), PerBlock(block_size=32)),
        ("dml", (128, 64, 32), (False,), None),
        ("trt-rtx", (128, 64), (False,), PerChannel()),
        ("webgpu", (32,), (False,), PerBlock(block_size=32)),
        ("webgpu@1.22", (32,), (False,), None),
        ("qnn", (32,), (False,), None),
    ],
)
def test_a_budget_chooses_among_what_the_runtime_runs_fast(
    target: str | None,
    blocks: tuple[int, ...],
    zero_points: tuple[bool, ...],
    eight_bit: PerBlock | PerChannel | None,
) -> None:
    found = open_formats(None if target is None else parse_target(target), RequestedFormats(), facts("float16"))
    assert tuple(each.block_size for each in found.four_bit) == blocks
    assert (found.zero_points, found.eight_bit) == (zero_points, eight_bit)


def test_trt_rtx_offers_only_blocks_that_divide_every_row() -> None:
    found = open_formats(parse_target("trt-rtx"), RequestedFormats(), facts(in_features=(576, 1536)))
    assert [each.block_size for each in found.four_bit] == [64]


@pytest.mark.parametrize("target", [None, "cuda"])
def test_what_was_asked_for_wins(target: str | None) -> None:
    requested = RequestedFormats(block_size=16, eight_bit=PerChannel(), zero_point=True)
    found = open_formats(None if target is None else parse_target(target), requested, facts())
    assert found.four_bit == (PerBlock(block_size=16),)
    assert (found.zero_points, found.eight_bit) == ((True,), PerChannel())


@pytest.mark.parametrize(("minor", "bits", "block_size"), [(22, 4, 32), (23, 8, 128)])
def test_the_cpus_embedding_is_int8_from_the_release_that_reads_it(minor: int, bits: int, block_size: int) -> None:
    choice = choose("cpu", (1, minor), model=facts(widths=(640,)))
    assert (choice.embedding_bits, choice.gather_block_size) == (bits, block_size)


def test_an_int8_embedding_that_the_release_refuses_is_warned_of() -> None:
    asked, wide = RequestedFormats(embedding="8"), facts(widths=(640,))
    old, new = (" ".join(choose("cpu", (1, minor), asked, wide).warnings) for minor in (22, 23))
    assert "1.22 refuses a model with an INT8 embedding" in old
    assert "embedding" not in new


@pytest.mark.parametrize(
    ("runtime", "words"),
    [("cpu@1.23", ""), ("cuda", ""), ("cpu@1.22", "1.23 is the first"), ("dml", "which dml doesn't run")],
)
def test_one_table_for_embedding_and_lm_head_is_for_runtimes_with_both_operators(runtime: str, words: str) -> None:
    assert why_not_shared(None) == ""
    found = why_not_shared(parse_target(runtime))
    assert bool(found) == bool(words)
    assert words in found


EXPERT_RELEASES = [
    ("cpu", "float32", 23),
    ("cpu", "bfloat16", None),
    ("cuda", "float32", None),
    ("cuda", "float16", 28),
    ("cuda", "bfloat16", 28),
    ("webgpu", "float16", 24),
    ("webgpu", "float32", 24),
    ("webgpu", "bfloat16", None),
    ("trt-rtx", "float16", 24),
    ("trt-rtx", "float32", None),
    ("dml", "float16", None),
    ("qnn", "float32", None),
]
"""First minor release of 1.x whose QMoE reads what is written; None: no release."""


@pytest.mark.parametrize(("runtime", "dtype", "first"), EXPERT_RELEASES)
def test_experts_become_qmoe_from_the_release_that_reads_it(
    runtime: Runtime, dtype: FloatName, first: int | None
) -> None:
    model = replace(facts(dtype), has_experts=True)
    for release in RELEASES:
        choice = choose(runtime, release, model=model)
        runs = first is not None and release >= (1, first)
        assert (choice.experts is not None) is runs, release
        assert bool(choice.experts_stay) is not runs
        (line,) = [line for line in choice.explanations if line.option == "--experts"]
        assert line.chosen == ("4" if runs else "none")
        if runs:
            continue
        with pytest.raises(OptionError, match=r"--experts 4: .*choose --target"):
            choose(runtime, release, RequestedFormats(experts="4"), model)


def test_only_the_cpu_reads_zero_points_of_experts_and_only_cuda_must_be_told_that_codes_are_raw() -> None:
    model = replace(facts("float16"), has_experts=True)
    formats = {runtime: choose(runtime, model=model).experts for runtime in ("cpu", "cuda", "webgpu", "trt-rtx")}
    assert all(formats.values())
    assert [runtime for runtime, each in formats.items() if each and each.zero_points] == ["cpu"]
    assert [runtime for runtime, each in formats.items() if each and each.takes_level] == ["cpu"]
    assert [runtime for runtime, each in formats.items() if each and each.router_weights] == ["cpu", "cuda"]
    assert [runtime for runtime, each in formats.items() if each and each.packed_unless_said] == ["cuda"]
