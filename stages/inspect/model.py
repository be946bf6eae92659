"""Report on one model, from its graph and the files next to it; no weight is read and nothing is run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from export.card.record import ModelRecord, read_record
from stages.commands.parsing import Runtime, parse_target
from stages.errors import GraphError, OptionError
from stages.inspect.files import FileReport, report_files
from stages.inspect.float_weights import InputScaleMul, UnquantizedTensors, find_input_scales, find_unquantized
from stages.inspect.quantized_weights import StoredWeight, find_quantized
from stages.inspect.runtimes import SCALES, FusedOn, RuntimeAnswer, fused_on, runtime_answers
from stages.model.directory import DECODER, ModelDirectory
from stages.model.genai_config import read_genai_config
from stages.model.load import parse_graph, producer_of
from stages.model.sites import find_expert_layers, find_groups
from stages.quantization.targets.choose import target_of_base
from stages.quantization.targets.formats import ModelFacts

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_ONNX_DOMAIN = ("", "ai.onnx")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigurationReport:
    """What onnxruntime-genai reads besides the graph."""

    present: bool
    tokenizer: str
    """The tokenizer's file; empty where there is none."""
    model_type: str = ""
    layers: int | None = None
    context_length: int | None = None
    session_options: tuple[tuple[str, str], ...] = ()
    providers: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    """Sentences, one for each setting that the graph contradicts."""

    @property
    def accuracy_level(self) -> str | None:
        """Return the accuracy level that the session options set for fused MatMuls."""
        return dict(self.session_options).get("session.qdq_matmulnbits_accuracy_level")


def report_configuration(directory: ModelDirectory, model: ir.Model) -> ConfigurationReport:
    """Compare genai_config.json in ``directory`` with the graph."""
    tokenizer = next((name for name in _TOKENIZERS if (directory.folder / name).is_file()), "")
    if not directory.has_genai_config:
        return ConfigurationReport(present=False, tokenizer=tokenizer)
    try:
        content = read_genai_config(directory.folder)
    except GraphError as error:
        return ConfigurationReport(present=True, tokenizer=tokenizer, conflicts=(str(error),))
    whole = content.get("model", {})
    decoder = whole.get("decoder", {})
    options = decoder.get("session_options", {})
    return ConfigurationReport(
        present=True,
        tokenizer=tokenizer,
        model_type=str(whole.get("type", "")),
        layers=decoder.get("num_hidden_layers"),
        context_length=whole.get("context_length"),
        session_options=tuple((key, str(value)) for key, value in options.items() if key != "provider_options"),
        providers=tuple(name for each in options.get("provider_options", []) for name in each),
        conflicts=tuple(_conflicts(directory, model, whole, decoder)) if directory.component == DECODER else (),
    )


def _conflicts(
    directory: ModelDirectory, model: ir.Model, whole: dict[str, Any], decoder: dict[str, Any]
) -> Iterator[str]:
    filename = decoder.get("filename")
    if filename != directory.onnx_name:
        yield f"model.decoder.filename is {filename!r}, but this graph is {directory.onnx_name!r}"
    inputs = {str(value.name): value for value in model.graph.inputs}
    outputs = {str(value.name): value for value in model.graph.outputs}
    layers = decoder.get("num_hidden_layers")
    yield from _missing(decoder.get("inputs", {}), inputs, layers, "input")
    yield from _missing(decoder.get("outputs", {}), outputs, layers, "output")
    yield from _caches(decoder, inputs)
    logits = outputs.get(str(decoder.get("outputs", {}).get("logits", "logits")))
    width = None if logits is None or logits.shape is None else logits.shape[-1]
    vocabulary = whole.get("vocab_size")
    if isinstance(width, int) and vocabulary is not None and width != vocabulary:
        yield f"vocab_size is {vocabulary}, but the graph's logits have {width} columns"


def _missing(names: dict[str, Any], values: dict[str, ir.Value], layers: int | None, what: str) -> Iterator[str]:
    """Yield the names that the graph doesn't have; %d stands for every layer's number."""
    for key, pattern in names.items():
        if not isinstance(pattern, str):
            continue
        numbered = "%d" in pattern
        wanted = [pattern % layer for layer in range(layers or 0)] if numbered else [pattern]
        lacking = [name for name in wanted if name not in values]
        # A graph may lack position_ids or an attention mask, but not a part of its cache.
        if lacking and (numbered or key in ("input_ids", "logits")):
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            yield f"the graph has no {what} '{lacking[0]}'{more} ({key})"


