"""Find the sites that ONNX Runtime really runs as MatMulNBits, and the reason where it doesn't.

A DequantizeLinear that stays makes a floating-point copy of the weight at every token, so fusion is what decides speed.
The proof is a profile of one token: a fused kernel keeps the name of its MatMul. The reasons are the conditions of
ONNX Runtime's DQMatMulToMatMulNBits rule, read in its source and measured with 1.22 to 1.32 on CPU.
"""

from __future__ import annotations

import errno
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from export.rewrite import blocks_fusion
from export.verify.alike import Form, form_of
from stages.errors import GraphError
from stages.model.directory import ModelDirectory
from stages.model.partition import Partition, cut_into_partitions, nodes_reading
from stages.model.patterns import input_of, is_constant
from stages.records.formats import PerBlock, PerChannel, QuantSpec
from stages.runtime.cpu.runnable import runnable_graph
from stages.runtime.feeds import CausalFeeds
from stages.runtime.graph_inputs import WindowShape, inputs_of_graph
from stages.runtime.providers import CPU_ONLY, SHORT_NAMES, own_providers
from stages.runtime.session import SessionSettings, open_session, runtime_reason

Version = tuple[int, int]
_EIGHT_BITS: Version = (1, 25)
"""First release that fuses 8-bit codes, per-channel scales, float16 scales and Gemm."""
_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 256
_PARTITION_BYTES = 1 << 28
"""ONNX Runtime repacks weights, so that a partition takes up to three times as much."""


class CannotRun(Exception):
    """This machine can't run the model for a reason that is no fault of the export; the message says it."""


def runtime_version() -> Version:
    """Return major and minor version of the installed ONNX Runtime."""
    major, minor = ort.__version__.split(".")[:2]
    return int(major), int(minor)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRun:
    """The names of the nodes that ran as MatMulNBits, and where."""

    nodes: frozenset[str]
    provider: str


def run_one_token(
    onnx_file: Path, sites: frozenset[str], base: ModelDirectory, model: ir.Model | None = None
) -> TokenRun:
    """Run one token on the CPU or, where it can't run the base either, on the provider that the model is for.

    Args:
        onnx_file: the saved model.
        sites: names of their outputs; nodes behind the last of them don't run.
        base: the model that it was made from.
        model: parsed from ``onnx_file``; None parses it here.

    Raises:
        GraphError: ONNX Runtime refuses the model, and not the base.
        CannotRun: no provider of this machine runs the base.
    """
    model = ir.load(onnx_file) if model is None else model
    try:
        return TokenRun(nodes=nodes_run_as_matmulnbits(onnx_file, sites, base, model=model), provider="CPU")
    except CannotRun as error:
        reason = str(error)
    except GraphError as error:
        reason = _reason_of_base(sites, base, scratch=onnx_file.parent)
        if not reason:
            raise error from error.__cause__
    own = own_providers(base.provider)
    try:
        if own:
            nodes = nodes_run_as_matmulnbits(onnx_file, sites, base, own, model=model)
            return TokenRun(nodes=nodes, provider=SHORT_NAMES[own[0]].upper())
    except (CannotRun, GraphError) as error:
        reason += f"; on {SHORT_NAMES[own[0]]}: {error}"
    raise CannotRun(reason)


def _reason_of_base(sites: frozenset[str], base: ModelDirectory, scratch: Path) -> str:
    """Return why the base stops on the CPU, in words; empty where it runs."""
    try:
        nodes_run_as_matmulnbits(base.onnx_file, sites, base, scratch=scratch)
    except CannotRun as error:
        return str(error)
    except GraphError as error:
        return f"the base itself doesn't run on the CPU: {runtime_reason(error.__cause__ or error)}"
    return ""


