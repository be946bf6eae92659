"""Keep how a quantized model was made, and how good it is, in genai_quant.json beside it.

What only the command that searched the weights knows lies among them as origin.json, so that another export knows it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
import onnxruntime
import yaml
from pydantic import TypeAdapter
from pydantic_core import to_jsonable_python

from stages.calibration.cache import CacheKey
from stages.commands.options import CommandOptions, given_options
from stages.errors import UserError
from stages.evaluation.records import Evaluation, OutputEvaluation
from stages.model.directory import ModelDirectory
from stages.model.load import producer_of
from stages.quantization.weights.byte_scales import stored_bytes, stored_in_words
from stages.quantization.weights.store import QuantizedStore
from stages.records.formats import QuantSpec, WeightForm
from stages.records.results import ExportRecipe, VerifyReport
from stages.records.sites import MatMulSite, kind_of, short_name
from stages.system.json_file import read_json, write_json
from stages.system.paths import shell_line
from stages.system.version import Version, this_version

RECORD = "genai_quant.json"
MODEL_CARD = "README.md"
_ORIGIN = "origin.json"
_AS_BASE = "as in the base"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
"""How the hub's cache calls a model's folder."""
_CARD_HEAD = re.compile(r"---\s*\n(.*?)\n---\s*(?:\n|$)", re.DOTALL)
_LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What made quantized weights."""

    version: Version
    command: str
    """What a person types to do the same."""
    options: dict[str, Any]
    """Every option that has a value."""
    calibration: str
    """The text in words; empty where none was needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """The model that was quantized."""

    name: str
    """Its folder's."""
    hub_name: str | None
    """What its config.json or model card calls it, if that is a name of the Hugging Face hub."""
    license: dict[str, str]
    """The entries about it of its own README.md."""
    fingerprint: str
    producer: str
    """What wrote its graph."""
    bytes: int
    """The .onnx file and its external data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KindOfLayer:
    """Layers of one kind in one format."""

    kind: str
    count: int
    format: str
    bits_per_weight: float | None
    """Scales and zero points included; None where nothing is quantized, or another kind's weight is read."""
    reason: str = ""
    """Why it isn't quantized."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """What was checked before the model got its name."""

    level: str
    """As --verify names it."""
    runtime: str
    sites: int
    fused: int | None
    """Sites that ran as MatMulNBits on the CPU; None where that wasn't checked."""
    largest_error_exact: float | None
    """max |y - y_ref| / max |y_ref| of all sites, at accuracy level 1."""
    largest_error_default: float | None
    """The same, at the runtime's default level."""
    skipped: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextScores:
    """How the model compares with its base on a text."""

    text: str
    tokens: int
    accuracy_level: str
    base_perplexity: float
    perplexity: float
    divergence: float
    """Mean KL(base || model) per token, nats."""
    same_top1: float
    """Share of tokens, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Tokens per second, medians, of the base and of the model."""

    machine: str
    runtime: str
    threads: int
    base_prompt: float
    prompt: float
    base_decode: float
    decode: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSummary:
    """What was measured, and with which versions."""

    runtime: str
    texts: tuple[TextScores, ...]
    speed: Speed | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """Everything in genai_quant.json."""

    format: Literal[1] = 1
    name: str
    """The output folder's."""
    onnx_file: str
    version: Version
    """Of genai-quant, which wrote the output."""
    export_command: str
    """What a person types to write it from saved weights; empty where ``origin`` did both."""
    origin: Origin | None
    """None where the weights were made by an earlier version, which didn't keep it."""
    algorithm: str
    """With the formats, in one line."""
    weight_form: WeightForm
    accuracy_level: int | None
    """That the output asks for; None: the runtime's default."""
    base: BaseModel
    formats: tuple[KindOfLayer, ...]
    """Quantized kinds in graph order, embeddings, and what stays."""
    bytes: int
    """The .onnx file and its external data."""
    checks: Checks | None
    """None where verification was off."""
    evaluation: EvaluationSummary | None = None
    outputs: tuple[OutputEvaluation, ...] = ()
    """What encoders give beside what their base gives, one for each component."""
    parts: tuple[ModelRecord, ...] = ()
    """Components of the package that were quantized before this one, in this order."""


