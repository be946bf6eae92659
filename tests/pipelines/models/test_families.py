"""Every architecture of the support matrix goes the whole way: build, calibrate, quantize, export, run, generate.

Tiny random models with each family's own configuration; what released weights lose is stages.evaluate's to say. Each
family is calibrated once and quantized three times: the default search with INT4 alone, the same with the reference's
mixed rule, and plain rounding to compare with. With SUPPORT_MATRIX_OUT=FILE each family adds the line that
scripts.write_tables.support_matrix makes its table from.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime_genai as og
import pytest
import torch
import transformers
from pydantic import TypeAdapter

from export.fold import FoldOutcome
from export.rewrite import rewrite
from scripts.write_tables.support_matrix import FamilyResult
from stages.calibration.run import calibrate
from stages.commands.calibrate_options import CalibrateConfig
from stages.commands.quantize_options import QuantizeConfig
from stages.evaluation.accuracy import score_window, summarize
from stages.model.directory import ModelDirectory, locate_model
from stages.model.load import load_graph
from stages.quantization.weights.store import QuantizedStore, open_store
from stages.quantize import quantize
from stages.records.results import QuantizedWeight
from stages.records.sites import WeightLayout
from stages.runtime.feeds import CausalFeeds
from stages.runtime.session import SessionSettings, open_session
from tests.support.families import FAMILIES, Family, save_random_model
from tests.support.tiny_models import build_genai_model

pytestmark = pytest.mark.slow
_MUCH_LIKE_OTHERS = frozenset(
    {"mistral", "mistral-nemo", "gemma", "gemma-2", "smollm", "llama-3.1", "llama-3.2", "nemotron", "qwen2.5", "qwen3"}
)
"""Families whose graphs have nothing that the others' haven't: left to thorough runs."""

# Longer than the sliding windows of 16 and the 32 tokens at which Phi-3.5 changes its rotation.
TOKENS = np.arange(40).reshape(1, 40) * 7 % 300
BLOCK_SIZE = 16
HEAD = "/lm_head/MatMul"

REFERENCE_MODELS = (
    "Llama3.1-8B-Instruct",
    "Phi3.5-mini-Instruct",
    "Mistral-7B-Instruct-v0.3",
    "Llama3.2-3B-Instruct",
    "Gemma-2b-it",
    "Gemma-2-2b",
    "Gemma-2-9b",
    "Nemotron Mini 4B Instruct",
    "Qwen2.5-7B-Instruct",
    "DeepSeek-R1-Distill-Llama-8B",
    "DeepSeek-R1-Distil-Qwen-1.5B",
    "DeepSeek-R1-Distil-Qwen-7B",
    "DeepSeek-R1-Distill-Qwen-14B",
    "Mistral-NeMo-Minitron-2B-128k-Instruct",
    "Mistral-NeMo-Minitron-4B-128k-Instruct",
    "Mistral-NeMo-Minitron-8B-128k-Instruct",
)
"""The support matrix of the tool that this one replaces."""


@dataclass(frozen=True)
class Quantized:
    """One family's model in one number format, on the whole way."""

    base: ModelDirectory
    output: ModelDirectory
    store: QuantizedStore

    @property
    def verification(self) -> dict[str, Any]:
        return dict(json.loads((self.store.folder / "verification.json").read_text()))

    def folds(self) -> tuple[FoldOutcome, ...]:
        return rewrite(load_graph(self.base), self.store).folds


