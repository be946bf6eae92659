"""Forecast the size of a quantized model's files: to the byte for weights, a little too much for the graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from stages.model.directory import ModelDirectory
from stages.model.load import external_tensors
from stages.model.sites import find_embeddings, find_expert_layers, find_sites
from stages.model.weights import find_equal_initializers
from stages.quantization.plan.experts import stored_bytes as expert_bytes
from stages.quantization.plan.rules import QuantPlan, all_sites
from stages.quantization.targets.formats import FormatChoice
from stages.quantization.weights.byte_scales import has_byte_scales, saved_bytes, stored_bytes
from stages.quantization.weights.rotary import RotaryTables
from stages.records.formats import (
    EmbeddingPlan,
    EmbeddingTable,
    PerBlock,
    QuantSpec,
    WeightForm,
    channel_block_size,
    torch_float,
)
from stages.records.sites import MatMulSite

_GRAPH_BYTES = 700
"""A site's new nodes and initializers in the .onnx file, besides its names; about 300 were seen."""
_NAMES = 10
"""Times that a site's name stands in its new nodes, initializers and values; up to 8 were seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSize:
    """Bytes of the .onnx file and its external data, for a base model, the form of its weights and its embeddings."""

    base_bytes: int
    """The base's .onnx file and the tensors outside it."""
    form: WeightForm
    embeddings: tuple[EmbeddingPlan, ...]
    rotary: tuple[RotaryTables, ...] = ()
    """Tables that nodes compute."""
    byte_scales: bool = False
    """Whether scales are bytes where they may be."""
    copied_bytes: int = 0
    """Of initializers that hold the same as others, and are stored once."""

    def total_bytes(self, sites: Sequence[MatMulSite], specs: Mapping[str, QuantSpec]) -> int:
        """Return the bytes of the whole model, whose ``sites`` have the formats in ``specs`` or stay as they are."""
        return self.fixed_bytes(sites) + sum(self.site_bytes(site, specs.get(site.name)) for site in sites)

    def fixed_bytes(self, sites: Sequence[MatMulSite]) -> int:
        """Return the bytes of everything but what ``site_bytes`` counts for ``sites``."""
        freed = sum(weight_bytes(site) for site in sites if self._frees_its_weight(site))
        tables = sum(table_bytes(plan.table, plan) for plan in self.embeddings)
        read_by_sites = {site.weight for site in sites}
        gone = sum(table_bytes(plan.table, None) for plan in self.embeddings if plan.table.weight not in read_by_sites)
        computed = sum(pair.saved_bytes for pair in self.rotary)
        return self.base_bytes - freed + tables - gone - computed - self.copied_bytes

    def site_bytes(self, site: MatMulSite, spec: QuantSpec | None) -> int:
        """Return the bytes of ``site``: its weight where it stays (None), or codes, scales, zero points and nodes."""
        if spec is None:
            return weight_bytes(site) if self._frees_its_weight(site) else 0
        if site.expert is not None:
            stored = expert_bytes(site.out_features, site.in_features, spec)
            return stored if site.expert.index else stored + _GRAPH_BYTES
        # An input scale that can't be folded becomes a vector and a Mul.
        scale = site.in_features * torch_float(site.dtype).itemsize
        looked_up = any(plan.shared_with == site.name for plan in self.embeddings)
        form = WeightForm.MATMUL_NBITS if looked_up else self.form
        weight = file_bytes(site, spec, form, byte_scales=self.byte_scales)
        return weight + scale + _GRAPH_BYTES + _NAMES * len(site.name)

    def number_bytes(self, site: MatMulSite, spec: QuantSpec | None) -> int:
        """Return the bytes of a site's codes, scales and zero points; 0 where it stays as it is."""
        if spec is None:
            return 0
        if site.expert is not None:
            return expert_bytes(site.out_features, site.in_features, spec)
        return stored_bytes(site, spec, self.form, byte_scales=self.byte_scales)

    def bits_per_weight(self, plan: QuantPlan) -> float:
        """Return the bits of codes, scales and zero points, over the weights of the sites to quantize."""
        sites = all_sites(plan.groups)
        stored = sum(self.number_bytes(site, plan.specs[site.name]) for site in sites)
        return 8 * stored / sum(site.in_features * site.out_features for site in sites)

    def _frees_its_weight(self, site: MatMulSite) -> bool:
        """Return whether no other site and no lookup that stays needs the weight once the site has its codes."""
        looked_up = {gather for plan in self.embeddings for gather in plan.table.gathers}
        return set(site.weight_shared_with) <= looked_up


