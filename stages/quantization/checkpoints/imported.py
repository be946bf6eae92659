"""Take a graph's quantized weights from a checkpoint: which sites it has, in which format, and that they fit."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from stages.errors import UserError
from stages.quantization.checkpoints.checkpoint import LayerWeight, Place, QuantizedCheckpoint
from stages.quantization.checkpoints.matching import Piece, find_pieces, strays
from stages.quantization.checkpoints.scales_within import (
    WeightPair,
    column_scales,
    differ,
    relative_error,
    row_scales,
    scale_of_norm,
)
from stages.records.formats import Granularity, PerBlock, QuantSpec, torch_float
from stages.records.quantities import counted
from stages.records.results import QuantizedWeight, SiteReport, SolvedGroup
from stages.records.sites import Absorber, ActivationGroup, FloatName, MatMulSite, NormAbsorber, expert_of, layer_of

_LOGGER = logging.getLogger(__name__)
_LARGEST_ERROR = 0.35
"""Of a weight, relative: four bits leave about a tenth, rows of another model more than 1."""
_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphWeights:
    """Reads the base's floating-point numbers."""

    matrix: Callable[[MatMulSite], Tensor]
    """Gives [N, K] float32."""
    vector: Callable[[str], Tensor]
    """Gives an initializer [K] by its name, float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedFormats:
    """What the target decides about weights whose codes are given."""

    scale_dtype: Callable[[FloatName], FloatName]
    """Type of stored scales by that of the graph, where it holds them exactly."""
    eight_bit: Granularity
    """Of INT8 with one scale a row; of INT4 those become blocks of 128 with one scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedSite:
    """Where a site's codes lie in the checkpoint, and what they are."""

    spec: QuantSpec
    turns: tuple[tuple[Piece, ...], ...]
    """Rows one after the other; two where they take turns, as gate and up in an expert's first matrix may."""
    error: float
    """Relative, of the weight that the codes stand for, without rows that were lost."""
    is_exact: bool
    """Whether the spec's type holds all scales as they are."""
    input_scale: Tensor | None
    """[K], what the checkpoint's norm before it was divided by; None where that is the base's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedWeights:
    """The sites of a graph that a checkpoint has codes for."""

    checkpoint: QuantizedCheckpoint
    sites: Mapping[str, ImportedSite]
    """By name."""

    @property
    def title(self) -> str:
        """Name what made the weights."""
        return f"{self.checkpoint.method} checkpoint"

    def solved(self, group: ActivationGroup) -> SolvedGroup | None:
        """Return the weights of a group, read now; None where the checkpoint doesn't have them."""
        if not all(site.name in self.sites for site in group.sites):
            return None
        weights = tuple(self._read(site) for site in group.sites)
        return SolvedGroup(group=group, weights=weights, reports=tuple(self._report(site) for site in group.sites))

    def _read(self, site: MatMulSite) -> QuantizedWeight:
        found = self.sites[site.name]
        spec = found.spec
        turns = [[_cut(self.checkpoint.read(piece.module), piece) for piece in pieces] for pieces in found.turns]

        def rows(read: Callable[[LayerWeight], Tensor]) -> Tensor:
            return _in_turn([torch.cat([read(part) for part in parts]) for parts in turns])

        codes = rows(lambda part: part.packed.codes)
        if spec.symmetric:
            codes = rows(lambda part: part.packed.codes.to(torch.int16) - _centre(part)).to(torch.int8)
        return QuantizedWeight(
            site=site,
            spec=spec,
            codes=codes,
            scales=rows(lambda part: _spread(part, part.packed.scales, spec)).to(torch_float(spec.scale_dtype)),
            zero_points=None if spec.symmetric else rows(lambda part: _spread(part, part.packed.zero_points, spec)),
            input_scale=found.input_scale,
        )

    def _report(self, site: MatMulSite) -> SiteReport:
        found = self.sites[site.name]
        return SiteReport(
            site=site.name,
            algorithm=self.title,
            format=found.spec.label,
            bytes=found.spec.format_bytes(site.out_features, site.in_features),
            note=f"relative error of the weight {found.error:.3f}",
        )


