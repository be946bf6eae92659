"""Plan the experts of MoE nodes: a QMoE node has one format, so a node's experts share theirs, or all stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

import onnx_ir as ir

from stages.errors import OptionError
from stages.model.sites import why_no_sites
from stages.quantization.plan.rules import NamedSites, QuantPlan
from stages.quantization.targets.formats import ExpertFormat, FormatChoice
from stages.records.experts import ExpertLayer
from stages.records.formats import Granularity, PerBlock, PerChannel, QuantSpec, torch_float
from stages.records.sites import ActivationGroup, MatMulSite

_SMALLEST_BLOCK = 16
_NOTHING_GIVEN: Mapping[str, QuantSpec | None] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertPlan:
    """The groups of the experts that are quantized, with a format for each site, and why other nodes' stay."""

    groups: tuple[ActivationGroup, ...] = ()
    specs: Mapping[str, QuantSpec] = field(default_factory=dict)
    stay: Mapping[str, str] = field(default_factory=dict)
    """Reason by initializer."""

    @property
    def tables(self) -> frozenset[str]:
        """Initializers that hold the experts that are quantized."""
        return frozenset(site.weight for group in self.groups for site in group.sites)

    def joined(self, sites: QuantPlan) -> QuantPlan:
        """Return the plan of MatMuls with that of the experts added."""
        return replace(sites, groups=(*sites.groups, *self.groups), specs={**sites.specs, **self.specs})


def node_name(site: MatMulSite) -> str:
    """Return the name in plan files of all experts of the node that ``site`` is an expert of."""
    return f"{site.name.rpartition('/experts.')[0]}/experts"


def plan_experts(
    model: ir.Model,
    layers: Sequence[ExpertLayer],
    choice: FormatChoice,
    named: NamedSites,
    given: Mapping[str, QuantSpec | None] = _NOTHING_GIVEN,
) -> ExpertPlan:
    """Decide about the experts of every MoE node.

    Args:
        model: tells why other MoE nodes' experts are none.
        layers: the nodes whose experts can be sites.
        choice: the formats, and whether the target runs QMoE.
        named: what a person's options say about sites.
        given: formats by ``node_name`` that a plan file decides about; None: they stay.

    Raises:
        OptionError: a given format's blocks don't fit the experts.
    """
    stay = {
        str(value.name): reason
        for node in model.graph
        if node.op_type == "MoE" and (reason := why_no_sites(node))
        for value in node.inputs
        if value is not None and value.is_initializer()
    }
    groups: list[ActivationGroup] = []
    specs: dict[str, QuantSpec] = {}
    for layer in layers:
        excluded = next((named.skipped[site.name] for site in layer.sites if site.name in named.skipped), "")
        reason = excluded or (choice.experts_stay if choice.experts is None else _cannot_run(layer, choice.experts))
        name = node_name(layer.sites[0])
        if name in given and given[name] is None:
            reason = reason or "--plan: keep"
        if choice.experts is None or reason:
            stay |= {layer.fc1: reason, layer.fc2: reason}
            continue
        eight = any(site.name in named.eight_bit for site in layer.sites)
        spec = _given_spec(given.get(name), layer) or _spec(layer, choice, choice.experts, eight=eight)
        groups += layer.groups
        specs |= dict.fromkeys((site.name for site in layer.sites), spec)
    return ExpertPlan(groups=tuple(groups), specs=specs, stay=stay)


def _given_spec(spec: QuantSpec | None, layer: ExpertLayer) -> QuantSpec | None:
    if spec is not None and fitting(spec.granularity, layer.hidden, layer.inner) != spec.granularity:
        raise OptionError(
            f"--plan: blocks of {spec.label} don't divide the inputs of '{node_name(layer.sites[0])}', "
            f"{layer.hidden} and {layer.inner}; give them smaller ones."
        )
    return spec


def _cannot_run(layer: ExpertLayer, experts: ExpertFormat) -> str:
    """Return why QMoE doesn't run a node's experts as they are, in words; empty where it does.

    Args:
        layer: the node.
        experts: how the runtime's QMoE takes experts.
    """
    if layer.dtype == "bfloat16":
        return "QMoE of bfloat16 was not run"
    if layer.activation.kind == "swiglu" and layer.activation.gate != "interleaved":
        return "the CPU's QMoE wants gate and up interleaved (swiglu_fusion 1)"
    if not (layer.routing.over_chosen or experts.complete):
        return "its weights are a softmax over all experts, for which QMoE needs router weights (ONNX Runtime 1.31)"
    if layer.hidden % 2 or layer.inner % 2:
        return "its rows have an odd number of inputs"
    return ""


def _spec(layer: ExpertLayer, choice: FormatChoice, experts: ExpertFormat, *, eight: bool) -> QuantSpec:
    bits: Literal[4, 8] = 8 if eight else experts.bits
    return QuantSpec(
        bits=bits,
        symmetric=choice.symmetric or not experts.complete,
        granularity=fitting(choice.eight_bit if bits == 8 else choice.four_bit, layer.hidden, layer.inner),
        scale_dtype=choice.scale_dtype(layer.dtype),
    )


def fitting(wanted: Granularity, hidden: int, inner: int) -> Granularity:
    """Return the largest blocks up to ``wanted`` that divide both sizes, as QMoE needs them; else scales per channel.

    Args:
        wanted: what a MatMul would have.
        hidden: inputs of fc1.
        inner: inputs of fc2.
    """
    size = wanted.block_size if isinstance(wanted, PerBlock) else 0
    while size >= _SMALLEST_BLOCK and (hidden % size or inner % size):
        size //= 2
    return PerBlock(block_size=size) if size >= _SMALLEST_BLOCK else PerChannel()


def stored_bytes(out_features: int, in_features: int, spec: QuantSpec) -> int:
    """Return the bytes of one expert's matrix: each row's zero points begin with a new byte."""
    blocks = spec.num_blocks(in_features)
    zero_points = 0 if spec.symmetric else out_features * -(-blocks * spec.bits // 8)
    scales = out_features * blocks * torch_float(spec.scale_dtype).itemsize
    return out_features * in_features * spec.bits // 8 + scales + zero_points