def nodes_run_as_matmulnbits(
    onnx_file: Path,
    sites: frozenset[str],
    base: ModelDirectory,
    providers: tuple[str, ...] = CPU_ONLY,
    scratch: Path | None = None,
    model: ir.Model | None = None,
) -> frozenset[str]:
    """Run one token, rewritten for the CPU if needed, and return the names of the nodes that ran as MatMulNBits there.

    The model runs in partitions, so that the weights of only one are in memory at a time. Of those that are alike, such
    as layers of one decoder, one runs for all: what ONNX Runtime fuses doesn't depend on the numbers of weights.

    Args:
        onnx_file: the model.
        sites: names of their outputs; nodes behind the last of them don't run.
        base: describes the model's inputs.
        providers: where it runs; what a later one of them runs doesn't count.
        scratch: folder for temporary files; None is the model's own.
        model: parsed from ``onnx_file``, which stays as it is; None parses it here.

    Raises:
        GraphError: ONNX Runtime refuses the model.
        CannotRun: the model's inputs, types or operators are not for these providers.
    """
    model = ir.load(onnx_file) if model is None else model
    scratch = onnx_file.parent if scratch is None else scratch
    window = WindowShape.of(inputs_of_graph(model, base))
    tokens = np.zeros((window.batch or 1, window.length or 1), np.int64)
    computed: dict[str, np.ndarray] = {}
    names: set[str] = set()
    known: dict[Form, _PartitionRun] = {}
    with tempfile.TemporaryDirectory(dir=scratch) as profiles:  # which goes with the unfinished output
        settings = SessionSettings(
            providers=providers,
            profile_prefix=Path(profiles) / "profile",
            external_data_folder=onnx_file.parent,
        )
        for partition in cut_into_partitions(model, wanted=_ends(model, sites), limit=_PARTITION_BYTES, together=sites):
            _declare_types(partition, computed)
            graph, form = partition.model.graph, form_of(partition.model.graph)
            run = None if form is None else known.get(form)
            if run is None:
                with runnable_graph(partition.model, providers, scratch) as source:
                    run = _run_partition(source, partition, tokens, computed, base, settings)
                if form is not None:
                    known[form] = run
            names |= {str(graph[place].name) for place in run.fused}
            computed |= zip((str(value.name) for value in graph.outputs), run.outputs, strict=True)
    return frozenset(names)


def _ends(model: ir.Model, sites: frozenset[str]) -> frozenset[str]:
    """Return what the nodes behind the sites compute: they too decide whether a product is fused.

    A product that is an output itself would be kept from fusing with its reader.
    """
    behind = {str(node.outputs[0].name) for node in nodes_reading(model, sites)}
    read = {value.name for node in nodes_reading(model, sites) for value in node.inputs if value is not None}
    return frozenset(behind - sites | sites - read)


@dataclass(frozen=True, slots=True)
class _PartitionRun:
    outputs: tuple[np.ndarray, ...]
    fused: tuple[int, ...]
    """Places of the nodes that ran as MatMulNBits."""


def _declare_types(partition: Partition, computed: Mapping[str, np.ndarray]) -> None:
    """Give the inputs that earlier partitions computed the types that they turned out to have."""
    for value in partition.model.graph.inputs:
        if value.name in partition.boundary_inputs:
            value.type = ir.TensorType(ir.DataType.from_numpy(computed[value.name].dtype))


def _run_partition(
    source: Path | bytes,
    partition: Partition,
    tokens: np.ndarray,
    computed: Mapping[str, np.ndarray],
    base: ModelDirectory,
    settings: SessionSettings,
) -> _PartitionRun:
    """Run ``tokens`` through ``partition``."""
    boundary = {name: computed[name] for name in partition.boundary_inputs}
    if isinstance(source, Path):
        settings = replace(settings, external_data_folder=None)
    try:
        session = open_session(source, settings)
    except GraphError as error:
        if error.__cause__ is not None and type(error.__cause__).__name__ == "NotImplemented":
            raise CannotRun(f"operators without a kernel here: {runtime_reason(error.__cause__)}") from error
        raise
    try:
        feeds = CausalFeeds.of(session, base, fed_otherwise=frozenset(boundary), open_size=1)
        fed = feeds(tokens)
    except GraphError as error:
        raise CannotRun(f"its inputs can't be made here: {str(error).partition(';')[0]}") from error
    try:
        outputs = session.run(None, fed | boundary)
    except Exception as error:  # onnxruntime raises classes without a common base
        if feeds.guessed:
            names = ", ".join(feeds.guessed)
            raise CannotRun(f"it can't be run with zeros for {names} ({runtime_reason(error)})") from error
        raise GraphError(f"ONNX Runtime can't run the exported model: {runtime_reason(error)}.") from error
    finally:
        profile = Path(session.end_profiling())
    fused = _matmulnbits_in(profile, settings.providers[0])
    return _PartitionRun(
        outputs=tuple(outputs),
        fused=tuple(place for place, node in enumerate(partition.model.graph) if node.name in fused),
    )