def find_imported(
    checkpoint: QuantizedCheckpoint, groups: Sequence[ActivationGroup], graph: GraphWeights, wanted: WantedFormats
) -> ImportedWeights:
    """Find every site of ``groups`` that ``checkpoint`` has codes for.

    Args:
        checkpoint: quantized from the model that the graph was built from.
        groups: all sites of the graph, in its order.
        graph: their weights.
        wanted: what is left to decide about formats.

    Raises:
        UserError: the checkpoint is another model's, or can't be taken over as it is.
    """
    finder = _Finder(checkpoint=checkpoint, graph=graph, wanted=wanted)
    for group in groups:
        finder.find(group)
    finder.require_balance(groups)
    finder.require_used()
    if inexact := [name for name, site in finder.sites.items() if not site.is_exact]:
        _LOGGER.warning(
            "%s: the base's type doesn't hold the checkpoint's scales of %s, which are rounded to it; a base in fp32 "
            "keeps them.",
            inexact[0],
            counted(len(inexact), "site"),
        )
    return ImportedWeights(checkpoint=checkpoint, sites=finder.sites)


@dataclass(slots=True, kw_only=True)
class _Finder:
    """Goes through a graph layer by layer, with the checkpoint's layer at hand."""

    checkpoint: QuantizedCheckpoint
    graph: GraphWeights
    wanted: WantedFormats
    sites: dict[str, ImportedSite] = field(default_factory=dict)
    unfound: set[tuple[Place, int]] = field(default_factory=set)
    """(place, K) of sites that the checkpoint has nothing for."""
    shapes: dict[str, int] = field(default_factory=dict)
    """K of every layer of the checkpoint that was read."""
    scaled_inputs: set[str] = field(default_factory=set)
    """Activations without a norm whose sites' columns were multiplied."""
    scaled_rows: set[str] = field(default_factory=set)
    """Sites whose rows were multiplied."""
    _place: Place = (-1, None)
    _modules: dict[str, LayerWeight] = field(default_factory=dict)

    def find(self, group: ActivationGroup) -> None:
        """Find the sites of ``group`` and what scales them."""
        expert = expert_of(group.sites[0].name)
        self._open((layer_of(group.sites[0].name), None if expert is None else expert[1]))
        fitting = {name: each for name, each in self._modules.items() if each.packed.shape[1] == group.in_features}
        floats = {name: each.packed.floats(each.block_size) for name, each in fitting.items()}
        found = dict[str, tuple[tuple[Piece, ...], ...]]()
        pairs = dict[str, WeightPair]()
        for site in group.sites:
            weight = self.graph.matrix(site)
            turns = _find_turns(site, weight, floats)
            if not turns:
                self.unfound.add((self._place, group.in_features))
                continue
            found[site.name] = turns
            stored = _in_turn(
                [torch.cat([floats[piece.module][piece.first : piece.last] for piece in pieces]) for pieces in turns]
            )
            pairs[site.name] = _paired(site, weight, stored)
        if not pairs:
            return
        columns = self._columns(group, list(pairs.values()))
        for name, pair in pairs.items():
            error = self._checked_error(name, pair, columns)
            parts = [_cut(self._modules[piece.module], piece) for pieces in found[name] for piece in pieces]
            site = next(each for each in group.sites if each.name == name)
            spec, is_exact = self._spec(site, parts)
            is_scaled = isinstance(group.absorber, NormAbsorber) and bool((columns != 1).any())
            self.sites[name] = ImportedSite(
                spec=spec,
                turns=found[name],
                error=error,
                is_exact=is_exact,
                input_scale=columns if is_scaled else None,
            )

    def require_balance(self, groups: Sequence[ActivationGroup]) -> None:
        """Raise UserError unless what multiplied columns of one layer was taken from the rows of another."""
        undone = set[str]()
        for group in groups:
            if group.activation not in self.scaled_inputs:
                continue
            absorber = group.absorber
            before = None if absorber is None or isinstance(absorber, NormAbsorber) else absorber
            if before is None or before.site not in self.sites:
                raise self._refused(
                    f"has the inputs of {group.sites[0].name} multiplied, and nothing here that undoes it"
                )
            if before.bias is not None:
                raise self._refused(f"has the outputs of {before.site} divided, whose bias the graph keeps")
            undone.add(before.site)
        if rest := sorted(self.scaled_rows - undone):
            raise self._refused(f"has the outputs of {rest[0]} multiplied, and nothing behind it undoes it")

    def require_used(self) -> None:
        """Raise UserError where the checkpoint has a layer that fits no weight although one is missing."""
        used = {piece.module for site in self.sites.values() for pieces in site.turns for piece in pieces}
        unused = [module for module in self.checkpoint.modules if module not in used]
        if not self.sites:
            raise self._other_model(unused[0])
        for module in unused:
            if module in self.shapes and any(
                self.shapes[module] == width and module in self.checkpoint.modules_of(place)
                for place, width in self.unfound
            ):
                raise self._other_model(module)
        if unused:
            _LOGGER.warning(
                "%s of the checkpoint belong to no MatMul of the base and stay out: %s.",
                counted(len(unused), "layer"),
                ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else ""),
            )

    def _open(self, place: Place) -> None:
        if place == self._place:
            return
        self._place = place
        self._modules = {module: self.checkpoint.read(module) for module in self.checkpoint.modules_of(place)}
        self.shapes |= {module: each.packed.shape[1] for module, each in self._modules.items()}

    def _columns(self, group: ActivationGroup, pairs: Sequence[WeightPair]) -> Tensor:
        """Return what multiplied the columns of a group's weights; ones where nothing did."""
        has_norm = isinstance(group.absorber, NormAbsorber)
        columns = column_scales(pairs, by_direction=has_norm)
        if isinstance(group.absorber, NormAbsorber):
            gain = self.graph.vector(group.absorber.parameters[0])
            exact = scale_of_norm(gain, self.checkpoint.vectors(self._place[0], group.in_features), columns)
            if exact is not None:
                return exact
            if differ(columns):
                raise self._refused(
                    f"has the inputs of {group.sites[0].name} multiplied, and no norm that was divided by the same"
                )
        elif differ(columns):
            self.scaled_inputs.add(group.activation)
            return columns
        return torch.ones_like(columns)

    def _checked_error(self, name: str, pair: WeightPair, columns: Tensor) -> float:
        rows = row_scales(pair, columns)
        if differ(rows):
            self.scaled_rows.add(name)
        else:
            rows = torch.ones_like(rows)
        error = relative_error(pair, rows, columns)
        if not error < _LARGEST_ERROR:
            raise UserError(
                f"--checkpoint {self.checkpoint.folder} holds other weights than the base ({name} is off by "
                f"{error:.0%}); pass the base that was built from the same model."
            )
        return error

    def _spec(self, site: MatMulSite, parts: Sequence[LayerWeight]) -> tuple[QuantSpec, bool]:
        """Return the format that holds all of a site's parts exactly, and whether its scales do, too."""
        bits: Literal[4, 8] = 8 if any(part.packed.bits == 8 for part in parts) else 4
        kinds = (self.wanted.scale_dtype(site.dtype), site.dtype)
        holding = [kind for kind in kinds if all(_holds(kind, part.packed.scales) for part in parts)]
        spec = QuantSpec(
            bits=bits,
            symmetric=all(part.packed.is_symmetric for part in parts),
            granularity=self._granularity(site, bits, [part.block_size for part in parts]),
            scale_dtype=holding[0] if holding else site.dtype,
        )
        return spec, bool(holding)

    def _granularity(self, site: MatMulSite, bits: int, sizes: Sequence[int]) -> Granularity:
        inner = [size for size in sizes if size < site.in_features]
        if not inner:
            return self.wanted.eight_bit if bits == 8 else PerBlock(block_size=128)
        common = math.gcd(*inner)
        block = min(common & -common, _LARGEST_BLOCK)
        if block < _SMALLEST_BLOCK:
            raise self._refused(
                f"shares scales among {common} inputs in {site.name}, and ONNX Runtime takes multiples of "
                f"{_SMALLEST_BLOCK}: quantize it with a group size of 128 or 32"
            )
        return PerBlock(block_size=block)

    def _refused(self, why: str) -> UserError:
        return UserError(f"--checkpoint {self.checkpoint.folder} {why}; pass another checkpoint of this model.")

    def _other_model(self, module: str) -> UserError:
        return UserError(
            f"--checkpoint {self.checkpoint.folder} is not of the base's model: '{module}' is near none of the base's "
            "weights; pass the base that was built from the same model."
        )


