"""A tiny mixture of experts in one MoE node, and the kinds of activation that one can have."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from stages.model.sites import find_expert_layers
from stages.model.weights import read_weight
from stages.quantization.search.affine import spec_for
from stages.quantization.search.choices import full_range, stored_weight
from stages.quantization.search.problem import IDENTITY
from stages.quantization.weights.store import QuantizedStore, create_or_resume_store
from stages.records.experts import ExpertLayer
from stages.records.formats import QuantSpec, WeightForm
from stages.records.results import ExportRecipe, SiteReport, SolvedGroup
from stages.runtime.session import SessionSettings, open_session
from stages.system.hardware import choose_device
from tests.support.graphs import MICROSOFT, TinyGraph, onnx_type

EXPERTS, HIDDEN, INNER = 5, 32, 48

Attributes = dict[str, int | float | str | list[int]]
GPT_OSS: Attributes = {
    "activation_type": "swiglu",
    "swiglu_fusion": 1,
    "activation_alpha": 1.702,
    "activation_beta": 1.0,
    "swiglu_limit": 7.0,
    "k": 2,
    "normalize_routing_weights": 1,
}
KINDS = MappingProxyType(
    {
        "gpt-oss": GPT_OSS,
        "lfm2": {"activation_type": "swiglu", "swiglu_fusion": 1, "k": 2, "normalize_routing_weights": 1},
        "silu": {"activation_type": "silu", "k": 3, "normalize_routing_weights": 1},
        "gelu": {"activation_type": "gelu", "k": 1, "normalize_routing_weights": 1},
        "relu over all": {"k": 2},
        "identity over all": {"activation_type": "identity", "k": 1},
    }
)
"""Attributes of MoE nodes that QMoE runs."""


def mixture(
    attributes: Attributes = GPT_OSS, dtype: type[np.floating] = np.float32, *, biased: bool = True, inner: int = INNER
) -> TinyGraph:
    """x [tokens, H] and scores [tokens, E] -> MoE -> y, with random experts."""
    rng, graph, kind = np.random.default_rng(3), TinyGraph(), onnx_type(np.dtype(dtype))
    rows = (2 if attributes.get("activation_type") == "swiglu" else 1) * inner
    graph.input("x", kind, ["tokens", HIDDEN])
    graph.input("scores", kind, ["tokens", EXPERTS])

    def constant(name: str, *shape: int) -> str:
        return graph.constant(name, (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(dtype))

    fc1, fc2 = constant("gate_up.weight", EXPERTS, rows, HIDDEN), constant("down.weight", EXPERTS, HIDDEN, inner)
    biases = [constant("gate_up.bias", EXPERTS, rows), constant("down.bias", EXPERTS, HIDDEN)] if biased else ["", ""]
    inputs = ["x", "scores", fc1, biases[0], fc2, biases[1]]
    while not inputs[-1]:
        inputs.pop()
    graph.node("MoE", inputs, ["y"], dict(attributes), MICROSOFT)
    graph.output("y", kind, ["tokens", HIDDEN])
    return graph


def the_layer(model: ir.Model) -> ExpertLayer:
    (layer,) = find_expert_layers(model)
    return layer


def rounded_store(
    folder: Path, model: ir.Model, spec: QuantSpec, *, takes_level: bool = True, says_raw: bool = False
) -> QuantizedStore:
    """Round every expert of the model's only MoE node to ``spec``, as a search does, and store it."""
    layer, device = the_layer(model), choose_device("cpu")
    recipe = ExportRecipe(
        model_fingerprint="0",
        weight_form=WeightForm.DQ,
        fold_input_scales=True,
        groups=layer.groups,
        kept=(),
        search="0",
        summary="rounded",
        experts_take_level=takes_level,
        experts_say_raw=says_raw,
    )
    store = create_or_resume_store(folder, recipe, overwrite=False)
    for index, group in enumerate(layer.groups):
        (site,) = group.sites
        weight = read_weight(model, site, device)
        fitting = spec_for(weight, spec, site.dtype)
        stored = stored_weight(site, weight, fitting, full_range(weight, fitting, "full", IDENTITY))
        report = SiteReport(site=site.name, algorithm="rtn", format=fitting.label, bytes=0)
        store.write(index, SolvedGroup(group=group, weights=(stored,), reports=(report,)))
    return store


def run_mixture(model: ir.Model, x: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return y on the CPU."""
    session = open_session(ir.to_proto(model).SerializeToString(), SessionSettings())
    output: np.ndarray = session.run(None, {"x": x, "scores": scores})[0]
    return output
