"""Which sites ONNX Runtime really runs as MatMulNBits, and why the others are not.

A DequantizeLinear that stays makes a floating-point copy of the weight at every token, so fusion is what decides speed.
The proof is a profile of one token: a fused kernel keeps the name of its MatMul. The reasons are the conditions of
ONNX Runtime's DQMatMulToMatMulNBits rule, read in its source and measured with 1.22 to 1.32 on CPU.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from export.relu import blocks_fusion
from stages.errors import GraphError
from stages.model_directory import ModelDirectory
from stages.records import PerBlock, PerChannel, QuantSpec
from stages.session import CausalFeeds, SessionSettings, open_session
from stages.widen import runnable_file

Version = tuple[int, int]
_EIGHT_BITS: Version = (1, 25)
"""First release that fuses 8-bit codes, per-channel scales, float16 scales and Gemm."""
_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 256


class CannotRun(Exception):
    """This machine can't run the model for a reason that is no fault of the export; the message says it."""


def runtime_version() -> Version:
    """Major and minor version of the ONNX Runtime that is installed."""
    major, minor = ort.__version__.split(".")[:2]
    return int(major), int(minor)


def nodes_run_as_matmulnbits(onnx_file: Path, base: ModelDirectory) -> frozenset[str]:
    """Names of the nodes that ran as MatMulNBits when one token went through the model on the CPU, widened if needed.

    Raises:
        GraphError: ONNX Runtime refuses the model.
        CannotRun: the model's inputs, types or operators are not for the CPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = SessionSettings(accuracy_level=1, profile_prefix=Path(folder) / "profile")
        with runnable_file(onnx_file, settings.providers, onnx_file.parent) as runnable:
            profile = _run_one_token(runnable, base, settings)
        events = json.loads(profile.read_text(encoding="utf-8"))
    suffix = "_kernel_time"
    return frozenset(
        event["name"].removesuffix(suffix)
        for event in events
        if event.get("cat") == "Node"
        and event["name"].endswith(suffix)
        and event["args"].get("op_name") == "MatMulNBits"
    )


def _run_one_token(onnx_file: Path, base: ModelDirectory, settings: SessionSettings) -> Path:
    try:
        session = open_session(onnx_file, settings)
    except GraphError as error:
        if type(error.__cause__).__name__ == "NotImplemented":
            raise CannotRun("its operators have no CPU kernel for this type") from error
        raise
    try:
        feeds = CausalFeeds(session, base.kv_heads, base.head_size, base.windowed_caches)
        one_token = feeds(np.zeros((1, 1), np.int64))
    except GraphError as error:
        raise CannotRun(f"its inputs can't be made here: {error}") from error
    try:
        session.run(None, one_token)
    except Exception as error:  # onnxruntime raises classes without a common base
        raise GraphError(f"ONNX Runtime can't run the exported model: {str(error).splitlines()[0]}") from error
    finally:
        profile = Path(session.end_profiling())
    return profile


def why_not_fused(node: ir.Node, spec: QuantSpec, version: Version) -> str:
    """The reason that ONNX Runtime ``version`` leaves ``node``'s weight (stored as ``spec``) unfused."""
    for reason in (_because_of_type(spec, version), _because_of_blocks(spec), _because_of_graph(node, version)):
        if reason is not None:
            return reason
    return f"ONNX Runtime {version[0]}.{version[1]} left it unfused for a reason this tool doesn't know"


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
        return f"a {reader.op_type} alone reads its result"
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
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return True
    return bias.is_initializer() and bias.shape is not None and len(bias.shape) == 1 and bias.shape[0] != 1
