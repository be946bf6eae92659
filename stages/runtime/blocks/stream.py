"""The residual stream: read what enters the first decoder block, and run windows of it through a block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from jaxtyping import Float
from torch import Tensor

from stages.model.directory import ModelDirectory
from stages.runtime.blocks.module import BlockModule, SiteRun
from stages.runtime.feeds import CausalFeeds
from stages.runtime.providers import CPU, ProviderChoice
from stages.runtime.tap import ActivationTap, open_value_tap


def in_batches(windows: int, batch_size: int) -> tuple[Tensor, ...]:
    """Return the indices of ``windows`` windows, ``batch_size`` at a time."""
    return torch.split(torch.arange(windows), batch_size)


def sizes_of_batches(calibration: int, held_out: int, batch_size: int) -> frozenset[int]:
    """Return how many windows can be in a batch of either part of the text, or of both together."""
    counts = (calibration, held_out, calibration + held_out)
    return frozenset(len(batch) for count in counts for batch in in_batches(count, batch_size))


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockInputs:
    """``stream`` enters the first block; ``shared`` holds masks, positions and the like by batch size and name."""

    stream: Float[Tensor, "windows length hidden"]
    shared: Mapping[int, Mapping[str, Tensor]]


def read_inputs(
    model: ir.Model,
    directory: ModelDirectory,
    tokens: np.ndarray,
    stream: str,
    shared: tuple[str, ...],
    batch_sizes: frozenset[int],
) -> BlockInputs:
    """Run the graph in front of the first block, on the CPU, over all ``tokens``; return floats as float32.

    Args:
        model: the whole graph.
        directory: where it lies.
        tokens: [windows, length].
        stream: the value that enters the first block.
        shared: the values that the blocks read beside it.
        batch_sizes: how many windows the blocks will be run on at a time.

    Raises:
        GraphError: ONNX Runtime can't run that part of the graph.
    """
    fed = {value.name for value in model.graph.inputs}
    computed = tuple(name for name in shared if name not in fed)
    choice = ProviderChoice(names=(CPU,), missing=())
    with open_value_tap(model, directory, (stream, *computed), choice, {}) as tap:
        size = _feeds(tap).window.batch or 1
        windows = [_run(tap, tokens[start : start + size])[stream] for start in range(0, len(tokens), size)]
        by_size = {size: _shared(tap, tokens[:1].repeat(size, axis=0), shared) for size in batch_sizes}
    return BlockInputs(stream=torch.cat(windows), shared=by_size)


def _shared(tap: ActivationTap, tokens: np.ndarray, names: tuple[str, ...]) -> dict[str, Tensor]:
    fed = {name: _as_float32(torch.from_numpy(array)) for name, array in _feeds(tap)(tokens).items() if name in names}
    return fed | {name: value for name, value in _run(tap, tokens).items() if name in names}


def _feeds(tap: ActivationTap) -> CausalFeeds:
    assert isinstance(tap.feeds, CausalFeeds), "it was opened for tokens"
    return tap.feeds


def _run(tap: ActivationTap, tokens: np.ndarray) -> dict[str, Tensor]:
    return {name: _as_float32(value.cpu()) for name, value in tap.run(tokens)}


def _as_float32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRunner:
    """A block's module with the values that it reads beside the stream, by batch size and name."""

    module: BlockModule
    shared: Mapping[int, Mapping[str, Tensor]]
    batch_size: int

    def __call__(
        self, stream: Float[Tensor, "batch length hidden"], weights: Mapping[str, Tensor]
    ) -> Float[Tensor, "batch length width"]:
        """Run some windows through the block, on their device, which must be the module's."""
        return self.module(stream, weights, self._shared_by(stream))

    @torch.no_grad()
    def read(
        self, stream: Float[Tensor, "batch length hidden"], weights: Mapping[str, Tensor], site: str
    ) -> Float[Tensor, "batch length K"]:
        """Return what a site reads.

        Args:
            stream: what enters the block.
            weights: of all the block's sites, by name.
            site: the name of the site.
        """
        return self.module.read(stream, weights, self._shared_by(stream), site)

    def with_sites(
        self, stream: Float[Tensor, "batch length hidden"], weights: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, SiteRun]]:
        """Return the stream behind the block, and what each site read and gave; gradients reach all of them."""
        return self.module.with_sites(stream, weights, self._shared_by(stream))

    def _shared_by(self, stream: Tensor) -> dict[str, Tensor]:
        return {name: value.to(stream.device) for name, value in self.shared[len(stream)].items()}

    @torch.no_grad()
    def over(
        self, stream: Float[Tensor, "windows length hidden"], weights: Mapping[str, Tensor]
    ) -> Float[Tensor, "windows length hidden"]:
        """Run all windows through the block, batch by batch; the result lies in the same memory as ``stream``."""
        device = next(iter(weights.values())).device
        behind = torch.empty_like(stream)
        for batch in in_batches(len(stream), self.batch_size):
            behind[batch] = self(stream[batch].to(device), weights).to(behind.device)
        return behind