def _caches(decoder: dict[str, Any], inputs: dict[str, ir.Value]) -> Iterator[str]:
    layers, patterns = decoder.get("num_hidden_layers"), decoder.get("inputs", {})
    pattern = patterns.get("past_key_names")
    if not isinstance(pattern, str) or "%d" not in pattern or layers is None:
        return
    if pattern % layers in inputs:
        yield f"num_hidden_layers is {layers}, but the graph has a cache for layer {layers} too"
    first = inputs.get(pattern % 0)
    shape = () if first is None or first.shape is None else tuple(first.shape)
    if len(shape) != 4:
        return
    for key, found in (("num_key_value_heads", shape[1]), ("head_size", shape[3])):
        told = decoder.get(key)
        if isinstance(found, int) and told is not None and told != found:
            yield f"{key} is {told}, but the graph's caches have {found}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSites:
    """The sites that this project could still quantize."""

    matmuls: int
    activations: int
    weights: int
    """Numbers in all of them."""
    experts: int = 0
    """Matrices of experts in MoE nodes, whose numbers count too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReport:
    """What a model is made of, and how runtimes treat it."""

    kind: Literal["model"] = field(default="model", init=False)
    onnx_file: Path
    producer: str
    ir_version: int
    opsets: dict[str, int]
    nodes: int
    quantized: tuple[StoredWeight, ...]
    left: tuple[UnquantizedTensors, ...]
    """Tensors that aren't part of a quantized weight."""
    open: OpenSites | None
    """None where the graph holds no MatMul or Gemm with a floating-point weight."""
    fused_on: tuple[FusedOn, ...]
    """Which releases of ONNX Runtime's CPU provider fuse DequantizeLinear and MatMul."""
    input_scales: tuple[InputScaleMul, ...]
    runtimes: tuple[RuntimeAnswer, ...]
    files: FileReport
    configuration: ConfigurationReport
    record: ModelRecord | None = None
    """genai_quant.json; None where there is none."""
    made_for: Runtime | None = None
    """That ``record`` tells of; None where it doesn't."""

    @property
    def quantized_bytes(self) -> int:
        """Return the bytes of codes, scales and zero points, each initializer once."""
        return sum({each.initializers: each.bytes for each in self.quantized}.values())


def report_model(directory: ModelDirectory) -> ModelReport:
    """Report on the model in ``directory``.

    Raises:
        GraphError: the .onnx file can't be read.
    """
    model = parse_graph(directory)
    found = find_quantized(model)
    opsets = {name or "ai.onnx": version for name, version in model.opset_imports.items()}
    configuration = report_configuration(directory, model)
    record = read_record(directory.folder)
    return ModelReport(
        onnx_file=directory.onnx_file,
        producer=producer_of(model),
        ir_version=model.ir_version,
        opsets=opsets,
        nodes=sum(1 for _ in model.graph.all_nodes()),
        quantized=found.stored,
        left=find_unquantized(model, {name for each in found.stored for name in each.initializers}),
        open=_open_sites(model),
        fused_on=fused_on(found.dequantized, max(model.opset_imports.get(name, 0) for name in _ONNX_DOMAIN)),
        input_scales=find_input_scales(model, {each.node for each in found.stored}),
        runtimes=runtime_answers(found.stored, configuration.accuracy_level),
        files=report_files(model, directory.onnx_file),
        configuration=configuration,
        record=record,
        made_for=None if record is None else _made_for(record, directory, found.stored),
    )


def _made_for(record: ModelRecord, directory: ModelDirectory, weights: Sequence[StoredWeight]) -> Runtime | None:
    """Return the runtime that the formats were chosen for; None for any, or where that isn't known."""
    asked = None if record.origin is None else str(record.origin.options.get("target", "auto"))
    if asked in (None, "any"):
        return None
    if asked == "auto":
        dtypes = frozenset(SCALES[each.computed] for each in weights if each.computed in SCALES)
        target = target_of_base(directory, ModelFacts(dtypes=dtypes, in_features=frozenset())).target
        return None if target is None else target.runtime
    try:
        return parse_target(asked).runtime
    except OptionError:  # of a later version
        return None


def _open_sites(model: ir.Model) -> OpenSites | None:
    try:
        groups = find_groups(model)
    except GraphError:
        return None
    sites = [site for group in groups for site in group.sites]
    experts = [site for layer in find_expert_layers(model) for site in layer.sites]
    return OpenSites(
        matmuls=len(sites),
        activations=len(groups),
        weights=sum(site.in_features * site.out_features for site in (*sites, *experts)),
        experts=len(experts),
    )
