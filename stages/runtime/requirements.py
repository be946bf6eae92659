"""Say which release of ONNX Runtime a graph needs, where the installed one lacks something of it.

The tables were measured: every release from 1.19 to 1.31 was asked which opsets, IR versions and operators it knows.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType

import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper

from stages.errors import GraphError
from stages.model.form.validate import opset_of

Release = tuple[int, int]
_MICROSOFT = "com.microsoft"
_OPSETS: Mapping[int, Release] = MappingProxyType({22: (1, 21), 23: (1, 23), 24: (1, 24), 25: (1, 24), 26: (1, 25)})
_IR_VERSIONS: Mapping[int, Release] = MappingProxyType({11: (1, 23), 12: (1, 24), 13: (1, 24)})
_OPERATORS: Mapping[str, Release] = MappingProxyType(
    {
        "GatherBlockQuantized": (1, 20),
        "PagedAttention": (1, 23),
        "CausalConvWithState": (1, 25), "LinearAttention": (1, 25),
        "MatMulNBitsMlp": (1, 27), "MatMulNBitsQkv": (1, 27),
        "GatedAdd": (1, 29), "GatedRMSNorm": (1, 29), "LinearAttentionGate": (1, 29), "MRotaryEmbedding": (1, 29),
        "MatMulBlockQuantizedFp4Weight": (1, 29), "MatMulBlockQuantizedFp8Weight": (1, 29),
        "EngramGate": (1, 30), "GatedDeltaNet": (1, 30), "NGramHashMapping": (1, 30),
        "VarlenCausalConvWithState": (1, 30),
        "BranchwiseRMSNorm": (1, 31), "DynamicSparseAttention": (1, 31), "HyperConnectionPostMix": (1, 31),
        "HyperConnectionPreMix": (1, 31), "PackedSparseAttentionIndexer": (1, 31), "ScaledSiLU": (1, 31),
        "SparseAttentionIndexer": (1, 31), "SparsePagedAttention": (1, 31), "VarlenNGramHashMapping": (1, 31),
    }
)  # fmt: skip
"""The first release with each operator of com.microsoft that came lately."""
_ATTRIBUTES: Mapping[tuple[str, str], Release] = MappingProxyType(
    {
        ("GroupQueryAttention", "k_quant_type"): (1, 25), ("GroupQueryAttention", "v_quant_type"): (1, 25),
        ("GroupQueryAttention", "kv_cache_bit_width"): (1, 25), ("GroupQueryAttention", "qk_norm_epsilon"): (1, 28),
        ("GroupQueryAttention", "sliding_window_cache"): (1, 29), ("GroupQueryAttention", "causal"): (1, 30),
        ("CausalConvWithState", "state_window"): (1, 29), ("CausalConvWithState", "channels_last"): (1, 30),
        ("CausalConvWithState", "dilation"): (1, 30), ("LinearAttention", "state_window"): (1, 29),
        ("QMoE", "quant_type"): (1, 27), ("QMoE", "weights_prepacked"): (1, 28), ("QMoE", "accuracy_level"): (1, 31),
        ("MatMulNBits", "weight_prepacked"): (1, 28), ("GatedRMSNorm", "activation"): (1, 31),
    }
)  # fmt: skip
_INPUTS: Mapping[str, tuple[tuple[int, Release], ...]] = MappingProxyType(
    {
        "GroupQueryAttention": ((14, (1, 25)), (16, (1, 28))),
        "QMoE": ((14, (1, 24)), (15, (1, 25)), (21, (1, 27))),
        "PagedAttention": ((17, (1, 29)),),
    }
)
"""The most inputs that an operator takes from a release on."""
_PACKAGES = ("onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-qnn", "onnxruntime")


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """What a release knows of an operator."""

    most_inputs: int
    attributes: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledRuntime:
    """What an ONNX Runtime knows."""

    version: str
    newest_opset: int
    newest_ir_version: int
    operators: Mapping[str, Operator] = field(default_factory=dict)
    """Those of com.microsoft; empty where it doesn't tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lack:
    """Something that a graph has and the installed ONNX Runtime doesn't know."""

    what: str
    instead: str
    """How a graph is built that does without it."""
    since: Release | None
    """The first release that knows it; None: none that is known here."""