_RECORDS = TypeAdapter(ModelRecord)
_ORIGINS = TypeAdapter(Origin)


def read_record(folder: Path) -> ModelRecord | None:
    """Return what genai_quant.json of ``folder`` says; None where there is none that this version can read."""
    return read_json(folder / RECORD, _RECORDS)


def write_record(folder: Path, record: ModelRecord) -> None:
    """Write genai_quant.json into ``folder``, whole or not at all."""
    write_json(folder / RECORD, _RECORDS, record)


def command_line(program: str, options: CommandOptions) -> str:
    """Return what a person types to run ``program`` with ``options``."""
    return shell_line((*program.split(), *given_options(options)))


def save_origin(store: QuantizedStore, options: CommandOptions, calibration: CacheKey | None) -> None:
    """Keep among the weights what made them.

    Args:
        store: the weights.
        options: of ``genai-quant quantize``.
        calibration: what the statistics were made from; None where there are none.

    Raises:
        UserError: the folder can't be written.
    """
    values = {field.name: getattr(options, field.name) for field in fields(options) if field.name != "printing"}
    origin = Origin(
        version=this_version(),
        command=command_line("genai-quant quantize", options),
        options=to_jsonable_python({name: value for name, value in values.items() if value is not None}),
        calibration="" if calibration is None else calibration.text,
    )
    try:
        write_json(store.folder / _ORIGIN, _ORIGINS, origin)
    except OSError as error:
        raise UserError(
            f"{store.folder / _ORIGIN} can't be written ({error.strerror}); free space, or choose another folder with "
            "--weights_path."
        ) from error


def read_origin(store: QuantizedStore) -> Origin | None:
    """Return what made the weights; None where that wasn't kept."""
    return read_json(store.folder / _ORIGIN, _ORIGINS)


def describe_base(
    directory: ModelDirectory, model: ir.Model, fingerprint: str, num_bytes: int, earlier: ModelRecord | None = None
) -> BaseModel:
    """Return what is known of a base model.

    Args:
        directory: where it lies.
        model: its graph.
        fingerprint: identifies its weights.
        num_bytes: of its .onnx file and external data.
        earlier: of the base, where it is an output itself, made from the same package.
    """
    return BaseModel(
        name=directory.folder.absolute().name if earlier is None else earlier.base.name,
        hub_name=hub_name_of(directory.folder) if earlier is None else earlier.base.hub_name,
        license=licence_of(directory.folder / MODEL_CARD) if earlier is None else earlier.base.license,
        fingerprint=fingerprint,
        producer=producer_of(model),
        bytes=num_bytes,
    )


def licence_of(card: Path) -> dict[str, str]:
    """Return the entries about the licence in a model card's YAML head; nothing where there are none."""
    head = _card_head(card)
    return {key: str(head[key]) for key in _LICENSE_KEYS if isinstance(head.get(key), str)}


def hub_name_of(folder: Path) -> str | None:
    """Return a model's name on the Hugging Face hub by its config.json, its card or the hub's cache; None for none."""
    cached = (
        _CACHED.fullmatch(folder.absolute().parents[1].name) if folder.absolute().parent.name == "snapshots" else None
    )
    if cached:
        return f"{cached[1]}/{cached[2]}"
    config = read_json(folder / "config.json", TypeAdapter(dict[str, Any])) or {}
    name = config.get("_name_or_path") or _card_head(folder / MODEL_CARD).get("base_model")
    # A relative path looks like a name of the hub, too.
    is_name = isinstance(name, str) and _HUB_NAME.fullmatch(name) is not None and not Path(name).exists()
    return str(name) if is_name else None


def _card_head(path: Path) -> Mapping[str, object]:
    """Return the YAML head of a model card; nothing where there is none."""
    try:
        found = _CARD_HEAD.match(path.read_text(encoding="utf-8-sig"))
        head = yaml.safe_load(found[1]) if found else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return head if isinstance(head, dict) else {}


