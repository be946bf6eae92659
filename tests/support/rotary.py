"""Tables of rotary embeddings as onnxruntime-genai's builder computes them, and graphs that look rows up in them."""

from __future__ import annotations

import numpy as np
import torch
from onnx import TensorProto

from tests.support.graphs import TinyGraph

Tables = tuple[np.ndarray, np.ndarray]
"""Cosines and sines [positions, half]."""


def built_tables(positions: int, frequencies: torch.Tensor, magnitude: float) -> Tables:
    angles = torch.outer(torch.arange(positions).type_as(frequencies), frequencies)
    return (angles.cos() * magnitude).numpy(), (angles.sin() * magnitude).numpy()


def lookup_of_tables(*pairs: Tables) -> TinyGraph:
    """Return input_ids -> rows_cos, rows_sin (rows_cos_2, ... of a second pair), of initializers cos, sin, ..."""
    graph = TinyGraph()
    graph.input("input_ids", TensorProto.INT64, ["length"])
    for place, pair in enumerate(pairs):
        for kind, table in zip(("cos", "sin"), pair, strict=True):
            name = kind if place == 0 else f"{kind}_{place + 1}"
            graph.node("Gather", [graph.constant(name, table), "input_ids"], [f"rows_{name}"])
            kind_of = TensorProto.FLOAT if table.dtype == np.float32 else TensorProto.FLOAT16
            graph.output(f"rows_{name}", kind_of, ["length", table.shape[1]])
    return graph