@dataclass(frozen=True)
class Finished:
    """One family, calibrated once and quantized in three ways."""

    family: Family
    source: Path
    base: ModelDirectory
    text: np.ndarray
    """[4, 64] tokens of English to compare predictions on."""
    int4: Quantized
    mixed: Quantized
    rounded: Quantized

    @cached_property
    def base_logits(self) -> np.ndarray:
        return _logits(self.base, self.text)

    def divergence(self, quantized: Quantized) -> float:
        """Mean over the text's tokens of KL(base || quantized), in nats."""
        logits = torch.from_numpy(_logits(quantized.output, self.text)).float()
        base, tokens = torch.from_numpy(self.base_logits).float(), torch.from_numpy(self.text)
        windows = [score_window(*window) for window in zip(base, logits, tokens, strict=True)]
        return summarize(windows).mean_divergence


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices of 64 channels are solved four times faster by one thread than by two that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build_and_calibrate(family: Family, folder: Path, text: Path, tokenizer: Path, *build: str) -> ModelDirectory:
    """A base model (fp32 for the CPU where ``build`` names nothing else) and its calibration cache."""
    save_random_model(family.config(), family.width, folder / "hf", tokenizer)
    build_genai_model(folder / "hf", folder / "base", *build)
    config = CalibrateConfig(onnx_path=folder / "base", dataset=str(text), calib_size=12, seq_len=64, batch_size=4)
    calibrate(config)
    return locate_model(folder / "base")


def quantized(base: ModelDirectory, name: str, **options: object) -> Quantized:
    """Quantize, export and verify with ``options`` of stages.quantize."""
    output = base.folder.with_name(name)
    config = QuantizeConfig(
        onnx_path=base.folder, output_path=output, target="any", block_size=BLOCK_SIZE, accuracy_level=1, **options
    )
    quantize(config)
    return Quantized(base, locate_model(output), open_store(config.weights_folder))


def _param(family: Family) -> object:
    return pytest.param(family, id=family.name, marks=[pytest.mark.thorough] * (family.name in _MUCH_LIKE_OTHERS))


@pytest.fixture(scope="module", params=map(_param, FAMILIES))
def finished(request, tmp_path_factory: pytest.TempPathFactory, tiny_text: Path, tiny_tokenizer: Path) -> Finished:
    """Each family in turn, as the command lines treat it."""
    family, folder = request.param, tmp_path_factory.mktemp("family")
    base = build_and_calibrate(family, folder, tiny_text, tiny_tokenizer)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_tokenizer)
    tokens = tokenizer(tiny_text.read_text()[-3000:], verbose=False)["input_ids"]
    return Finished(
        family,
        folder / "hf",
        base,
        np.array(tokens[: 4 * 64]).reshape(4, 64),
        int4=quantized(base, "int4"),
        mixed=quantized(base, "mixed", enable_mixed_quant=True, lm_head="8" if family.int8_head else None),
        rounded=quantized(base, "rounded", algo="rtn_dq", verify="off"),
    )


def test_every_model_of_the_reference_has_a_row() -> None:
    rows = {model.partition(" (")[0] for family in FAMILIES for model in family.models}
    assert set(REFERENCE_MODELS) <= rows


def test_the_base_model_computes_what_transformers_does(finished: Finished) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        finished.source, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(TOKENS)).logits.numpy()
    # A few layers of float32 sums in another order; a rotation, cap or window that is off gives more than 1e-2.
    assert _difference(_logits(finished.base), expected) < 1e-5


def test_the_base_models_predictions_are_neither_flat_nor_certain(finished: Finished) -> None:
    """Else no KL divergence would mean anything: flat ones can't move, certain ones don't."""
    logs = torch.log_softmax(torch.from_numpy(finished.base_logits).double(), dim=-1)
    entropy = float(-(logs.exp() * logs).sum(dim=-1).mean())
    assert 2 < entropy < np.log(300) - 1


def test_every_site_runs_fused(finished: Finished) -> None:
    family = finished.family
    for model, sites in ((finished.int4, family.sites), (finished.mixed, family.sites + family.int8_head)):
        assert model.verification["unfused"] == []
        assert model.verification["fused"] == model.verification["sites"] == sites


def test_what_is_kept_has_its_reason(finished: Finished) -> None:
    for model, head in ((finished.int4, True), (finished.mixed, not finished.family.int8_head)):
        kept = dict(model.store.recipe.kept)
        assert kept.pop(HEAD, "") == ("--exclude lm_head" if head else "")
        assert len(kept) == finished.family.routers
        assert all("router" in name and "router" in why for name, why in kept.items())
        read_by = {part.op_type for part in model.store.recipe.unreached}
        assert ("MoE" in read_by) == bool(finished.family.routers)
        assert "Gather" in read_by


