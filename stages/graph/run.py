"""Run the base graph on token batches and yield the activations that its MatMul sites read.

The tapped graph is the original with other outputs: it is handed to ONNX Runtime as a few hundred kilobytes of bytes
whose weights are mapped from the base model's own files. Nodes behind the last tap (lm_head) are not run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor

from stages.errors import GraphError
from stages.model_directory import ModelDirectory
from stages.records import ActivationGroup
from stages.session import CausalFeeds, SessionSettings, open_session

_FATAL = 4


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

    def run(self, tokens: np.ndarray) -> Iterator[tuple[str, Tensor]]:
        """One forward pass over ``tokens`` [batch, length]: (activation, [batch, length, K] in the model's type).

        Raises:
            GraphError: ONNX Runtime stops; its reason is repeated.
        """
        session, feeds = self.feeds.session, self.feeds(tokens)
        options = ort.RunOptions()
        options.log_severity_level = _FATAL  # what it would log is in the exception
        try:
            outputs = session.run(list(self.activations), feeds, options)
        except Exception as error:  # onnxruntime raises classes without a common base
            raise GraphError(
                f"The base model stops on {session.get_providers()[0]}: {str(error).splitlines()[0]}; choose another "
                "--calibration_eps, or build the model for this one."
            ) from error
        for activation, output in zip(self.activations, outputs, strict=True):
            yield activation, torch.from_numpy(output)


def open_tap(
    model: ir.Model, directory: ModelDirectory, groups: tuple[ActivationGroup, ...], providers: tuple[str, ...]
) -> ActivationTap:
    """Open the tapped graph with one output for each group's activation.

    Raises:
        GraphError: ONNX Runtime can't open the base model.
    """
    activations = tuple(group.activation for group in groups)
    settings = SessionSettings(
        providers=providers,
        external_data_folder=directory.folder,
        map_weights=providers == ("CPUExecutionProvider",),
    )
    session = open_session(tapped_graph(model, activations), settings)
    feeds = CausalFeeds(session, directory.kv_heads, directory.head_size, directory.windowed_caches)
    return ActivationTap(feeds, activations)
