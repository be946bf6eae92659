"""Run the base graph on token batches and yield the activations that its MatMul sites read.

The tapped graph is the original with other outputs: it is handed to ONNX Runtime as a few hundred kilobytes of bytes
whose weights are mapped from the base model's own files. Nodes behind the last tap (lm_head) are not run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor

from stages.model_directory import ModelDirectory
from stages.records import ActivationGroup
from stages.session import CPU, CausalFeeds, ProviderChoice, SessionSettings, open_first_session


def tapped_graph(model: ir.Model, activations: tuple[str, ...]) -> bytes:
    """The model serialized with ``activations`` as its only outputs; ``model`` is left as it was.

    Requires: every activation is a value of the main graph. Ensures: external tensors keep their original places.
    """
    tapped = model.clone()
    values = {output.name: output for node in tapped.graph for output in node.outputs}
    values |= {value.name: value for value in tapped.graph.inputs}
    tapped.graph.outputs[:] = [values[name] for name in activations]
    RemoveUnusedNodesPass()(tapped)
    serialized: bytes = ir.to_proto(tapped).SerializeToString()
    return serialized


@dataclass(frozen=True, slots=True)
class ActivationTap:
    """An open session of the tapped graph."""

    feeds: CausalFeeds
    activations: tuple[str, ...]
    providers: ProviderChoice
    """What it runs on: the providers asked for, without those that failed."""

    def run(self, tokens: np.ndarray) -> Iterator[tuple[str, Tensor]]:
        """One forward pass over ``tokens`` [batch, length]: (activation, [batch, length, K] in the model's type)."""
        outputs = self.feeds.session.run(list(self.activations), self.feeds(tokens))
        for activation, output in zip(self.activations, outputs, strict=True):
            yield activation, torch.from_numpy(output)


def open_tap(
    model: ir.Model,
    directory: ModelDirectory,
    groups: tuple[ActivationGroup, ...],
    choice: ProviderChoice,
    provider_options: Mapping[str, Mapping[str, str]],
) -> ActivationTap:
    """Open the tapped graph with one output for each group's activation, on the first providers that take it.

    Raises:
        GraphError: ONNX Runtime can't open the base model.
    """
    activations = tuple(group.activation for group in groups)
    settings = SessionSettings(
        provider_options=provider_options,
        external_data_folder=directory.folder,
        map_weights=choice.names == (CPU,),
    )
    opened = open_first_session(tapped_graph(model, activations), settings, choice)
    feeds = CausalFeeds(opened.session, directory.kv_heads, directory.head_size, directory.windowed_caches)
    return ActivationTap(feeds, activations, opened.providers)