def test_the_mixed_rule_stores_its_layers_as_int8(finished: Finished) -> None:
    family = finished.family
    found = {report.site for report in finished.mixed.store.reports() if report.format == "8ch"}
    places = {"qkv_proj": "attn", "down_proj": "mlp"}
    expected = {
        f"/model/layers.{layer}/{places[kind]}/{kind}/MatMul"
        for layer in family.int8_layers
        for kind in places
        if kind in family.kinds
    }
    assert found == expected | ({HEAD} if family.int8_head else set())


def test_input_scales_go_where_they_cost_nothing(finished: Finished) -> None:
    found: dict[str, set[str]] = {}
    for outcome in finished.int4.folds():
        found.setdefault(_kind(outcome), set()).add(outcome.how)
        assert not outcome.reason
    # The search may find that no scale is best, in one of the layers.
    assert {kind: hows - {"none"} for kind, hows in found.items()} == {
        kind: {how} for kind, how in finished.family.folds.items()
    }


def test_folding_and_packing_change_nothing(finished: Finished) -> None:
    """The base graph with the dequantized weights in it knows no fold: norms, gains and other layers are untouched."""
    for model in (finished.int4, finished.mixed):
        # Each fold rounds twice in float32.
        assert _difference(_logits(model.output), _logits_with_stored_weights(model)) < 1e-5


def test_predictions_stay_near_the_bases(finished: Finished) -> None:
    rounded, int4, mixed = (finished.divergence(each) for each in (finished.rounded, finished.int4, finished.mixed))
    # Random weights have no structure that a search could use: layers' errors shrink, their sum at the logits hardly.
    assert int4 < 1.15 * rounded
    assert mixed < rounded
    # INT8 takes errors of some sites away; those that stay then add up, or cancel, a little differently.
    assert mixed < 1.25 * int4
    # Random weights have no structure that a search could use; codes in a wrong place give whole nats.
    assert mixed < 0.15


def test_the_runtime_generates_the_greedy_continuation(finished: Finished) -> None:
    prompt = [int(token) for token in TOKENS[0, :20]]
    sequence = _generate(finished.mixed.output, prompt, 28)
    assert sequence[:20] == prompt
    assert len(sequence) == 28
    # The first token follows from the same logits that plain ONNX Runtime gives; </s> was forbidden.
    logits = _logits(finished.mixed.output, TOKENS[:, :20])[0, -1]
    logits[1] = -np.inf
    assert sequence[20] == int(logits.argmax())


@pytest.mark.parametrize(
    ("name", "execution_provider"),
    [
        # Norms written out in small nodes and in float32, with a Cast before each MatMul.
        pytest.param("gemma-2", "trt-rtx", marks=pytest.mark.thorough),
        # MultiHeadAttention in place of GroupQueryAttention.
        ("llama-3.1", "cpu"),
    ],
)
def test_half_precision_graphs_of_other_shapes(
    name: str, execution_provider: str, tmp_path: Path, tiny_text: Path, tiny_tokenizer: Path
) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    base = build_and_calibrate(family, tmp_path, tiny_text, tiny_tokenizer, "fp16", execution_provider)
    model = quantized(base, "mixed", enable_mixed_quant=True)
    expected = dict(family.folds) | {"q_proj": family.folds["qkv_proj"]}
    for outcome in model.folds():
        assert outcome.how in ("none", expected[_kind(outcome)]), outcome
        assert (outcome.how == "mul") == bool(outcome.reason)
    # Activations of four layers are rounded to half precision, 5e-4 each time, at other places.
    assert _difference(_logits(model.output), _logits_with_stored_weights(model)) < 1e-2
    assert _difference(_logits(model.output), _logits(base)) < 0.4


def test_the_support_matrix_gets_its_line(finished: Finished, tmp_path: Path) -> None:
    wanted = os.environ.get("SUPPORT_MATRIX_OUT")
    path = Path(wanted) if wanted else tmp_path / "results.jsonl"
    adapter = TypeAdapter(FamilyResult)
    with path.open("a", encoding="utf-8") as lines:
        lines.write(adapter.dump_json(_result(finished)).decode() + "\n")
    last = adapter.validate_json(path.read_text(encoding="utf-8").splitlines()[-1])
    assert last.fused == last.sites == finished.family.sites + finished.family.int8_head


