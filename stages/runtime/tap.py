"""Run the base graph, or a partition of it, on token batches and yield the activations that its MatMul sites read.

The tapped graph is the original with other outputs: it is handed to ONNX Runtime as a few hundred kilobytes of bytes
whose weights are mapped from the base model's own files. Nodes behind the last tap (lm_head) are not run. Where only
the CPU can run a bfloat16 graph, it is upcast to float32 first, into a temporary file. Boundary values between
partitions go through numpy, which has no bfloat16: as float32 there and back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor

from stages.errors import GraphError
from stages.model.directory import ModelDirectory
from stages.model.load import weights_folder
from stages.model.partition import Partition
from stages.runtime.cpu.norms import must_write_out_norms
from stages.runtime.cpu.runnable import runnable_graph, without_weights
from stages.runtime.cpu.upcast import must_upcast
from stages.runtime.feeds import Batch, CausalFeeds, Feed, SampleFeeds
from stages.runtime.providers import CPU_ONLY, CUDA, ProviderChoice
from stages.runtime.session import (
    NO_KERNEL,
    OpenedSession,
    SessionSettings,
    open_first_session,
    open_session,
    runtime_reason,
)

_NO_OPTIONS: Mapping[str, Mapping[str, str]] = MappingProxyType({})
_NO_VALUES: Mapping[str, np.ndarray] = MappingProxyType({})
_FATAL = 4


def open_graph(
    model: ir.Model,
    directory: ModelDirectory,
    choice: ProviderChoice,
    scratch: Path | None,
    temporary: ExitStack,
    provider_options: Mapping[str, Mapping[str, str]] = _NO_OPTIONS,
) -> OpenedSession:
    """Open a session of ``model`` on the first providers that run it.

    Args:
        model: the graph.
        directory: where its external tensors lie.
        choice: the providers to try.
        scratch: folder for a float32 copy, twice the size, of a bfloat16 graph that only the CPU can run; None is the
            system's folder for temporary files.
        temporary: removes the copy when it is closed.
        provider_options: options by the provider that they go to.

    Raises:
        GraphError: ONNX Runtime can't open the model.
    """

    def open_with(providers: tuple[str, ...]) -> ort.InferenceSession:
        graph = temporary.enter_context(runnable_graph(model, providers, scratch))
        settings = SessionSettings(
            providers=providers,
            provider_options=provider_options,
            external_data_folder=weights_folder(model, directory.onnx_file) if isinstance(graph, bytes) else None,
            map_weights=providers == CPU_ONLY,
            spin=False,
        )
        return open_session(graph, settings)

    return open_first_session(open_with, choice)


def require_kernels(model: ir.Model, directory: ModelDirectory, choice: ProviderChoice) -> None:
    """Raise GraphError where only the CPU is left to run ``model`` and it can't; weights are not read.

    What the CPU has no kernel for would else be found when its part of the graph is opened, hours later.
    """
    if choice.names != CPU_ONLY:
        return
    try:
        open_session(
            without_weights(model), SessionSettings(external_data_folder=weights_folder(model, directory.onnx_file))
        )
    except GraphError as error:
        reason = runtime_reason(error.__cause__ or error)
        if type(error.__cause__).__name__ != "NotImplemented" and NO_KERNEL not in reason:
            raise error from error.__cause__
        raise GraphError(
            f"{directory.onnx_file} has operators that the CPU can't run ({reason}); calibrate where --calibration_eps "
            "names a provider that runs it, build the base for cpu, or take --algo rtn_dq, which needs no calibration."
        ) from error


def tapped_model(model: ir.Model, activations: tuple[str, ...]) -> ir.Model:
    """Return a copy of the model with ``activations``, in this order, as its only outputs; ``model`` is left as is.

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
    if value.dtype == ir.DataType.BFLOAT16:
        cast = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)}, name=f"{value.name}/float32")
        return _appended(graph, cast, value, ir.TensorType(ir.DataType.FLOAT))
    if value.is_graph_input():  # else its memory is the caller's, who frees it
        return _appended(graph, ir.node("Identity", [value], name=f"{value.name}/copy"), value, value.type)
    return value


