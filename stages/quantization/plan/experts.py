"""Plan the experts of MoE nodes: a QMoE node has one format, so a node's experts share theirs, or all stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

import onnx_ir as ir

from stages.errors import OptionError, UserError
from stages.model.sites import why_no_sites
from stages.quantization.checkpoints.imported import ImportedWeights
from stages.quantization.plan.rules import NamedSites, QuantPlan
from stages.quantization.targets.formats import ExpertFormat, FormatChoice
from stages.records.experts import ExpertLayer
from stages.records.formats import Granularity, PerBlock, PerChannel, QuantSpec, torch_float
from stages.records.sites import ActivationGroup, MatMulSite

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
    kept_because: str = "--plan: keep",
) -> ExpertPlan:
    """Decide about the experts of every MoE node.

    Args:
        model: tells why other MoE nodes' experts are none.
        layers: the nodes whose experts can be sites.
        choice: the formats, and whether the target runs QMoE.
        named: what a person's options say about sites.
        given: formats by ``node_name`` that a plan file or checkpoint decides about; None: they stay.
        kept_because: why those stay.

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
            reason = reason or kept_because
        eight = any(site.name in named.eight_bit for site in layer.sites)
        spec = None
        if choice.experts is not None and not reason:
            spec = _given_spec(given.get(name), layer, choice.experts) or _spec(
                layer, choice, choice.experts, eight=eight
            )
        if spec is None:
            stay |= dict.fromkeys((layer.fc1, layer.fc2), reason or _no_blocks(layer, choice))
            continue
        groups += layer.groups
        specs |= dict.fromkeys((site.name for site in layer.sites), spec)
    return ExpertPlan(groups=tuple(groups), specs=specs, stay=stay)


def runs_experts(layer: ExpertLayer, choice: FormatChoice) -> bool:
    """Return whether the target runs a node's experts as QMoE."""
    return choice.experts is not None and not _cannot_run(layer, choice.experts)


def import_experts(
    imported: ImportedWeights, layers: Sequence[ExpertLayer], experts: ExpertFormat
) -> tuple[ImportedWeights, dict[str, QuantSpec]]:
    """Give all experts of a node the one format that holds each of them exactly; return it by ``node_name``.

    Args:
        imported: of each expert's matrices, what the checkpoint has.
        layers: the nodes.
        experts: how the runtime's QMoE takes experts.

    Raises:
        UserError: a checkpoint has only some experts of a node, or in a form that QMoE doesn't take.
    """
    sites, formats = dict(imported.sites), dict[str, QuantSpec]()
    for layer in layers:
        found = [sites[site.name] for site in layer.sites if site.name in sites]
        if not found:
            continue
        name = node_name(layer.sites[0])
        where = f"--checkpoint {imported.checkpoint.folder}: '{name}'"
        if len(found) < len(layer.sites):
            raise UserError(
                f"{where} has codes for {len(found)} of {len(layer.sites)} matrices, and QMoE needs all; pass a "
                "checkpoint with all experts quantized."
            )
        formats[name] = _common_spec(where, layer, [each.spec for each in found], experts)
        sites |= {site.name: replace(sites[site.name], spec=formats[name]) for site in layer.sites}
    return replace(imported, sites=sites), formats


def _common_spec(where: str, layer: ExpertLayer, specs: Sequence[QuantSpec], experts: ExpertFormat) -> QuantSpec:
    symmetric = all(spec.symmetric for spec in specs)
    if not symmetric and not experts.zero_points:
        raise UserError(f"{where} has zero points, and {experts.whose} QMoE takes none; pass a symmetric checkpoint.")
    blocks = [spec.granularity.block_size for spec in specs if isinstance(spec.granularity, PerBlock)]
    wanted: Granularity = PerBlock(block_size=min(blocks)) if blocks else PerChannel()
    granularity = fitting(wanted, layer.hidden, layer.inner, experts)
    # Smaller blocks repeat a scale; larger ones, or one a row, can't hold several.
    if granularity is None or (
        blocks and not (isinstance(granularity, PerBlock) and granularity.block_size <= min(blocks))
    ):
        raise UserError(
            f"{where} shares scales among {min(blocks, default=layer.hidden)} inputs, and {experts.whose} QMoE takes "
            f"no such blocks of {layer.hidden} and {layer.inner} inputs; pass a checkpoint of another group size."
        )
    types = {spec.scale_dtype for spec in specs}
    return QuantSpec(
        bits=8 if any(spec.bits == 8 for spec in specs) else 4,
        symmetric=symmetric,
        granularity=granularity,
        scale_dtype=types.pop() if len(types) == 1 else layer.dtype,
    )


