"""Divide activations by their AWQ input scales without a node, where the node before can be divided exactly.

x / s is folded into a norm's gain (and LayerNorm's bias), into the output channels of up_proj where x is
act(gate) * up or relu(up)^2 (then by sqrt(s)), or into v_proj's channels where x is attention's output. Wherever a
guard fails, one Mul by 1 / s is inserted and the reason kept (AWQ, Lin et al. 2023, section 3.2).

Requires the original sites still in place: run it before weights are replaced. Ensures that nothing but the sites of a
group sees another activation than before; a value cache then holds V divided by s, on the way in and out alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import onnx_ir as ir
import torch
from jaxtyping import Float32
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from export.divide import CannotFold, divided_matrix, divided_vector, leaves_range
from export.fold_guards import (
    LinearPath,
    before_cast,
    require_linear_in_value,
    require_path,
    require_power,
    require_producer,
    require_seen_only_by,
    untie_heads,
    value_reader,
)
from export.graph_edit import GraphEditor, called, name_of
from export.qdq import StoredSite, divided_scales
from stages.errors import RecipeError
from stages.finite import all_finite
from stages.records import ActivationGroup, LinearAbsorber, MatMulSite, NormAbsorber, ValueAbsorber, torch_float

How = Literal["none", "norm", "linear", "value", "mul"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldOutcome:
    """What became of one input scale; ``reason`` says why a Mul was needed and is empty otherwise."""

    activation: str
    sites: tuple[str, ...]
    how: How
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _Share:
    """The sites of a group that carry one and the same input scale [K] (None: no scale, or all ones)."""

    scale: Tensor | None
    sites: tuple[MatMulSite, ...]


@dataclass(frozen=True, slots=True)
class _Linear:
    """A linear layer that may take a scale into its output channels."""

    name: str
    node: ir.Node
    out_features: int


@dataclass(frozen=True, slots=True)
class InputScaleFolder:
    """Edits one graph, group after group; ``row_divisors`` ([N] float32 by site) then say how to write scales."""

    editor: GraphEditor
    stored: dict[str, StoredSite]
    """Every quantized site by name."""
    row_divisors: dict[str, Tensor] = field(default_factory=dict)

    def fold(self, group: ActivationGroup) -> list[FoldOutcome]:
        """Fold the group's input scale, or insert a Mul for every distinct one.

        Raises:
            RecipeError: a stored input scale isn't positive and finite.
        """
        shares = self._shares(group)
        scaled = [share for share in shares if share.scale is not None]
        if not scaled:
            return [_outcome(group, shares[0], "none")]
        try:
            if len(shares) > 1:
                raise CannotFold("its sites carry different input scales")
            return [_outcome(group, scaled[0], self._absorb(group, scaled[0]))]
        except CannotFold as refusal:
            return [self._multiply(group, share, str(refusal)) for share in scaled]

    def multiply(self, group: ActivationGroup) -> list[FoldOutcome]:
        """Insert a Mul for every distinct input scale of ``group``, as a recipe without folding asks."""
        shares = self._shares(group)
        scaled = [share for share in shares if share.scale is not None]
        reason = "the recipe keeps input scales as Mul nodes"
        return [self._multiply(group, share, reason) for share in scaled] or [_outcome(group, shares[0], "none")]

    def _shares(self, group: ActivationGroup) -> list[_Share]:
        shares: list[_Share] = []
        for site in group.sites:
            scale = _checked(self.stored[site.name].input_scale(), site)
            known = next((index for index, share in enumerate(shares) if _same(share.scale, scale)), None)
            if known is None:
                shares.append(_Share(scale, (site,)))
            else:
                shares[known] = _Share(scale, (*shares[known].sites, site))
        return shares

    def _multiply(self, group: ActivationGroup, share: _Share, reason: str) -> FoldOutcome:
        nodes = [self.editor.producer(site.output) for site in share.sites]
        activation = nodes[0].inputs[0]
        assert activation is not None
        assert share.scale is not None
        inverse = _reciprocal(share.scale, share.sites[0])
        name = f"{share.sites[0].name}/input_scale"
        value = self.editor.add_initializer(nodes[0], f"{name}/reciprocal", TorchTensor(inverse))
        scaled = self.editor.insert_before(
            nodes[0], "Mul", [activation, value], f"{name}/Mul", {}, partial(_like, activation)
        )
        for node in nodes:
            node.replace_input_with(0, scaled)
        return _outcome(group, share, "mul", reason)

    def _absorb(self, group: ActivationGroup, share: _Share) -> How:
        activation = self.editor.producer(share.sites[0].output).inputs[0]
        assert activation is not None
        assert share.scale is not None
        require_seen_only_by(share.sites, activation)
        match group.absorber:
            case None:
                raise CannotFold(group.unfoldable_because or "nothing before it can take a scale exactly")
            case NormAbsorber() as norm:
                self._into_norm(norm, activation, share.scale)
            case LinearAbsorber() as linear:
                self._into_linear(linear, activation, share.scale)
            case ValueAbsorber() as value:
                self._into_value(value, activation, share.scale)
        return group.absorber.kind

    def _into_norm(self, absorber: NormAbsorber, activation: ir.Value, scale: Float32[Tensor, " K"]) -> None:
        normed = before_cast(activation)
        node = normed.producer()
        if node is None or name_of(normed) != absorber.output or normed.index() != 0:
            raise CannotFold("the activation isn't the first output of the norm that was planned")
        slots = [index for index, value in enumerate(node.inputs) if value and value.name in absorber.parameters]
        if len(slots) != len(absorber.parameters):
            raise CannotFold(f"{called(node)} doesn't read the planned gain and bias once each")
        divided = [(index, divided_vector(node, index, scale)) for index in slots]
        for index, tensor in divided:
            self._replace(node, index, tensor)

    def _into_linear(self, absorber: LinearAbsorber, activation: ir.Value, scale: Float32[Tensor, " K"]) -> None:
        linear = self._linear(absorber.site)
        path = require_path(linear.node, require_power(activation, absorber.power), absorber.bias)
        if linear.out_features != scale.numel():
            raise CannotFold(f"{called(linear.node)} doesn't have one output channel for each scale")
        self._divide_outputs(linear, path, scale if absorber.power == 1 else scale.sqrt())

    def _into_value(self, absorber: ValueAbsorber, activation: ir.Value, scale: Float32[Tensor, " K"]) -> None:
        attention = require_producer(activation, "GroupQueryAttention", "MultiHeadAttention")
        linear = self._linear(absorber.site)
        path = require_path(linear.node, value_reader(attention), absorber.bias)
        require_linear_in_value(attention, path, absorber, linear.out_features)
        divisor = torch.ones(linear.out_features)
        divisor[absorber.first_channel :] = untie_heads(scale, absorber.heads)
        self._divide_outputs(linear, path, divisor)

    def _linear(self, name: str) -> _Linear:
        stored = self.stored.get(name)
        if stored is not None:
            return _Linear(name, self.editor.producer(stored.site.output), stored.site.out_features)
        node = self.editor.site_node(name)
        if node is None or node.op_type not in ("MatMul", "Gemm"):
            raise CannotFold(f"the linear layer '{name}' that should take the scale isn't in the graph")
        weight = node.inputs[1]
        if weight is None or not weight.is_initializer() or weight.shape is None:
            raise CannotFold(f"the weight of {called(node)} is not an initializer")
        return _Linear(name, node, int(weight.shape.numpy()[1 - node.attributes.get_int("transB", 0)]))

    def _divide_outputs(self, linear: _Linear, path: LinearPath, divisor: Float32[Tensor, " N"]) -> None:
        """Divide a linear layer's output channels: its bias now, a stored weight's scales when they are written."""
        edits = [(node, index, divided_vector(node, index, divisor)) for node, index in path.bias]
        if linear.name in self.stored:
            self._divide_rows(self.stored[linear.name], divisor)
        else:
            edits.append((linear.node, 1, divided_matrix(linear.node, divisor)))
        for node, index, tensor in edits:
            self._replace(node, index, tensor)

    def _divide_rows(self, stored: StoredSite, divisor: Float32[Tensor, " N"]) -> None:
        scales, name = stored.scales(), stored.site.name
        together = self.row_divisors.get(name, torch.ones_like(divisor)) * divisor
        if leaves_range(scales, divided_scales(scales, together)):
            raise CannotFold(f"the block scales of '{name}' would leave {stored.spec.scale_dtype}'s normal range")
        self.row_divisors[name] = together

    def _replace(self, node: ir.Node, index: int, tensor: ir.TensorProtocol) -> None:
        """A new initializer for this input alone: another reader of the old one never sees the change."""
        old = node.inputs[index]
        assert old is not None
        node.replace_input_with(index, self.editor.add_initializer(node, f"{old.name}/divided", tensor))


def _checked(scale: Tensor | None, site: MatMulSite) -> Tensor | None:
    """The scale in float32, or None where dividing by it changes nothing."""
    if scale is None:
        return None
    if scale.shape != (site.in_features,) or not all_finite(scale) or bool((scale <= 0).any()):
        raise RecipeError(
            f"The stored input scale of '{site.name}' is not {site.in_features} positive numbers; run stages.quantize "
            "again with --overwrite."
        )
    return None if bool((scale == 1).all()) else scale.float()


def _same(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return torch.equal(left, right)


def _reciprocal(scale: Float32[Tensor, " K"], site: MatMulSite) -> Tensor:
    inverse = (1 / scale).to(torch_float(site.dtype))
    if not all_finite(inverse) or bool((inverse == 0).any()):
        raise RecipeError(
            f"1 / input scale of '{site.name}' doesn't fit {site.dtype}; run stages.quantize again with --algo "
            "awq_clip, which needs no input scale."
        )
    return inverse


def _like(value: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, shape=value.shape, type=value.type)


def _outcome(group: ActivationGroup, share: _Share, how: How, reason: str = "") -> FoldOutcome:
    return FoldOutcome(
        activation=group.activation, sites=tuple(site.name for site in share.sites), how=how, reason=reason
    )
