"""Plan what a plan file or a checkpoint gives: formats that were chosen elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import onnx_ir as ir
import torch

from stages.commands.quantize_options import QuantizeConfig
from stages.errors import OptionError
from stages.model.weights import read_vector, read_weight
from stages.quantization.checkpoints.checkpoint import open_checkpoint
from stages.quantization.checkpoints.imported import (
    GraphWeights,
    ImportedWeights,
    WantedFormats,
    find_imported,
    split_groups,
)
from stages.quantization.plan.budget.candidates import SiteCandidates
from stages.quantization.plan.experts import import_experts, node_name, runs_experts
from stages.quantization.plan.plan_file import read_plan, spec_of
from stages.quantization.plan.requested import Chooser
from stages.quantization.plan.rules import QuantPlan, all_sites, asked_by_name, plan_of
from stages.quantization.targets.formats import FormatChoice
from stages.records.experts import ExpertLayer
from stages.records.formats import Granularity, PerBlock, QuantSpec
from stages.records.sites import ActivationGroup

_LEFT_IN_FLOAT = "--checkpoint leaves it in floating point"

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFormats:
    """The formats of sites, and where experts' were given those; ``candidates`` are left to a budget."""

    choice: FormatChoice
    sites: QuantPlan
    experts: Mapping[str, QuantSpec | None] = field(default_factory=lambda: MappingProxyType({}))
    """By node, where a file gives them; None: it stays as it is."""
    stays_because: str = "--plan: keep"
    """Why a node of ``experts`` stays as it is."""
    imported: ImportedWeights | None = None
    candidates: tuple[SiteCandidates, ...] = ()


def given_plan(
    config: QuantizeConfig, groups: tuple[ActivationGroup, ...], chooser: Chooser, layers: Sequence[ExpertLayer]
) -> PlannedFormats:
    """Return what ``--plan`` asks for: the file decides about formats, the target about the rest."""
    assert config.plan is not None
    sites, nodes = all_sites(groups), {node_name(layer.sites[0]): layer.sites[0] for layer in layers}
    planned = read_plan(config.plan, sites, nodes)
    asked = config.use_zero_point
    formats = {site.name: spec_of(planned[site.name], site, zero_point=asked) for site in sites}
    specs = {name: spec for name, spec in formats.items() if spec is not None}
    if not specs:
        raise OptionError(f"--plan {config.plan} keeps every MatMul of the model: nothing would be quantized.")
    skipped = {name: f"--plan {config.plan.name}: keep" for name in formats if name not in specs}
    choice = _choice_of_specs(chooser, tuple(specs.values()))
    specs = {name: replace(spec, scale_dtype=choice.scale_dtype(spec.scale_dtype)) for name, spec in specs.items()}
    given: dict[str, QuantSpec | None] = {}
    for name in nodes.keys() & planned.keys():
        spec = spec_of(planned[name], nodes[name], zero_point=asked)
        given[name] = None if spec is None else replace(spec, scale_dtype=choice.scale_dtype(spec.scale_dtype))
    return PlannedFormats(choice=choice, sites=plan_of(groups, specs, skipped), experts=given)


def imported_plan(
    config: QuantizeConfig,
    checkpoint: Path,
    model: ir.Model,
    groups: tuple[ActivationGroup, ...],
    chooser: Chooser,
    layers: Sequence[ExpertLayer],
) -> PlannedFormats:
    """Return what ``--checkpoint`` gives: its sites as they are there; others stay but for what options name."""
    choice, sites = chooser.choose(), all_sites(groups)
    mixtures = [layer for layer in layers if runs_experts(layer, choice)]
    imported = find_imported(
        open_checkpoint(checkpoint),
        [*groups, *(group for layer in mixtures for group in layer.groups)],
        GraphWeights(
            matrix=lambda site: read_weight(model, site, _CPU), vector=lambda name: read_vector(model, name, _CPU)
        ),
        WantedFormats(scale_dtype=choice.scale_dtype, eight_bit=choice.eight_bit),
    )
    asked = asked_by_name([site for site in sites if site.name not in imported.sites], config, choice)
    specs = {site.name: imported.sites[site.name].spec for site in sites if site.name in imported.sites} | asked
    skipped = {site.name: _LEFT_IN_FLOAT for site in sites if site.name not in specs}
    formats: dict[str, QuantSpec] = {}
    if choice.experts is not None:
        imported, formats = import_experts(imported, mixtures, choice.experts)
    given: dict[str, QuantSpec | None] = {
        node_name(layer.sites[0]): None for layer in layers if not asked_by_name(layer.sites, config, choice)
    }
    found = _choice_of_specs(_keeping_scales(chooser, choice), (*specs.values(), *formats.values()))
    plan = plan_of(groups, specs, skipped)
    return PlannedFormats(
        choice=found,
        sites=replace(plan, groups=tuple(split_groups(plan.groups, imported))),
        imported=imported,
        experts={**given, **formats},
        stays_because=_LEFT_IN_FLOAT,
    )


def _keeping_scales(chooser: Chooser, choice: FormatChoice) -> Chooser:
    """Return ``chooser`` without bytes for scales, which would move them, where nobody asked for bytes."""
    if chooser.requested.scale_type is not None or choice.scale_type != "bytes":
        return chooser
    return replace(chooser, requested=replace(chooser.requested, scale_type="narrow"))


def _choice_of_specs(chooser: Chooser, specs: tuple[QuantSpec, ...]) -> FormatChoice:
    """Return the choice for the commonest INT4 block, with what the target says against each of the formats."""
    sizes: list[int | None] = [each.block_size for each, _ in _commonest(specs, 4) if isinstance(each, PerBlock)]
    eight_bit: list[Granularity | None] = [each for each, _ in _commonest(specs, 8)]
    common = replace(chooser.requested, zero_point=not all(spec.symmetric for spec in specs))
    requested = [
        replace(common, block_size=size, eight_bit=granularity, named_eight_bit=granularity is not None)
        for size in sizes or [None]
        for granularity in eight_bit or [None]
    ]
    choices = [replace(chooser, requested=each).choose() for each in requested]
    warnings = dict.fromkeys(warning for choice in choices for warning in choice.warnings)
    return replace(choices[0], warnings=tuple(warnings))


def _commonest(specs: tuple[QuantSpec, ...], bits: int) -> list[tuple[Granularity, int]]:
    return Counter(spec.granularity for spec in specs if spec.bits == bits).most_common()