def output_size(
    directory: ModelDirectory,
    model: ir.Model,
    choice: FormatChoice,
    embeddings: tuple[EmbeddingPlan, ...],
    rotary: tuple[RotaryTables, ...],
) -> OutputSize:
    """Return the sizes that outputs of ``model`` will have.

    Args:
        directory: where ``model`` lies.
        model: the base model.
        choice: the form of the quantized weights, and the type of their scales.
        embeddings: those that are quantized too.
        rotary: tables that the output computes.
    """
    outside = sum(tensor.nbytes for tensor in external_tensors(model))
    base_bytes = directory.onnx_file.stat().st_size + outside
    return OutputSize(
        base_bytes=base_bytes,
        form=choice.form,
        embeddings=embeddings,
        rotary=rotary,
        byte_scales=choice.scale_type == "bytes",
        copied_bytes=_copied_bytes(model, {str(table.name) for pair in rotary for table in (pair.cosines, pair.sines)}),
    )


def _copied_bytes(model: ir.Model, computed: Collection[str]) -> int:
    """Return the bytes of what equals another initializer, apart from weights, embeddings and tables that are computed.

    Weights that stay in floating point may be stored once too; that is not forecast.
    """
    counted = {site.weight for site in find_sites(model)} | {table.weight for table in find_embeddings(model)}
    experts = {name for layer in find_expert_layers(model) for name in (layer.fc1, layer.fc2)}
    equal = find_equal_initializers(model, counted | experts | set(computed))
    copies = [value.const_value for values in equal for value in values[1:]]
    return sum(0 if tensor is None else tensor.nbytes for tensor in copies)


def weight_bytes(site: MatMulSite) -> int:
    """Return the bytes of the site's floating-point weight as the base stores it."""
    return site.in_features * site.out_features * torch_float(site.stored_dtype or site.dtype).itemsize


def file_bytes(site: MatMulSite, spec: QuantSpec, form: WeightForm, *, byte_scales: bool = False) -> int:
    """Return the bytes in the weight's place: codes or, before a QuantizeLinear, numbers; scales and zero points.

    Args:
        site: the site whose weight it is.
        spec: its number format.
        form: the nodes before the MatMul.
        byte_scales: whether scales are bytes where they may be.
    """
    if byte_scales and has_byte_scales(site, spec, form):
        return file_bytes(site, spec, form) - saved_bytes(site, spec)
    if form is WeightForm.QDQ:
        codes = -(-site.in_features * site.out_features * spec.bits // 8)
        numbers = site.in_features * site.out_features * torch_float(site.dtype).itemsize
        return numbers + spec.format_bytes(site.out_features, site.in_features) - codes
    if form is not WeightForm.MATMUL_NBITS:
        return spec.format_bytes(site.out_features, site.in_features)
    # MatMulNBits fills up a row's last block, begins each row's zero points with a new byte, and knows only blocks.
    size = (
        spec.granularity.block_size if isinstance(spec.granularity, PerBlock) else channel_block_size(site.in_features)
    )
    blocks = -(-site.in_features // size)
    zero_points = 0 if spec.symmetric else -(-blocks * spec.bits // 8)
    scales = blocks * torch_float(spec.scale_dtype).itemsize
    return site.out_features * (blocks * size * spec.bits // 8 + zero_points + scales)


def table_bytes(table: EmbeddingTable, plan: EmbeddingPlan | None) -> int:
    """Return the bytes of an embedding: its numbers where it stays (None), or what it adds to a model."""
    if plan is None:
        return table.vocabulary * table.hidden * torch_float(table.dtype).itemsize
    return plan.own_bytes + _GRAPH_BYTES
