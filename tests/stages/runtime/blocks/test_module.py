"""Cut blocks as torch modules: gradients reach every weight, and operators without a converter are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stages.errors import GraphError
from stages.runtime.blocks.cut import cut_block
from stages.runtime.blocks.module import BlockModule
from tests.stages.runtime.blocks.blocks import CPU, open_model


def test_gradients_reach_every_weight_as_differences_say(tiny_model: Path) -> None:
    """Central differences in float64 along a random direction of all weights at once."""
    opened = open_model(tiny_model)
    block = opened.blocks[0]
    module = BlockModule(cut_block(opened.model, block), CPU)
    generator = torch.Generator().manual_seed(0)
    stream = torch.randn(1, 6, 64, generator=generator)
    weights = {name: weight.requires_grad_() for name, weight in opened.weights(block).items()}
    module(stream, weights, {}).square().mean().backward()
    directions = {name: torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}
    for name, direction in directions.items():

        def loss(step: float, name: str = name, direction: torch.Tensor = direction) -> float:
            with torch.no_grad():
                moved = weights | {name: weights[name] + step * direction}
                return float(module(stream, moved, {}).square().mean().double())

        gradient = weights[name].grad
        assert gradient is not None
        slope = float((gradient * direction).sum())
        # Steps of 1e-3 cost 1e-6 of curvature and 1e-4 of float32's rounding of the loss.
        assert abs((loss(1e-3) - loss(-1e-3)) / 2e-3 - slope) < 2e-2 * abs(slope) + 2e-4, name


def test_an_operator_without_converter_is_named_with_its_layer(tiny_model: Path) -> None:
    opened = open_model(tiny_model)
    for node in opened.model.graph:
        if node.op_type == "Sigmoid":
            node.op_type = "Celestial"
    with pytest.raises(GraphError, match=r"Layer 1 can't become a torch module .*Celestial.*--algo"):
        BlockModule(cut_block(opened.model, opened.blocks[1]), CPU)
