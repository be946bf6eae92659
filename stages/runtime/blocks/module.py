"""Run a cut block as a torch module: a function of the residual stream, the shared values and the sites' weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import onnx_ir as ir
import torch
from jaxtyping import Float
from torch import Tensor

from stages.errors import GraphError
from stages.runtime.blocks.converters.layers import Linear
from stages.runtime.blocks.converters.onnx2torch import import_onnx2torch
from stages.runtime.blocks.converters.register import register_converters
from stages.runtime.blocks.cut import WITHOUT_BLOCKS, BlockGraph, DecoderBlock

_TOKENS = 3
"""Input of an expert's projection that says where its rows lie in the batch."""


class _Reached(Exception):
    """Ends a run of a block at the site whose input is wanted."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteRun:
    """What a site read and gave in one run of a block: [batch, length, K] and [batch, length, N].

    An expert reads only some tokens: [n, K] and [n, N].
    """

    read: Tensor
    gave: Tensor
    tokens: Tensor | None = None
    """Where the rows of an expert lie among the batch * length tokens, [n]."""


class BlockModule:
    """Runs one block in float32 on ``device``; holds its small parameters and none of its sites' weights."""

    def __init__(self, graph: BlockGraph, device: torch.device) -> None:
        """Convert ``graph`` with onnx2torch.

        Raises:
            GraphError: an operator has no torch converter.
            UserError: onnx2torch isn't installed.
        """
        register_converters()
        try:
            module = import_onnx2torch().convert(ir.to_proto(graph.model))
        except NotImplementedError as error:
            raise GraphError(f"{graph.block.title} can't become a torch module ({error}); {WITHOUT_BLOCKS}") from error
        self.block: DecoderBlock = graph.block
        self.shared = graph.shared
        self._weights = tuple(str(value.name) for value in graph.model.graph.inputs[1 + len(graph.shared) :])
        self._module = module.to(device).requires_grad_(False)

    def __call__(
        self,
        stream: Float[Tensor, "batch length hidden"],
        weights: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
    ) -> Float[Tensor, "batch length width"]:
        """Return the stream behind the block, or the head's logits; gradients reach both the stream and the weights.

        Args:
            stream: what enters the block.
            weights: [N, K] float32, by site name.
            shared: the values of ``self.shared`` for this batch size, by name.
        """
        others = [shared[name] for name in self.shared]
        behind: Tensor = self._module(stream, *others, *(weights[name] for name in self._weights))
        return behind

    def with_sites(
        self,
        stream: Float[Tensor, "batch length hidden"],
        weights: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
    ) -> tuple[Tensor, dict[str, SiteRun]]:
        """Return the stream behind the block, and what each site read and gave, by its name.

        Experts that no token of the batch goes to are missing.

        Args:
            stream: what enters the block.
            weights: [N, K] float32, by site name.
            shared: the values of ``self.shared`` for this batch size, by name.
        """
        names = {id(weights[site.name]): site.name for site in self.block.sites}
        runs: dict[str, SiteRun] = {}

        def note(_: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            tokens = inputs[_TOKENS] if len(inputs) > _TOKENS else None
            runs[names[id(inputs[1])]] = SiteRun(read=inputs[0], gave=output, tokens=tokens)

        with ExitStack() as hooks:
            for linear in self._linears():
                hooks.callback(linear.register_forward_hook(note).remove)
            return self(stream, weights, shared), runs

    def read(
        self,
        stream: Float[Tensor, "batch length hidden"],
        weights: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        site: str,
    ) -> Float[Tensor, "batch length K"]:
        """Return what ``site`` reads; the block runs that far and no further.

        Args:
            stream: what enters the block.
            weights: [N, K] float32, by site name.
            shared: the values of ``self.shared`` for this batch size, by name.
            site: the name of the site.
        """
        wanted = weights[site]

        def stop(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            hidden, weight = inputs[:2]
            if weight is wanted:
                raise _Reached(hidden)

        handles = [linear.register_forward_pre_hook(stop) for linear in self._linears()]
        try:
            self(stream, weights, shared)
        except _Reached as reached:
            return reached.hidden
        finally:
            for handle in handles:
                handle.remove()
        raise AssertionError(f"{site} isn't in {self.block.title}")

    def _linears(self) -> Iterator[Linear]:
        return (module for module in self._module.modules() if isinstance(module, Linear))