def _find_turns(site: MatMulSite, weight: Tensor, modules: Mapping[str, Tensor]) -> tuple[tuple[Piece, ...], ...]:
    """Return the pieces of ``weight`` [N, K], or of its even and odd rows; none where there are none."""
    whole = find_pieces(weight, modules)
    if whole is not None:
        return (whole,)
    if site.expert is None or site.expert.projection == "fc2":
        return ()
    turns = [find_pieces(weight[row::2], modules) for row in range(2)]
    return tuple(pieces for pieces in turns if pieces is not None) if None not in turns else ()


def _paired(site: MatMulSite, weight: Tensor, stored: Tensor) -> WeightPair:
    """Return two weights [N, K] without the rows that ``stored`` has lost; log a warning of those."""
    lost = strays(weight, stored)
    if count := int(lost.sum()):
        _LOGGER.warning(
            "%s: %s of the checkpoint's %d point elsewhere than the base's; whatever made it lost them.",
            site.name,
            counted(count, "row"),
            len(stored),
        )
    return WeightPair(base=weight[~lost], stored=stored[~lost])


def _in_turn(parts: Sequence[Tensor]) -> Tensor:
    """Return the rows of [N, columns] each, in turn."""
    return torch.stack(list(parts), dim=1).flatten(0, 1)


