"""Fold AWQ input scales into the graph: divide the node before an activation, where that can be done exactly.

x / s is folded into a norm's gain (and LayerNorm's bias), into the output channels of up_proj where x is
act(gate) * up or relu(up)^2 (then by sqrt(s)), or into v_proj's channels where x is attention's output. Wherever a
guard fails, one Mul by 1 / s is inserted and the reason kept (AWQ, Lin et al. 2023, section 3.2).

Requires the original sites still in place: run it before weights are replaced. Ensures that nothing but the sites of a
group sees another activation than before; a value cache then holds V divided by s, on the way in and out alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import onnx_ir as ir
import torch
from jaxtyping import Float32
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from export.fold_guards import (
    CannotFold,
    divided_matrix,
    divided_vector,
    leaves_range,
    places_of,
    require_as_planned,
    require_own_cache,
    require_seen_only_by,
    scale_per_value_channel,
)
from export.forms.dequantize_linear import StoredSite, divided_scales
from export.graph_edit import GraphEditor
from stages.errors import OptionError
from stages.model.patterns import name_of
from stages.model.weights import all_finite
from stages.records.formats import torch_float
from stages.records.sites import ActivationGroup, LinearAbsorber, MatMulSite, NormAbsorber, ValueAbsorber

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
class InputScaleFolder:
    """Edits one graph, group after group; ``row_divisors`` ([N] float32 by site) then say how to write scales."""

    editor: GraphEditor
    stored: Mapping[str, StoredSite]
    """Every quantized site by name."""
    sites: Mapping[str, MatMulSite]
    """Every site of the graph by its output, quantized or not."""
    row_divisors: dict[str, Tensor] = field(default_factory=dict)

    def fold(self, group: ActivationGroup) -> list[FoldOutcome]:
        """Fold the group's input scale, or insert a Mul for every distinct one.

        Raises:
            OptionError: a stored input scale isn't positive and finite.
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
            nodes[0], "Mul", [activation, value], f"{name}/Mul", {}, shape=activation.shape, kind=activation.type
        )
        for node in nodes:
            node.replace_input_with(0, scaled)
        return _outcome(group, share, "mul", reason)

    def _absorb(self, group: ActivationGroup, share: _Share) -> How:
        activation = self.editor.producer(share.sites[0].output).inputs[0]
        assert activation is not None
        assert share.scale is not None
        require_seen_only_by(share.sites, activation)
        if group.absorber is None:
            raise CannotFold(group.unfoldable_because or "nothing before it can take a scale exactly")
        require_as_planned(group, activation, self.sites)
        match group.absorber:
            case NormAbsorber() as norm:
                self._into_norm(norm, share.scale)
            case LinearAbsorber() as linear:
                self._divide_outputs(linear, share.scale if linear.power == 1 else share.scale.sqrt())
            case ValueAbsorber() as value:
                self._into_value(value, self.editor.producer(name_of(activation)), share.scale)
        return group.absorber.kind

    def _into_norm(self, absorber: NormAbsorber, scale: Float32[Tensor, " K"]) -> None:
        places = places_of(absorber.parameters, [self.editor.producer(absorber.output)])
        divided = [(node, index, divided_vector(node, index, scale)) for node, index in places]
        for node, index, tensor in divided:
            self._replace(node, index, tensor)

    def _into_value(self, absorber: ValueAbsorber, attention: ir.Node, scale: Float32[Tensor, " K"]) -> None:
        require_own_cache(attention)
        heads = absorber.heads
        divisor = torch.ones(absorber.first_channel + heads.kv_heads * heads.head_size)
        divisor[absorber.first_channel :] = scale_per_value_channel(scale, heads)
        self._divide_outputs(absorber, divisor)

    def _divide_outputs(self, absorber: LinearAbsorber | ValueAbsorber, divisor: Float32[Tensor, " N"]) -> None:
        """Divide a linear layer's output channels: its bias now, a stored weight's scales when they are written."""
        linear = next(self.editor.producer(site.output) for site in self.sites.values() if site.name == absorber.site)
        bias = () if absorber.bias is None else (absorber.bias,)
        places = places_of(bias, [linear, *linear.outputs[0].consumers()])
        edits = [(node, index, divided_vector(node, index, divisor)) for node, index in places]
        if absorber.site in self.stored:
            self._divide_rows(self.stored[absorber.site], divisor)
        else:
            edits.append((linear, 1, divided_matrix(linear, divisor)))
        for node, index, tensor in edits:
            self._replace(node, index, tensor)

    def _divide_rows(self, stored: StoredSite, divisor: Float32[Tensor, " N"]) -> None:
        scales, name = stored.scales(), stored.site.name
        together = self.row_divisors.get(name, torch.ones_like(divisor)) * divisor
        divided = divided_scales(scales, together)
        # Scales that are widened come near 0 only where the others' errors are far larger.
        is_bad = (
            leaves_range(scales, divided) if stored.spec.scale_dtype == stored.site.dtype else not all_finite(divided)
        )
        if is_bad:
            raise CannotFold(f"the block scales of '{name}' would leave {stored.spec.scale_dtype}'s normal range")
        self.row_divisors[name] = together

    def _replace(self, node: ir.Node, index: int, tensor: ir.TensorProtocol) -> None:
        """Give this input an initializer of its own: another reader of the old one never sees the change."""
        old = node.inputs[index]
        assert old is not None
        node.replace_input_with(index, self.editor.add_initializer(node, f"{old.name}/divided", tensor))


def _checked(scale: Tensor | None, site: MatMulSite) -> Tensor | None:
    """Return the scale in float32, or None where dividing by it changes nothing."""
    if scale is None:
        return None
    if scale.shape != (site.in_features,) or not all_finite(scale) or bool((scale <= 0).any()):
        raise OptionError(
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
        raise OptionError(
            f"1 / input scale of '{site.name}' doesn't fit {site.dtype}; run stages.quantize again with --algo "
            "awq_clip, which needs no input scale."
        )
    return inverse


def _outcome(group: ActivationGroup, share: _Share, how: How, reason: str = "") -> FoldOutcome:
    return FoldOutcome(
        activation=group.activation, sites=tuple(site.name for site in share.sites), how=how, reason=reason
    )