def kinds_of(store: QuantizedStore) -> Iterator[KindOfLayer]:
    """Yield every kind of layer with its format: what is quantized, then what stays and why."""
    quantized: dict[tuple[str, QuantSpec], list[MatMulSite]] = {}
    for index, group in enumerate(store.recipe.groups):
        for site in group.sites:
            quantized.setdefault((kind_of(site.name), store.spec(index, site)), []).append(site)
    recipe = store.recipe
    in_floats = recipe.weight_form is WeightForm.QDQ
    for (kind, spec), sites in quantized.items():
        described = stored_in_words(sites[0], spec, recipe.weight_form, byte_scales=recipe.byte_scales)
        described = f"{described}, stored in floating point" if in_floats else described
        bits = None if in_floats else _bits(sites, spec, recipe)
        yield KindOfLayer(kind=kind, count=len(sites), format=described, bits_per_weight=bits)
    for plan in store.recipe.embeddings:
        numbers, kind = plan.table.vocabulary * plan.table.hidden, f"embedding {plan.table.weight}"
        bits, described = 8 * plan.format_bytes / numbers, plan.spec.description
        if plan.shared_with is not None:
            bits, described = None, f"the stored weight of {short_name(plan.shared_with)}"
        yield KindOfLayer(kind=kind, count=1, format=described, bits_per_weight=bits)
    kept = Counter((kind_of(name), reason) for name, reason in store.recipe.kept)
    for (kind, reason), count in kept.items():
        yield KindOfLayer(kind=kind, count=count, format=_AS_BASE, bits_per_weight=None, reason=reason)
    for part in store.recipe.unreached:
        name = f"{part.op_type} {part.weights[0]}"
        yield KindOfLayer(kind=name, count=len(part.weights), format=_AS_BASE, bits_per_weight=None, reason=part.reason)


def _bits(sites: list[MatMulSite], spec: QuantSpec, recipe: ExportRecipe) -> float:
    weights = sum(site.in_features * site.out_features for site in sites)
    stored = (stored_bytes(site, spec, recipe.weight_form, byte_scales=recipe.byte_scales) for site in sites)
    return 8 * sum(stored) / weights


def summarize_checks(report: VerifyReport, level: str) -> Checks:
    """Return the figures of a verification at ``level``."""
    return Checks(
        level=level,
        runtime=_runtime(),
        sites=report.sites,
        fused=report.fused,
        largest_error_exact=None if report.worst_exact is None else report.worst_exact.exact,
        largest_error_default=None if report.worst_default is None else report.worst_default.default,
        skipped=report.skipped,
    )


def summarize_evaluations(evaluations: tuple[Evaluation, ...]) -> EvaluationSummary:
    """Return the figures of comparisons of one model with its base, one for each text."""
    speeds = [one.speed for one in evaluations if one.speed is not None]
    speed = None
    if speeds:
        measured = speeds[-1]
        base, model = measured.models
        speed = Speed(
            machine=measured.machine,
            runtime=measured.runtime,
            threads=measured.threads,
            base_prompt=base.prompt.median,
            prompt=model.prompt.median,
            base_decode=base.decode.median,
            decode=model.decode.median,
        )
    return EvaluationSummary(runtime=_runtime(), texts=tuple(map(_scores, evaluations)), speed=speed)


def _scores(evaluation: Evaluation) -> TextScores:
    base, model = evaluation.rows
    return TextScores(
        text=Path(evaluation.comparison.text).name,
        tokens=model.accuracy.tokens,
        accuracy_level=model.accuracy_level or str(evaluation.comparison.accuracy_level),
        base_perplexity=base.accuracy.perplexity,
        perplexity=model.accuracy.perplexity,
        divergence=model.accuracy.mean_divergence,
        same_top1=model.accuracy.top1_agreement,
    )


def _runtime() -> str:
    return f"ONNX Runtime {onnxruntime.__version__}"