def _given_spec(spec: QuantSpec | None, layer: ExpertLayer, experts: ExpertFormat) -> QuantSpec | None:
    if spec is not None and fitting(spec.granularity, layer.hidden, layer.inner, experts) != spec.granularity:
        raise OptionError(
            f"--plan: {experts.whose} QMoE can't have blocks of {spec.label} with the inputs of "
            f"'{node_name(layer.sites[0])}', {layer.hidden} and {layer.inner}; give them others."
        )
    return spec


def _cannot_run(layer: ExpertLayer, experts: ExpertFormat) -> str:
    """Return why QMoE doesn't run a node's experts as they are, in words; empty where it does.

    Args:
        layer: the node.
        experts: how the runtime's QMoE takes experts.
    """
    whose, activation = experts.whose, layer.activation
    if layer.dtype not in experts.dtypes:
        return f"{whose} QMoE takes {' and '.join(sorted(experts.dtypes))} only"
    if activation.kind not in experts.activations:
        return f"{whose} QMoE runs {' and '.join(sorted(experts.activations))} only, not {activation.kind}"
    if activation.kind == "swiglu" and activation.gate != "interleaved":
        return "the CPU's QMoE, which checks what is written, wants gate and up interleaved (swiglu_fusion 1)"
    if not (layer.routing.over_chosen or experts.router_weights):
        return f"its weights are a softmax over all experts, for which {whose} QMoE has no input in this release"
    if experts.most is not None and layer.experts > experts.most:
        return f"{whose} QMoE chooses from {experts.most} experts at most"
    if any(size % experts.multiple for size in (layer.hidden, layer.inner)):
        return f"{whose} QMoE needs rows of a multiple of {experts.multiple} inputs"
    return ""


def _no_blocks(layer: ExpertLayer, choice: FormatChoice) -> str:
    assert choice.experts is not None, "without a format there is a reason"
    sizes = ", ".join(map(str, sorted(choice.experts.blocks)))
    return (
        f"{choice.experts.whose} QMoE takes blocks of {sizes} that divide its sizes, {layer.hidden} and {layer.inner}"
    )


def _spec(layer: ExpertLayer, choice: FormatChoice, experts: ExpertFormat, *, eight: bool) -> QuantSpec | None:
    bits: Literal[4, 8] = 8 if eight else experts.bits
    wanted = choice.eight_bit if bits == 8 else choice.four_bit
    granularity = fitting(wanted, layer.hidden, layer.inner, experts)
    if granularity is None:
        return None
    return QuantSpec(
        bits=bits,
        symmetric=choice.symmetric or not experts.zero_points,
        granularity=granularity,
        scale_dtype=choice.scale_dtype(layer.dtype),
    )


def fitting(wanted: Granularity, hidden: int, inner: int, experts: ExpertFormat) -> Granularity | None:
    """Return the largest blocks up to ``wanted`` that QMoE takes and that divide both sizes, as it needs them.

    Where there are none: scales per channel, the smallest larger blocks, or None where it takes neither.

    Args:
        wanted: what a MatMul would have.
        hidden: inputs of fc1.
        inner: inputs of fc2.
        experts: what QMoE takes.
    """
    most = wanted.block_size if isinstance(wanted, PerBlock) else 0
    sizes = [size for size in experts.blocks if not (hidden % size or inner % size)]
    if smaller := [size for size in sizes if size <= most]:
        return PerBlock(block_size=smaller[0])
    if experts.per_channel:
        return PerChannel()
    return PerBlock(block_size=sizes[-1]) if sizes else None


def stored_bytes(out_features: int, in_features: int, spec: QuantSpec) -> int:
    """Return the bytes of one expert's matrix: each row's zero points begin with a new byte."""
    blocks = spec.num_blocks(in_features)
    zero_points = 0 if spec.symmetric else out_features * -(-blocks * spec.bits // 8)
    scales = out_features * blocks * torch_float(spec.scale_dtype).itemsize
    return out_features * in_features * spec.bits // 8 + scales + zero_points