# --------------------------------------------------------------------------- measuring


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _kind(outcome: FoldOutcome) -> str:
    """The first reader's own name: /model/layers.0/attn/o_proj/MatMul -> o_proj."""
    return outcome.sites[0].split("/")[-2]


def _logits(directory: ModelDirectory, tokens: np.ndarray = TOKENS) -> np.ndarray:
    return _run(directory.onnx_file, directory, tokens)


def _run(model: Path | bytes, directory: ModelDirectory, tokens: np.ndarray) -> np.ndarray:
    session = open_session(model, SessionSettings(external_data_folder=directory.folder, accuracy_level=1))
    feeds = CausalFeeds.of(session, directory)
    # One window at a time: a cache that slides starts with one window's buffer.
    rows = [session.run(["logits"], feeds(row[None]))[0] for row in tokens]
    return np.concatenate(rows)


def _logits_with_stored_weights(quantized: Quantized) -> np.ndarray:
    model = load_graph(quantized.base)
    for index, group in enumerate(quantized.store.recipe.groups):
        for site in group.sites:
            _put(model, site.weight, site.layout, _dequantized(quantized.store.read(index, site)).astype(site.dtype))
    return _run(ir.to_proto(model).SerializeToString(), quantized.base, TOKENS)


def _put(model: ir.Model, name: str, layout: WeightLayout, weight: np.ndarray) -> None:
    """Let the MatMuls that read the initializer ``name`` read ``weight`` [N, K]; an embedding tied to it stays."""
    original = model.graph.initializers[name]
    stored = weight.T if layout is WeightLayout.K_BY_N else weight
    value = ir.Value(name=f"{name}/stored", const_value=ir.tensor(np.ascontiguousarray(stored)))
    value.shape, value.dtype = original.shape, original.dtype
    model.graph.register_initializer(value)
    for use in tuple(original.uses()):
        through = use.node.op_type == "Transpose" and all(
            node.op_type == "MatMul" for node in use.node.outputs[0].consumers()
        )
        if use.node.op_type == "MatMul" or through:
            use.node.replace_input_with(use.idx, value)


def _dequantized(weight: QuantizedWeight) -> np.ndarray:
    """[N, K] float32: (code - zero point) * block scale / input scale, from what was stored."""
    codes, scales = weight.codes.double().numpy(), weight.scales.double().numpy()
    assert weight.zero_points is None
    in_features = codes.shape[1]
    matrix = codes * np.repeat(scales, weight.spec.block_size(in_features), axis=1)[:, :in_features]
    if weight.input_scale is not None:
        matrix /= weight.input_scale.double().numpy()
    return matrix.astype(np.float32)


def _generate(directory: ModelDirectory, prompt: list[int], length: int) -> list[int]:
    model = og.Model(str(directory.folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


def _result(finished: Finished) -> FamilyResult:
    family, mixed = finished.family, finished.mixed
    reports, folds = mixed.store.reports(), mixed.folds()
    weights = sum(site.in_features * site.out_features for group in mixed.store.recipe.groups for site in group.sites)
    return FamilyResult(
        name=family.name,
        models=family.models,
        architecture=type(family.config()).__name__.removesuffix("Config"),
        peculiar=family.peculiar,
        sites=mixed.verification["sites"],
        fused=mixed.verification["fused"],
        int8_sites=sum(report.format == "8ch" for report in reports),
        int8_head=family.int8_head,
        bits_per_weight=8 * sum(report.bytes for report in reports) / weights,
        experts_share=sum(part.share for part in mixed.store.recipe.unreached if part.op_type == "MoE"),
        folds=dict(Counter(outcome.how for outcome in folds)),
        reasons=tuple(sorted({outcome.reason for outcome in folds if outcome.reason})),
        against_own_weights=_difference(_logits(mixed.output), _logits_with_stored_weights(mixed)),
        divergence_rounded=finished.divergence(finished.rounded),
        divergence_int4=finished.divergence(finished.int4),
        divergence_mixed=finished.divergence(mixed),
    )
