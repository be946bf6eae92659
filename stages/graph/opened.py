"""Open a changed copy of the base graph: a few hundred kilobytes as bytes, weights mapped from the base's files."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType

import onnx_ir as ir
import onnxruntime as ort

from stages.model_directory import ModelDirectory
from stages.session import CPU_ONLY, OpenedSession, ProviderChoice, SessionSettings, open_first_session, open_session
from stages.widen import runnable_graph

_NO_OPTIONS: Mapping[str, Mapping[str, str]] = MappingProxyType({})


def open_graph(
    model: ir.Model,
    directory: ModelDirectory,
    choice: ProviderChoice,
    scratch: Path | None,
    temporary: ExitStack,
    provider_options: Mapping[str, Mapping[str, str]] = _NO_OPTIONS,
) -> OpenedSession:
    """A session of ``model``, whose external tensors lie in ``directory``, on the first providers that take it.

    Where the CPU alone must run a bfloat16 graph, a float32 copy of it lies in ``scratch`` (None: the system's folder
    for temporary files), twice the model's size, until ``temporary`` is closed.

    Raises:
        GraphError: ONNX Runtime can't open the model.
    """

    def open_with(providers: tuple[str, ...]) -> ort.InferenceSession:
        graph = temporary.enter_context(runnable_graph(model, providers, scratch))
        settings = SessionSettings(
            providers=providers,
            provider_options=provider_options,
            external_data_folder=directory.folder if isinstance(graph, bytes) else None,
            map_weights=providers == CPU_ONLY,
            spin=False,
        )
        return open_session(graph, settings)

    return open_first_session(open_with, choice)