def _appended(graph: ir.Graph, node: ir.Node, value: ir.Value, kind: ir.TypeProtocol | None) -> ir.Value:
    made = node.outputs[0]
    made.name, made.shape, made.type = node.name, value.shape, kind
    graph.append(node)
    return made


def _feedable(graph: ir.Graph, name: str, dtype: np.dtype[np.generic]) -> str:
    """Return the input of ``graph`` through which numpy can feed the value ``name``, of numpy type ``dtype``."""
    index, value = next((index, value) for index, value in enumerate(graph.inputs) if value.name == name)
    if value.dtype is None:
        value.type = ir.TensorType(ir.DataType.from_numpy(dtype))
    if value.dtype != ir.DataType.BFLOAT16:
        return name
    fed = ir.Value(name=f"{name}/float32", shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
    cast = ir.node("Cast", [fed], attributes={"to": int(ir.DataType.BFLOAT16)}, name=f"{name}/bfloat16")
    cast.outputs[0].shape, cast.outputs[0].type = value.shape, value.type
    ir.convenience.replace_all_uses_with(value, cast.outputs[0])
    graph.inputs[index] = fed
    graph.insert_before(graph[0], cast)
    cast.outputs[0].name = name
    return f"{name}/float32"


FeedsOpener: TypeAlias = Callable[[ort.InferenceSession, ModelDirectory, frozenset[str]], CausalFeeds | SampleFeeds]
"""Makes the feeds of an open session of a model, but for the inputs, named last, that its caller feeds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationTap:
    """An open session of a tapped graph; leaving it closes the session and removes temporary weights, if any.

    A closed tap holds neither a session nor weights.
    """

    values: tuple[str, ...]
    """Names of the values that it yields."""
    boundary_inputs: Mapping[str, str]
    """The graph input for each value that an earlier partition computes."""
    providers: ProviderChoice
    """The providers asked for, without those that failed."""
    upcast: bool
    """Whether a float32 copy of a bfloat16 graph runs."""
    norms_written_out: bool
    """Whether the norms inside attention run as nodes before it."""
    _open_feeds: list[CausalFeeds | SampleFeeds]
    """The session's feeds, until ``_resources`` are closed; then nothing."""
    _resources: ExitStack

    @property
    def feeds(self) -> CausalFeeds | SampleFeeds:
        """Return the feeds of the open session.

        Raises:
            RuntimeError: the tap is closed.
        """
        if not self._open_feeds:
            raise RuntimeError("The activation tap is closed; open another one.")
        return self._open_feeds[0]

    def __enter__(self) -> ActivationTap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._resources.close()

    def run(self, batch: Batch, boundary_values: Mapping[str, np.ndarray] = _NO_VALUES) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, value in the graph's type, [batch, length, ...]) of one forward pass.

        Values lie where they were computed, on the CPU or a CUDA device, and are not copied.

        Args:
            batch: token ids [batch, length], or a sample where the tap was opened for samples.
            boundary_values: what earlier partitions computed for the same batch.

        Raises:
            GraphError: ONNX Runtime stops; its reason is repeated.
            RuntimeError: the tap is closed.
        """
        session = self.feeds.session
        feeds = self._fed(batch) | {self.boundary_inputs[name]: array for name, array in boundary_values.items()}
        binding = _bound(session, feeds)
        options = ort.RunOptions()
        options.log_severity_level = _FATAL  # what it would log is in the exception
        try:
            session.run_with_iobinding(binding, options)
            binding.synchronize_outputs()
        except Exception as error:  # onnxruntime raises classes without a common base
            raise GraphError(
                f"The base model stops on {session.get_providers()[0]} ({runtime_reason(error)}); choose another "
                "--calibration_eps, or build the model for this one."
            ) from error
        for name, output in zip(self.values, binding.get_outputs(), strict=True):
            yield name, _as_torch(output)

    def _fed(self, batch: Batch) -> dict[str, Feed]:
        feeds = self.feeds
        if isinstance(feeds, CausalFeeds):
            assert isinstance(batch, np.ndarray), "the tap was opened for tokens"
            return feeds(batch)
        assert not isinstance(batch, np.ndarray), "the tap was opened for samples"
        return feeds(batch)


def _bound(session: ort.InferenceSession, feeds: Mapping[str, np.ndarray | ort.OrtValue]) -> ort.IOBinding:
    """Bind inputs from the host; outputs stay where the first provider computes them, if torch can read them there."""
    binding = session.io_binding()
    for name, value in feeds.items():
        if isinstance(value, ort.OrtValue):
            binding.bind_ortvalue_input(name, value)
        else:
            binding.bind_cpu_input(name, value)
    on_cuda = session.get_providers()[0] == CUDA
    place = ("cuda", int(session.get_provider_options()[CUDA].get("device_id", 0))) if on_cuda else ("cpu", 0)
    for output in session.get_outputs():
        binding.bind_output(output.name, *place)
    return binding


def _as_torch(output: ort.OrtValue) -> Tensor:
    """Return the same memory as a tensor."""
    tensor: Tensor = torch.utils.dlpack.from_dlpack(output)
    return tensor.view(torch.bool) if output.data_type() == "tensor(bool)" else tensor  # DLPack says uint8


def open_value_tap(
    model: ir.Model,
    directory: ModelDirectory,
    values: tuple[str, ...],
    choice: ProviderChoice,
    provider_options: Mapping[str, Mapping[str, str]],
) -> ActivationTap:
    """Open the graph with ``values`` as its outputs, on the first providers that run it.

    Args:
        model: the base model's graph.
        directory: where its weights lie.
        values: names of the activations to yield.
        choice: the providers to try.
        provider_options: options by the provider that they go to.

    Raises:
        GraphError: ONNX Runtime can't open the base model.
    """
    return _open(tapped_model(model, values), values, directory, choice, provider_options, None, {})


def open_partition_tap(
    partition: Partition,
    directory: ModelDirectory,
    choice: ProviderChoice,
    provider_options: Mapping[str, Mapping[str, str]],
    scratch: Path | None,
    boundary_types: Mapping[str, np.dtype[np.generic]],
    make_feeds: FeedsOpener = CausalFeeds.of,
) -> ActivationTap:
    """Open a partition of the graph, on the first providers that run it, to yield its outputs.

    Args:
        partition: the part of the base model's graph.
        directory: where its weights lie.
        choice: the providers to try.
        provider_options: options by the provider that they go to.
        scratch: see ``open_graph``.
        boundary_types: numpy types of the boundary inputs, by their names.
        make_feeds: opens the feeds of its session: for tokens, or for samples.

    Raises:
        GraphError: ONNX Runtime can't open that part of the base model.
    """
    values = tuple(str(output.name) for output in partition.model.graph.outputs)
    tapped = tapped_model(partition.model, values)
    boundary_inputs = {name: _feedable(tapped.graph, name, boundary_types[name]) for name in partition.boundary_inputs}
    return _open(tapped, values, directory, choice, provider_options, scratch, boundary_inputs, make_feeds)


def _open(
    tapped: ir.Model,
    values: tuple[str, ...],
    directory: ModelDirectory,
    choice: ProviderChoice,
    provider_options: Mapping[str, Mapping[str, str]],
    scratch: Path | None,
    boundary_inputs: Mapping[str, str],
    make_feeds: FeedsOpener = CausalFeeds.of,
) -> ActivationTap:
    with ExitStack() as temporary:
        opened = open_graph(tapped, directory, choice, scratch, temporary, provider_options)
        open_feeds = [make_feeds(opened.session, directory, frozenset(boundary_inputs.values()))]
        temporary.callback(open_feeds.clear)  # last in, first out: the session goes before the files that it maps
        return ActivationTap(
            values=values,
            boundary_inputs=boundary_inputs,
            providers=opened.providers,
            upcast=must_upcast(tapped, opened.providers.names),
            norms_written_out=must_write_out_norms(tapped, opened.providers.names),
            _open_feeds=open_feeds,
            _resources=temporary.pop_all(),
        )