def _matmulnbits_in(profile: Path, provider: str) -> frozenset[str]:
    """Return the names of the nodes that ran as MatMulNBits on ``provider``.

    Raises:
        OSError: the profile isn't whole, since ONNX Runtime passes over a disk that is full.
    """
    suffix = "_kernel_time"
    try:
        events = json.loads(profile.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(errno.ENOSPC, "the profile of its check is cut short: the disk is full") from error
    return frozenset(
        event["name"].removesuffix(suffix)
        for event in events
        if event.get("cat") == "Node"
        and event["name"].endswith(suffix)
        and event["args"].get("op_name") == "MatMulNBits"
        and event["args"].get("provider") == provider
    )


def why_not_fused(node: ir.Node, spec: QuantSpec, version: Version) -> str:
    """Say why ONNX Runtime leaves a weight unfused, as far as it is known.

    Args:
        node: the MatMul or Gemm.
        spec: how its weight is stored.
        version: ONNX Runtime's.
    """
    known = known_reason_not_fused(node, spec, version)
    return known or f"ONNX Runtime {version[0]}.{version[1]} left it unfused for a reason this tool doesn't know"


def known_reason_not_fused(node: ir.Node, spec: QuantSpec, version: Version) -> str | None:
    """Return the condition of ONNX Runtime's fusion rule that a weight breaks; None where none is known.

    Args:
        node: the MatMul or Gemm.
        spec: how its weight is stored.
        version: ONNX Runtime's.
    """
    reasons = (_because_of_type(spec, version), _because_of_blocks(spec), _because_of_graph(node, version))
    return next((reason for reason in reasons if reason is not None), None)


def _because_of_type(spec: QuantSpec, version: Version) -> str | None:
    if spec.scale_dtype == "bfloat16":
        return "scales are bfloat16, which ONNX Runtime fuses nowhere; --weight_operator matmul_nbits needs no fusion"
    if version >= _EIGHT_BITS:
        return None
    release = f"ONNX Runtime {_EIGHT_BITS[0]}.{_EIGHT_BITS[1]} is the first to fuse"
    if spec.bits == 8:
        return f"{release} 8-bit codes"
    if spec.scale_dtype == "float16":
        return f"{release} float16 scales"
    if isinstance(spec.granularity, PerChannel):
        return f"{release} scales per channel"
    return None


def _because_of_blocks(spec: QuantSpec) -> str | None:
    match spec.granularity:
        case PerBlock(block_size=size) if not _SMALLEST_BLOCK <= size <= _LARGEST_BLOCK or size & (size - 1):
            return f"block size {size} is not a power of two from {_SMALLEST_BLOCK} to {_LARGEST_BLOCK}"
        case _:
            return None


def _because_of_graph(node: ir.Node, version: Version) -> str | None:
    weight = node.inputs[1]
    maker = None if weight is None else weight.producer()
    if weight is None or maker is None:
        return "its weight comes from no DequantizeLinear"
    if maker.op_type == "Transpose":
        return "a Transpose stands between DequantizeLinear and the MatMul (column-major weight)"
    if maker.op_type != "DequantizeLinear":
        return f"its weight comes from {maker.op_type}, not from DequantizeLinear"
    if len(weight.uses()) != 1 or weight.is_graph_output():
        return "another node reads the same DequantizeLinear"
    if (reader := blocks_fusion(node)) is not None:
        return f"only a {reader.op_type} reads its result"
    if node.op_type == "Gemm" and version < _EIGHT_BITS:
        return f"ONNX Runtime {_EIGHT_BITS[0]}.{_EIGHT_BITS[1]} is the first to fuse Gemm"
    if node.op_type == "Gemm" and not _is_plain_gemm(node):
        return "the Gemm scales or transposes its inputs"
    if node.op_type == "Gemm" and not _adds_a_vector(node):
        return "the Gemm's bias is not a constant vector of its outputs"
    return None


def _is_plain_gemm(node: ir.Node) -> bool:
    factors = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
    transposed = node.attributes.get_int("transA", 0), node.attributes.get_int("transB", 0)
    return factors == (1.0, 1.0) and transposed == (0, 0)


def _adds_a_vector(node: ir.Node) -> bool:
    bias = input_of(node, 2)
    if bias is None:
        return True
    return is_constant(bias) and bias.shape is not None and len(bias.shape) == 1 and bias.shape[0] != 1
