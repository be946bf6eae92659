"""Everything about one model, from its graph and the files beside it; no weight is read and nothing is run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from stages.base_graph import parse_graph
from stages.errors import GraphError
from stages.graph.sites import find_groups
from stages.inspection.configuration import ConfigurationReport, report_configuration
from stages.inspection.files import FileReport, report_files
from stages.inspection.fusing import FusedOn, fused_on
from stages.inspection.input_scales import InputScaleMul, find_input_scales
from stages.inspection.left import LeftWeights, find_left
from stages.inspection.runtimes import RuntimeAnswer, runtime_answers
from stages.inspection.stored import StoredWeight, find_stored
from stages.model_directory import ModelDirectory

_ONNX_DOMAIN = ("", "ai.onnx")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSites:
    """What this project could still quantize."""

    matmuls: int
    activations: int
    weights: int
    """Numbers in them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReport:
    """What a model is made of."""

    kind: Literal["model"] = field(default="model", init=False)
    onnx_file: Path
    producer: str
    ir_version: int
    opsets: dict[str, int]
    nodes: int
    quantized: tuple[StoredWeight, ...]
    left: tuple[LeftWeights, ...]
    """Numbers that are not part of a quantized weight."""
    open: OpenSites | None
    """None where the graph holds no MatMul or Gemm with a floating-point weight."""
    fused_on: tuple[FusedOn, ...]
    """What ONNX Runtime's CPU provider makes of DequantizeLinear and MatMul, by release."""
    input_scales: tuple[InputScaleMul, ...]
    runtimes: tuple[RuntimeAnswer, ...]
    files: FileReport
    configuration: ConfigurationReport

    @property
    def quantized_bytes(self) -> int:
        """Codes, scales and zero points, each initializer once."""
        return sum({each.initializers: each.bytes for each in self.quantized}.values())


def report_model(directory: ModelDirectory) -> ModelReport:
    """Look at the model in ``directory``.

    Raises:
        GraphError: the .onnx file can't be read.
    """
    model = parse_graph(directory)
    found = find_stored(model)
    opsets = {name or "ai.onnx": version for name, version in model.opset_imports.items()}
    configuration = report_configuration(directory, model)
    return ModelReport(
        onnx_file=directory.onnx_file,
        producer=" ".join(filter(None, (model.producer_name, model.producer_version))),
        ir_version=model.ir_version,
        opsets=opsets,
        nodes=sum(1 for _ in model.graph.all_nodes()),
        quantized=found.stored,
        left=find_left(model, {name for each in found.stored for name in each.initializers}),
        open=_open_sites(model),
        fused_on=fused_on(found.dequantized, max(model.opset_imports.get(name, 0) for name in _ONNX_DOMAIN)),
        input_scales=find_input_scales(model, {each.node for each in found.stored}),
        runtimes=runtime_answers(found.stored, configuration.accuracy_level),
        files=report_files(model, directory.onnx_file),
        configuration=configuration,
    )


def _open_sites(model: ir.Model) -> OpenSites | None:
    try:
        groups = find_groups(model)
    except GraphError:
        return None
    sites = [site for group in groups for site in group.sites]
    return OpenSites(
        matmuls=len(sites),
        activations=len(groups),
        weights=sum(site.in_features * site.out_features for site in sites),
    )
