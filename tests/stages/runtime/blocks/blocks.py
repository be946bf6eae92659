"""Run blocks of a real graph, and the graph itself in ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from stages.model.directory import ModelDirectory, locate_model
from stages.model.load import load_graph
from stages.model.weights import read_weight
from stages.runtime.blocks.cut import BlockGraph, DecoderBlock, cut_block, find_blocks
from stages.runtime.blocks.decoder import write_out_residuals
from stages.runtime.blocks.module import BlockModule
from stages.runtime.cpu.runnable import runnable_graph
from stages.runtime.feeds import CausalFeeds
from stages.runtime.providers import CPU_ONLY
from stages.runtime.session import SessionSettings, open_session
from stages.runtime.tap import tapped_model

CPU = torch.device("cpu")


@dataclass(frozen=True)
class OpenModel:
    directory: ModelDirectory
    model: ir.Model
    """With its residual norms written out."""
    blocks: tuple[DecoderBlock, ...]

    def weights(self, block: DecoderBlock) -> dict[str, torch.Tensor]:
        return {site.name: read_weight(self.model, site, CPU) for site in block.sites}

    def tap(self, names: tuple[str, ...], tokens: np.ndarray) -> dict[str, torch.Tensor]:
        """Return values of the graph, or its inputs, as ONNX Runtime sees them; floating-point ones as float32."""
        inputs = {value.name for value in self.model.graph.inputs}
        computed = tuple(name for name in names if name not in inputs)
        with runnable_graph(tapped_model(self.model, computed), CPU_ONLY, None) as graph:
            folder = self.directory.folder if isinstance(graph, bytes) else None
            session = open_session(graph, SessionSettings(external_data_folder=folder))
        directory = self.directory
        feeds = CausalFeeds.of(session, directory)(tokens)
        found = dict(zip(computed, session.run(None, feeds), strict=True)) | feeds
        tensors = {name: torch.from_numpy(found[name]) for name in names}
        return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def open_model(folder: Path) -> OpenModel:
    directory = locate_model(folder)
    model = write_out_residuals(load_graph(directory))
    return OpenModel(directory, model, find_blocks(model))


def relative_error(opened: OpenModel, block: DecoderBlock, tokens: np.ndarray) -> float:
    """Return the largest error of what the torch module adds to the stream, relative to the largest addition."""
    graph: BlockGraph = cut_block(opened.model, block)
    values = opened.tap((block.stream_in, block.stream_out, *graph.shared), tokens)
    before, behind = values[block.stream_in], values[block.stream_out]
    with torch.no_grad():
        found = BlockModule(graph, CPU)(before, opened.weights(block), values)
    return float((found - behind).abs().max() / (behind - before).abs().max())