def require_runtime(model: ir.Model, where: str) -> None:
    """Raise GraphError where the installed ONNX Runtime is too old for ``model``, which ``where`` calls by name."""
    installed = installed_runtime(model)
    lacks = tuple(lacks_of(model, installed))
    if lacks:
        raise GraphError(f"{where} {too_old(lacks, installed.version)}")


def too_old(lacks: tuple[Lack, ...], installed: str) -> str:
    """Return the end of a sentence about a graph: what it needs, and both ways out.

    Args:
        lacks: what is missing, one or more.
        installed: the version of ONNX Runtime.
    """
    first_releases = [lack.since for lack in lacks]
    known = [release for release in first_releases if release is not None]
    needed = "a later ONNX Runtime" if len(known) < len(lacks) else "ONNX Runtime {}.{} or later".format(*max(known))
    missing = ", ".join(dict.fromkeys(lack.what for lack in lacks))
    instead = " and ".join(dict.fromkeys(lack.instead for lack in lacks))
    return (
        f"needs {needed}: the installed {installed} lacks {missing}; upgrade it (pip install -U {_package()}), or "
        f"build the base again {instead}."
    )


def lacks_of(model: ir.Model, installed: InstalledRuntime) -> Iterator[Lack]:
    """Yield what ``model`` has and ``installed`` doesn't know, each once."""
    opset = opset_of(model) or 1
    if opset > installed.newest_opset:
        instead = f"with opset {installed.newest_opset} or lower"
        yield Lack(what=f"opset {opset}", instead=instead, since=_OPSETS.get(opset))
    if model.ir_version > installed.newest_ir_version:
        instead = f"with IR version {installed.newest_ir_version} or lower"
        yield Lack(what=f"IR version {model.ir_version}", instead=instead, since=_IR_VERSIONS.get(model.ir_version))
    if installed.operators:
        nodes = (node for node in model.graph.all_nodes() if node.domain == _MICROSOFT)
        yield from dict.fromkeys(lack for node in nodes for lack in _lacks_of_node(model, node, installed))


def _lacks_of_node(model: ir.Model, node: ir.Node, installed: InstalledRuntime) -> Iterator[Lack]:
    name, instead = node.op_type, "with an onnxruntime-genai as old as that"
    if node.op_identifier() in model.functions:
        return
    operator = installed.operators.get(name)
    if operator is None:
        yield Lack(what=f"the operator {name}", instead=instead, since=_OPERATORS.get(name))
        return
    for attribute in node.attributes.keys() - operator.attributes:
        since = _ATTRIBUTES.get((name, attribute))
        yield Lack(what=f"the attribute {attribute} of {name}", instead=instead, since=since)
    count = max((index + 1 for index, value in enumerate(node.inputs) if value is not None), default=0)
    if count > operator.most_inputs:
        since = next((release for most, release in _INPUTS.get(name, ()) if count <= most), None)
        yield Lack(what=f"{name} with {count} inputs", instead=instead, since=since)


def installed_runtime(model: ir.Model) -> InstalledRuntime:
    """Return what the installed ONNX Runtime knows, as far as ``model`` asks for it."""
    return InstalledRuntime(
        version=ort.__version__,
        newest_opset=_newest(opset_of(model) or 1, lambda opset: _trial(opset=opset)),
        newest_ir_version=_newest(model.ir_version, lambda version: _trial(ir_version=version)),
        operators=_operators(),
    )


def _newest(wanted: int, trial: Callable[[int], onnx.ModelProto]) -> int:
    """Return the newest version, at most ``wanted``, whose trial opens."""
    return next((version for version in range(wanted, 1, -1) if _opens(trial(version))), 1)


def _trial(*, opset: int = 13, ir_version: int = 8) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "trial", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def _opens(model: onnx.ModelProto) -> bool:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    with suppress(Exception):  # onnxruntime raises classes without a common base
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return True
    return False


def _operators() -> dict[str, Operator]:
    try:
        from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema
    except ImportError:  # a build that leaves it out
        return {}
    return {
        schema.name: Operator(most_inputs=schema.max_input, attributes=frozenset(schema.attributes))
        for schema in get_all_operator_schema()
        if schema.domain == _MICROSOFT
    }


def _package() -> str:
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)
            return name
    return _PACKAGES[-1]