def split_groups(groups: Sequence[ActivationGroup], imported: ImportedWeights) -> Iterator[ActivationGroup]:
    """Yield groups whose sites are all imported, or all not; no scale folds into an imported site any more."""
    for group in groups:
        given = tuple(site for site in group.sites if site.name in imported.sites)
        others = tuple(site for site in group.sites if site.name not in imported.sites)
        absorber, why = group.absorber, group.unfoldable_because
        if given and others:
            absorber, why = None, f"{given[0].name} reads it too and has codes already"
        if given:
            yield _part(group, given, absorber, why)
        if others:
            before = None if absorber is None or isinstance(absorber, NormAbsorber) else absorber.site
            if before in imported.sites:
                absorber, why = None, f"{before} has codes already"
            yield _part(group, others, absorber, why)


def _part(
    group: ActivationGroup, sites: tuple[MatMulSite, ...], absorber: Absorber | None, why: str
) -> ActivationGroup:
    return replace(group, sites=sites, absorber=absorber, unfoldable_because=why)


def _cut(layer: LayerWeight, piece: Piece) -> LayerWeight:
    return LayerWeight(packed=layer.packed.rows(piece.first, piece.last), block_size=layer.block_size)


def _centre(part: LayerWeight) -> int:
    return 1 << (part.packed.bits - 1)


def _spread(part: LayerWeight, parameters: Tensor, spec: QuantSpec) -> Tensor:
    """Return one scale or zero point for each block of ``spec``, which lies within a block of ``part``."""
    inputs = part.packed.shape[1]
    starts = torch.arange(spec.num_blocks(inputs)) * spec.block_size(inputs)
    return parameters[:, starts // part.block_size]


def _holds(kind: FloatName, scales: Tensor) -> bool:
    return torch.equal(scales.to(torch_float(kind)).double(), scales.double())
