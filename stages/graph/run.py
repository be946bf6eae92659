"""Run the base graph on token batches and yield the activations that its MatMul sites read.

The tapped graph is the original with other outputs: it is handed to ONNX Runtime as a few hundred kilobytes of bytes
whose weights are mapped from the base model's own files. Nodes behind the last tap (lm_head) are not run. Where the CPU
alone must run a bfloat16 graph, it is widened to float32 first, into a temporary file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor

from stages.errors import GraphError
from stages.graph.opened import open_graph
from stages.model_directory import ModelDirectory
from stages.records import ActivationGroup
from stages.session import CausalFeeds, ProviderChoice
from stages.widen import must_widen

_FATAL = 4


def tapped_model(model: ir.Model, activations: tuple[str, ...]) -> ir.Model:
    """A copy of the model with ``activations``, in this order, as its only outputs; ``model`` is left as it was.

    Requires: every activation is a value of the main graph. Ensures: external tensors keep their original places, and
    bfloat16 activations come out as float32, which numpy can hold.
    """
    tapped = model.clone()
    values = {output.name: output for node in tapped.graph for output in node.outputs}
    values |= {value.name: value for value in tapped.graph.inputs}
    tapped.graph.outputs[:] = [_readable(tapped.graph, values[name]) for name in activations]
    RemoveUnusedNodesPass()(tapped)
    return tapped


def _readable(graph: ir.Graph, value: ir.Value) -> ir.Value:
    if value.dtype != ir.DataType.BFLOAT16:
        return value
    cast = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)}, name=f"{value.name}/float32")
    cast.outputs[0].name = f"{value.name}/float32"
    cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(ir.DataType.FLOAT)
    graph.append(cast)
    return cast.outputs[0]


@dataclass(frozen=True, slots=True)
class ActivationTap:
    """An open session of the tapped graph; leaving it removes the temporary weights, if there are any."""

    feeds: CausalFeeds
    activations: tuple[str, ...]
    providers: ProviderChoice
    """What it runs on: the providers asked for, without those that failed."""
    widened: bool
    """Whether a float32 copy of a bfloat16 graph runs."""
    temporary: ExitStack

    def __enter__(self) -> ActivationTap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.temporary.close()

    def run(self, tokens: np.ndarray) -> Iterator[tuple[str, Tensor]]:
        """One forward pass over ``tokens`` [batch, length]: (activation, [batch, length, K] in the graph's type).

        Raises:
            GraphError: ONNX Runtime stops; its reason is repeated.
        """
        session, feeds = self.feeds.session, self.feeds(tokens)
        options = ort.RunOptions()
        options.log_severity_level = _FATAL  # what it would log is in the exception
        try:
            outputs = session.run(None, feeds, options)
        except Exception as error:  # onnxruntime raises classes without a common base
            raise GraphError(
                f"The base model stops on {session.get_providers()[0]}: {str(error).splitlines()[0]}; choose another "
                "--calibration_eps, or build the model for this one."
            ) from error
        for activation, output in zip(self.activations, outputs, strict=True):
            yield activation, torch.from_numpy(output)


def open_tap(
    model: ir.Model,
    directory: ModelDirectory,
    groups: tuple[ActivationGroup, ...],
    choice: ProviderChoice,
    provider_options: Mapping[str, Mapping[str, str]],
    scratch: Path | None = None,
) -> ActivationTap:
    """Open the tapped graph with one output for each group's activation; see ``open_value_tap``."""
    activations = tuple(group.activation for group in groups)
    return open_value_tap(model, directory, activations, choice, provider_options, scratch)


def open_value_tap(
    model: ir.Model,
    directory: ModelDirectory,
    values: tuple[str, ...],
    choice: ProviderChoice,
    provider_options: Mapping[str, Mapping[str, str]],
    scratch: Path | None = None,
) -> ActivationTap:
    """Open the tapped graph with ``values`` as its outputs, on the first providers that take it.

    ``scratch`` is where a widened copy of a bfloat16 model may lie, twice the model's size (None: the system's folder
    for temporary files).

    Raises:
        GraphError: ONNX Runtime can't open the base model.
    """
    tapped = tapped_model(model, values)
    with ExitStack() as temporary:
        opened = open_graph(tapped, directory, choice, scratch, temporary, provider_options)
        feeds = CausalFeeds(opened.session, directory.kv_heads, directory.head_size, directory.windowed_caches)
        widened = must_widen(tapped, opened.providers.names)
        return ActivationTap(feeds, values, opened.providers, widened, temporary.pop_all())
